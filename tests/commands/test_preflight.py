"""A wrong path, a full output folder and a missing run are answered before torch is loaded, like a wrong recipe."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

RUN = """
import atexit, sys
heavy = {"torch", "transformers", "datasets", "accelerate"}
atexit.register(lambda: print("loaded:", *sorted(heavy & set(sys.modules))))
from dynlora_cli.cli.app import main
main(sys.argv[1:])
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("preflight")
    rows = [json.dumps({"prompt": f"What is {i}?", "completion": f" {i}"}) for i in range(9)]
    (folder / "rows.jsonl").write_text("\n".join(rows))
    for name, text in {
        "good": "model: builtin:tiny\ndataset: rows.jsonl\noutput_dir: new\n",
        "rows": "model: builtin:tiny\ndataset: row.jsonl\noutput_dir: new\n",
        "model": "model: ./models/none\ndataset: rows.jsonl\noutput_dir: new\n",
        "full": "model: builtin:tiny\ndataset: rows.jsonl\noutput_dir: full\n",
    }.items():
        (folder / f"{name}.yaml").write_text(text)
    (folder / "full").mkdir()
    (folder / "full" / "notes.txt").write_text("mine")
    (folder / "adapter").mkdir()
    (folder / "adapter" / "adapter_config.json").write_text("{}")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("train rows.yaml", "no file or folder row.jsonl; did you mean 'rows.jsonl'?"),
        ("train rows.yaml --dry-run", "no file or folder row.jsonl; did you mean 'rows.jsonl'?"),
        ("train model.yaml", "there is no folder ./models/none"),
        ("train full.yaml", "full is not empty"),
        ("train full.yaml --overwrite", "--overwrite replaces only what dynlora made"),
        ("train good.yaml --resume", "new holds no run"),
        ("train good.yaml --resume-from new/checkpoints/step-5", "there is no folder new/checkpoints/step-5"),
        ("merge --adapter nothing", "--adapter nothing does not exist"),
        ("merge --adapter full", "full holds no adapter"),
        ("merge --adapter adapter --out full", "--out full is not empty"),
        ("merge --adapter adapter --base ./none", "there is no folder ./none"),
        ("prune --adapter nothing --budget 2 --out small", "--adapter nothing does not exist"),
        ("prune --adapter adapter --budget 2 --out full", "--out full is not empty"),
        ("prune --adapter adapter --budget 2 --out small --data row.jsonl", "no file or folder row.jsonl"),
        ("export --adapter nothing --to peft --out small", "--adapter nothing does not exist"),
        ("export --adapter adapter --to peft --out full", "--out full is not empty"),
        ("inspect --adapter nothing", "--adapter nothing does not exist"),
        ("eval --adapter nothing", "--adapter nothing does not exist"),
        ("eval --adapter adapter --data row.jsonl", "no file or folder row.jsonl"),
        ("eval good.yaml", "there is no run in new yet"),
    ],
)
def test_what_the_disk_can_answer_is_answered_without_torch(folder: Path, command: str, said: str):
    done = subprocess.run(
        [sys.executable, "-c", RUN, *command.split()], cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2, done.stderr
    assert said in " ".join(done.stderr.split())
    assert done.stdout.strip() == "loaded:"
    assert not (folder / "new").exists()
