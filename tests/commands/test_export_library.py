"""`dynlora export --library`: every adapter for vLLM, and a script that starts it."""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
from pathlib import Path

import pytest
import torch
from cli_helpers import Dynlora, contents
from eval_helpers import foreign
from library_helpers import Made, silent

from dynlora_cli.adapters.read import read_adapter
from dynlora_cli.library.add import add
from dynlora_cli.library.addition import Addition
from dynlora_cli.models.quiet import quiet

STRANGE = 'it\'s $(touch broken) = "a, b" `x`'


@pytest.fixture
def library(made: Made, tmp_path: Path) -> Made:
    """A library with adapters of several ranks, and one that vLLM does not read."""
    large = foreign(made.base, tmp_path / "large", target_modules=["q_proj", "v_proj"], rank_pattern={"q_proj": 12})
    dora = foreign(made.base, tmp_path / "dora", target_modules=["q_proj"], use_dora=True)
    with quiet:
        for name, adapter in (("other", made.other), ("large.one", large), ("dora", dora)):
            add(made.root, Addition(adapter, name=name, data=made.rows), silent)
    return made


def start(folder: Path, tmp_path: Path, *options: str, **environment: str) -> list[str]:
    """What the script calls vLLM with, by a `vllm` that writes down its arguments; the folder it stood in comes last."""
    programs = tmp_path / "programs"
    programs.mkdir(exist_ok=True)
    vllm = programs / "vllm"
    vllm.write_text('#!/bin/sh\nfor word in "$@"; do printf "%s\\0" "$word"; done\nprintf "%s" "$PWD"\n')
    vllm.chmod(0o755)
    (tmp_path / "elsewhere").mkdir(exist_ok=True)
    done = subprocess.run(
        [folder / "start.sh", *options],
        cwd=tmp_path / "elsewhere",
        env={"PATH": f"{programs}:{os.environ['PATH']}", "CDPATH": "/:..", **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert not list((tmp_path / "elsewhere").iterdir())
    return done.stdout.split("\0")


def test_every_adapter_that_vllm_reads_and_a_script_that_serves_them(library: Made, tmp_path: Path, dynlora: Dynlora):
    before, out = contents(library.root), tmp_path / STRANGE
    answer = dynlora("export", "--library", library.root, "--to", "vllm-library", "--out", out, "--json")
    assert answer.code == 0, answer.err
    assert contents(library.root) == before
    record = json.loads((out / "export.json").read_text())
    assert record == answer.json
    assert list(record["adapters"]) == ["first", "other", "large.one"]
    assert list(record["left_out"]) == ["dora"]
    assert "dora is left out" in answer.err
    assert "is a DoRA" in record["left_out"]["dora"]
    assert not (out / "adapters" / "dora").exists()
    for name, facts in record["adapters"].items():
        assert facts["max_logit_difference"] < 1e-4
        exported, original = (read_adapter(root / "adapters" / name) for root in (out, library.root))
        assert set(exported.ranks.values()) == {max(original.ranks.values())}, "one rank in all layers"
        for layer, factors in original.layers.items():
            torch.testing.assert_close(exported.layers[layer].delta_OI(), factors.delta_OI(), rtol=0, atol=1e-6)
    subprocess.run(["bash", "-n", out / "start.sh"], check=True)
    assert os.stat(out / "start.sh").st_mode & stat.S_IXUSR
    modules = [f"{name}=adapters/{name}" for name in record["adapters"]]
    expected = ["serve", str(library.base.resolve()), "--enable-lora", "--lora-modules", *modules]
    expected += ["--max-lora-rank", "16", "--max-loras", "3", "--max-cpu-loras", "3"]
    assert start(out, tmp_path) == [*expected, str(out)]
    assert start(out, tmp_path, "--port", "81 00", "*") == [*expected, "--port", "81 00", "*", str(out)]


def test_the_base_may_lie_elsewhere(library: Made, tmp_path: Path, dynlora: Dynlora):
    base = Path(shutil.copytree(library.base, tmp_path / STRANGE))
    out = tmp_path / "out"
    answer = dynlora("export", "--library", library.root, "--to", "vllm-library", "--out", out, "--base", base)
    assert answer.code == 0, answer.err
    assert start(out, tmp_path)[1] == str(base)
    moved = Path(shutil.move(out, tmp_path / "moved"))
    assert start(moved, tmp_path, BASE="org/model")[1] == "org/model"
    assert start(moved, tmp_path, BASE=f"../{STRANGE}")[1] == str(base), "a folder is named from where one stands"
    readme = (moved / "README.md").read_text()
    assert f"dynlora serve --upstream http://127.0.0.1:8000 --library {library.root.resolve()}" in readme
    assert "`dora`" in readme.split("cannot read them")[1]


def test_without_the_base(library: Made, tmp_path: Path, dynlora: Dynlora):
    library.base.rename(tmp_path / "gone")
    try:
        answer = dynlora(
            "export", "--library", library.root, "--to", "vllm-library", "--out", tmp_path / "out", "--json"
        )
        assert answer.code == 0, answer.err
        assert answer.json["adapters"]["first"]["max_weight_difference"] < 1e-6
        assert start(tmp_path / "out", tmp_path)[1] == str(library.base)
    finally:
        (tmp_path / "gone").rename(library.base)


def test_a_library_of_nothing_that_vllm_reads(made: Made, tmp_path: Path, dynlora: Dynlora):
    dora = foreign(made.base, tmp_path / "dora", target_modules=["q_proj"], use_dora=True)
    with quiet:
        add(tmp_path / "new", Addition(dora, name="dora", data=made.rows), silent)
    answer = dynlora("export", "--library", tmp_path / "new", "--to", "vllm-library", "--out", tmp_path / "out")
    assert answer.code == 2
    assert "no adapter" in answer.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--to", "vllm-library", "--adapter", "x"], "all adapters of a library"),
        (["--to", "vllm", "--library", "x"], "writes one adapter"),
        (["--to", "vllm", "--adapter", "x", "--library", "x"], "do not go together"),
        (["--to", "vllm"], "--adapter FOLDER"),
        (["--to", "vllm-library", "--library", "nowhere"], "does not exist"),
    ],
)
def test_what_does_not_go_together(arguments: list[str], words: str, tmp_path: Path, dynlora: Dynlora):
    answer = dynlora("export", *arguments, "--out", tmp_path / "out")
    assert (answer.code, words in " ".join(answer.err.split())) == (2, True), answer.err
