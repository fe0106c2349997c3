"""What a shell offers after Tab, by the protocol that bash uses, and in a real bash."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from cli_helpers import Dynlora

from dynlora_cli import plugins


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder with a recipe, a folder of recipes, and a run."""
    monkeypatch.chdir(tmp_path)
    for name in (
        "first.yaml",
        "more/second.yml",
        "out/run/adapter_config.json",
        "out/run/checkpoints/c/adapter_config.json",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()


def offered(line: str, dynlora: Dynlora, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    words = shlex.split(line)
    monkeypatch.setenv("COMP_WORDS", line)
    monkeypatch.setenv("COMP_CWORD", str(len(words) - (not line.endswith(" "))))
    monkeypatch.setenv("_DYNLORA_COMPLETE", "complete_bash")
    answer = dynlora()
    assert (answer.code, answer.err) == (0, "")
    return answer.out.split()


ASKED = {
    "dynlora tr": ["train"],
    "dynlora train ": ["first.yaml", "more/second.yml"],
    "dynlora train mo": ["more/second.yml"],
    "dynlora train first.yaml --resume-f": ["--resume-from"],
    "dynlora eval --adapter o": ["out/run"],
    "dynlora chat --adapter ": ["out/run"],
    "dynlora export --to merged": ["merged", "merged-gguf"],
    "dynlora prune --policy mag": ["magnitude"],
    "dynlora merge --into ": ["base", "adapter"],
    "dynlora library ": ["add", "list", "remove"],
    "dynlora train nothing-begins-so": [],  # bash completes files then
}


@pytest.mark.parametrize("line", ASKED)
def test_what_is_offered(line: str, dynlora: Dynlora, monkeypatch: pytest.MonkeyPatch):
    found = offered(line, dynlora, monkeypatch)
    assert found == ASKED[line] or (line.endswith("library ") and set(ASKED[line]) <= set(found))


def test_every_plug_in_that_may_be_named_is_offered(dynlora: Dynlora, monkeypatch: pytest.MonkeyPatch):
    assert offered("dynlora export --to ", dynlora, monkeypatch) == plugins.names("exporters")
    assert offered("dynlora prune --policy ", dynlora, monkeypatch) == plugins.names("policies")
    assert offered("dynlora serve --router ", dynlora, monkeypatch) == plugins.names("routers")


@pytest.mark.parametrize(
    ("shell", "words"), [("zsh", "compdef _dynlora_completion dynlora"), ("fish", "complete --command dynlora")]
)
def test_scripts_for_other_shells(shell: str, words: str, dynlora: Dynlora, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("_DYNLORA_COMPLETE", f"source_{shell}")
    assert words in dynlora().out


@pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash")
def test_a_real_bash(tmp_path: Path):
    """The script is taken in, its function called as Tab calls it; and nothing heavy is loaded for the answer."""
    program = tmp_path / "bin" / "dynlora"
    program.parent.mkdir()
    program.write_text(
        f"#!{sys.executable}\n"
        "import sys\nfrom dynlora_cli.cli import main\n"
        "try:\n    main()\n"
        "finally:\n    print({'torch', 'transformers', 'datasets'} & sys.modules.keys(), file=open('loaded', 'w'))\n"
    )
    program.chmod(0o755)
    script = (
        "source <(_DYNLORA_COMPLETE=source_bash dynlora); complete -p dynlora; COMP_WORDS=(dynlora export --to ollam); "
        'COMP_CWORD=3; _dynlora_completion dynlora; echo "${COMPREPLY[@]}"'
    )
    environment = {**os.environ, "PATH": f"{program.parent}{os.pathsep}{os.environ['PATH']}"}
    environment["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parents[2]), environment.get("PYTHONPATH", "")])
    done = subprocess.run(["bash", "--norc", "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["complete -o default -F _dynlora_completion dynlora", "ollama"]
    assert Path("loaded").read_text() == "set()\n"
