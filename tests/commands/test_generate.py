"""`dynlora generate` as a person and a script use it: what stdout holds, who answers, and what is refused."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_helpers import Answer
from eval_helpers import Run, finished_chat_run, foreign
from test_architecture import fresh

from dynlora_cli.cli.views.answers import write
from dynlora_cli.errors import MachineError
from dynlora_cli.generation import engine as engines
from dynlora_cli.generation.prompts import Prompt, read_prompts


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on conversations."""
    return finished_chat_run(tmp_path_factory.mktemp("chat")).folder


@pytest.fixture(scope="module")
def plain(runs: Callable[[str], Run], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A stock PEFT adapter on the base of the run on bare prompts."""
    base = runs("llama").recipe.parent / "llama"
    return foreign(base, tmp_path_factory.mktemp("foreign") / "plain", target_modules=["q_proj", "down_proj"])


@pytest.fixture
def generate(dynlora: Callable[..., Answer]) -> Callable[..., Answer]:
    return lambda *arguments: dynlora("generate", "--max-new-tokens", 8, *arguments)


def lines(answer: Answer) -> list[dict[str, Any]]:
    return [json.loads(line) for line in answer.out.splitlines()]


# -- before anything heavy loads -------------------------------------------------------------------------------------


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "an-adapter").mkdir()
    (tmp_path / "an-adapter" / "adapter_config.json").write_text("{}")
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "odd.jsonl").write_text('{"question": "x"}\n')
    return tmp_path


REFUSED = [
    ([], "there is no run below ./out"),
    (["x"], "there is no run below ./out"),
    (["x", "--adapter", "nope"], "nope does not exist"),
    (["x", "--library", "nope"], "the library nope does not exist"),
    (["x", "--base", "./nope"], "nope"),
    (["--adapter", "an-adapter"], "there is no prompt"),
    (["", "--adapter", "an-adapter"], "the prompt is empty"),
    (["empty.txt", "--adapter", "an-adapter"], "empty.txt: the prompt is empty"),
    (["none.jsonl", "--adapter", "an-adapter"], "no file or folder none.jsonl"),
    (["odd.jsonl", "--adapter", "an-adapter"], "odd.jsonl:1: no prompt in the columns question"),
    (["x", "--adapter", "an-adapter", "--use", "an-adaptor"], "did you mean 'an-adapter'?"),
    (["x", "--adapter", "an-adapter", "--use", "nan*an-adapter"], "nan is no weight"),
    (["x", "--adapter", "an-adapter", "--router", "embeding"], "did you mean 'embedding'?"),
    (["x", "--adapter", "an-adapter", "--use", "base", "--router", "fixed"], "decides for --use auto alone"),
    (["x", "--adapter", "an-adapter", "--use", "base", "--set", "mix=a"], "--set mix=a is of a router"),
    (["x", "--adapter", "an-adapter", "--router", "fixed", "--set", "mx=a"], "did you mean 'mix'?"),
    (["x", "--adapter", "an-adapter", "--temperature", "nan"], "temperature is nan"),
    (["x", "--adapter", "an-adapter", "--top-p", "1.5"], "top_p is 1.5"),
    (["x", "--adapter", "an-adapter", "--max-new-tokens", "0"], "max_new_tokens is 0"),
    (["x", "--adapter", "an-adapter", "--stop-strings", ""], "stop_strings: one of them is empty"),
    (["x", "--adapter", "an-adapter", "--do-sample", "--temperature", "0"], "temperature 0 draws nothing"),
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "message"), REFUSED, ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else ""
)
def test_refused(arguments: list[str], message: str, elsewhere: Path, dynlora: Callable[..., Answer]):
    code, out, shown = dynlora("generate", *arguments)
    assert (code, out) == (2, "")
    assert message in " ".join(shown.split())


@pytest.mark.slow
@pytest.mark.parametrize("number", [2, 9, 10, 15], ids=lambda number: REFUSED[number][1])
def test_refused_before_anything_heavy_loads(number: int, elsewhere: Path):
    arguments, message = REFUSED[number]
    code, loaded, shown = fresh("generate", *arguments)
    assert (code, loaded) == (2, []), shown
    assert message in " ".join(shown.split())


def test_help_loads_nothing_heavy():
    code, loaded, _ = fresh("generate", "--help")
    assert (code or 0, loaded) == (0, [])


# -- answers ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_stdout_holds_the_answer_alone(generate: Callable[..., Answer], runs: Callable[[str], Run]):
    text = generate("sort: b a -> ", "--adapter", runs("llama").folder)
    assert text.code == 0
    assert "note: cut after 8 tokens" in text.err
    (line,) = lines(generate("sort: b a -> ", "--adapter", runs("llama").folder, "--json"))
    assert text.out == line["text"] + "\n"
    assert line["use"] == "out"
    assert line["mix"] == {"out": 1.0}
    assert (line["finish_reason"], line["tokens"], line["place"]) == ("length", 8, None)


def test_the_newest_run_below_out(
    generate: Callable[..., Answer], runs: Callable[[str], Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "out").symlink_to(runs("llama").folder.parent)
    monkeypatch.chdir(tmp_path)
    answer = generate("sort: b a -> ")
    assert answer.code == 0
    assert "the newest below out" in answer.err


@pytest.mark.slow
def test_base_adapter_and_mix_one_below_the_other(
    generate: Callable[..., Answer], runs: Callable[[str], Run], plain: Path
):
    adapters = ("--adapter", runs("llama").folder, "--adapter", plain)
    alone = {
        use: lines(generate("sort: b a -> ", *adapters, "--use", use, "--json"))[0]["text"]
        for use in ("base", "out", "plain", "0.5*out+plain")
    }
    assert len(set(alone.values())) == 4
    both = generate("sort: b a -> ", *adapters, "--json")
    assert [line["text"] for line in lines(both)] == [alone["out"], alone["plain"]]
    compared = generate("sort: b a -> ", *adapters, "--compare", "--use", "0.5*out+plain", "--json")
    assert {line["use"]: line["text"] for line in lines(compared)} == alone
    shown = generate("sort: b a -> ", *adapters, "--compare")
    assert shown.out == "".join(f"{alone[name]}\n" for name in ("base", "out", "plain"))
    assert [line for line in shown.err.splitlines() if line in alone] == ["base", "out", "plain"]


def test_what_nobody_says_is_said(generate: Callable[..., Answer], plain: Path, runs: Callable[[str], Run]):
    assert "plain does not say how it was trained to be asked" in generate("x", "--adapter", plain).err
    assert "does not say" not in generate("x", "--adapter", runs("llama").folder).err


@pytest.mark.slow
def test_stdin_is_one_prompt(runs: Callable[[str], Run], warm: Path):
    command = [str(warm), "generate", "--adapter", str(runs("llama").folder)]
    command += ["--max-new-tokens", "4", "--json"]
    done = subprocess.run([*command, "-"], input="sort: b\na -> \n", capture_output=True, text=True, check=True)
    line = json.loads(done.stdout)
    assert (line["prompt"], line["place"]) == ("sort: b\na -> ", "stdin")
    empty = subprocess.run([*command, "-"], input="", capture_output=True, text=True, check=False)
    assert (empty.returncode, json.loads(empty.stdout)["error"]) == (2, "stdin: the prompt is empty")


@pytest.mark.parametrize("name", ["prompts", "prompts.jsonl.gz", "x" * 300, "a\0b"])
def test_a_name_that_is_taken_for_a_prompt_is_said(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    assert read_prompts(name, io.StringIO()) == ([Prompt(name)], [])
    if len(name) < 20 and "\0" not in name:
        Path(name).write_text("{}")
        (prompt,), (note,) = read_prompts(name, io.StringIO())
        assert prompt == Prompt(name)
        assert note.startswith(f"{name}: the name is the prompt")


def test_rows_of_a_file(generate: Callable[..., Answer], chat: Path, tmp_path: Path):
    turns = [{"role": "user", "content": "sort 3"}, {"role": "assistant", "content": "done 3"}]
    rows = [
        {"prompt": "sort 3", "completion": "done 3"},
        {"messages": turns, "source": "me"},
        {"instruction": "sort", "input": "3"},
        {"text": "<|user|>sort 3"},
        {"prompt": "sort 3", "system": "be brief"},
        {"prompt": turns[:1]},
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    answer = generate(path, "--adapter", chat, "--json")
    assert answer.code == 0, answer.err
    found = lines(answer)
    assert [line["place"] for line in found] == [f"{path}:{number}" for number in range(1, 7)]
    assert found[0]["text"] == found[1]["text"] == found[5]["text"]
    assert found[0]["prompt_tokens"] == found[1]["prompt_tokens"] == found[5]["prompt_tokens"]
    assert found[1]["prompt"] == turns[:1]
    assert found[2]["prompt"] == [{"role": "user", "content": "sort\n\n3"}]
    assert "columns that are not read: completion, source" in answer.err
    assert "1 conversation end" in answer.err
    assert "rows of `text` are gone on with as they are" in answer.err


def test_a_batch_answers_as_each_prompt_alone(
    generate: Callable[..., Answer], runs: Callable[[str], Run], tmp_path: Path
):
    prompts = ["sort: b a -> ", "count -> ", "reverse all the words of every line here -> "] * 4
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    run = runs("llama").folder
    together = [line["text"] for line in lines(generate(path, "--adapter", run, "--json"))]
    assert together[:3] * 4 == together
    assert together[:3] == [lines(generate(prompt, "--adapter", run, "--json"))[0]["text"] for prompt in prompts[:3]]


def test_a_seed_gives_the_same_text_again(generate: Callable[..., Answer], runs: Callable[[str], Run]):
    run = runs("llama").folder
    one, two, other = (
        generate("sort: b a -> ", "--adapter", run, "--temperature", 2, "--seed", seed) for seed in (1, 1, 2)
    )
    assert one.out == two.out != other.out


def test_a_stop_string_is_not_shown(generate: Callable[..., Answer], runs: Callable[[str], Run]):
    run = runs("llama").folder
    whole = lines(generate("sort: b a -> ", "--adapter", run, "--json"))[0]["text"]
    stop = whole[3:5]
    (line,) = lines(generate("sort: b a -> ", "--adapter", run, "--stop-strings", stop, "--json"))
    assert line["text"] == whole[: whole.index(stop)]
    assert line["finish_reason"] == "stop"


# -- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{bert}"], "names classes, and writes no text"),
        (["{run}", "--adapter", "{chat}"], "another model by its fingerprint"),
        (["{run}", "--adapter", "{run}"], "are the same"),
        (["{run}", "--system", "be brief"], "takes no system message"),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else "",
)
def test_a_mistake_gets_one_message(
    arguments: list[str], message: str, runs: Callable[[str], Run], chat: Path, generate: Callable[..., Answer]
):
    places = {"bert": runs("bert").folder, "run": runs("llama").folder, "chat": chat}
    answer = generate("x", "--adapter", *(argument.format(**places) for argument in arguments), "--json")
    assert answer.code == 2
    assert answer.json["ok"] is False
    assert message in answer.json["error"]
    assert answer.err.count("error:") == 1


def test_a_prompt_that_leaves_no_room(generate: Callable[..., Answer], runs: Callable[[str], Run], tmp_path: Path):
    answer = generate("sort " * 100, "--adapter", runs("llama").folder)
    assert answer.code == 2
    assert "the model's context 128: no room is left for an answer" in answer.err
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"prompt": "a"}) + "\n" + json.dumps({"prompt": "sort " * 100}) + "\n")
    rows = generate(path, "--adapter", runs("llama").folder, "--json")
    assert rows.code == 2
    assert rows.json["error"].startswith(f"{path}:2: the prompt has"), "found before anything is written"


def test_nan_is_a_failed_number(
    generate: Callable[..., Answer], runs: Callable[[str], Run], monkeypatch: pytest.MonkeyPatch
):
    opened = engines.open_all

    def poisoned(wanted: Any) -> Any:
        found = opened(wanted)
        with torch.no_grad():
            found.base.model.get_input_embeddings().weight.fill_(torch.nan)
        return found

    monkeypatch.setattr(engines, "open_all", poisoned)
    answer = generate("x", "--adapter", runs("llama").folder, "--json")
    assert answer.code == 4
    first, last = lines(answer)
    assert (first["finish_reason"], first["text"]) == ("failed", "")
    assert (last["ok"], last["exit_code"]) == (False, 4)


# -- stopped ---------------------------------------------------------------------------------------------------------


def test_ctrl_c_shows_what_is_there(
    generate: Callable[..., Answer], runs: Callable[[str], Run], monkeypatch: pytest.MonkeyPatch
):
    from dynlora_cli.decoding import write

    take, count = write.Row.take, [0]

    def interrupted(self: Any, token: int, room: int) -> str:
        count[0] += 1
        if count[0] == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return take(self, token, room)

    whole = generate("sort: b a -> ", "--adapter", runs("llama").folder)
    monkeypatch.setattr(write.Row, "take", interrupted)
    answer = generate("sort: b a -> ", "--adapter", runs("llama").folder)
    assert answer.code == 130
    assert answer.out.endswith("\n")
    assert len(answer.out) > 1
    assert whole.out.startswith(answer.out.removesuffix("\n"))
    assert "interrupted" in answer.err
    count[0] = 0
    first, last = lines(generate("sort: b a -> ", "--adapter", runs("llama").folder, "--json"))
    assert (first["finish_reason"], first["tokens"]) == ("cancelled", 3)
    assert last == {"ok": False, "error": "interrupted"}


@pytest.mark.slow
def test_ctrl_c_ends_a_real_process(runs: Callable[[str], Run]):
    command = [
        sys.executable,
        "-m",
        "dynlora_cli",
        "generate",
        "x",
        "--base",
        str(runs("llama").recipe.parent / "llama"),
    ]
    process = subprocess.Popen([*command, "--max-new-tokens", "120"], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.read(1)  # it writes
    process.send_signal(signal.SIGINT)
    began = time.monotonic()
    process.communicate(timeout=60)
    assert process.returncode in (0, 130), "130 unless it had ended before"
    assert time.monotonic() - began < 20


@pytest.mark.slow
def test_a_reader_that_goes_is_no_error(runs: Callable[[str], Run]):
    command = f"{sys.executable} -m dynlora_cli generate x --adapter {runs('llama').folder} --max-new-tokens 60"
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {command} | head -c 1"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert "BrokenPipe" not in done.stderr


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="only Linux has it")
@pytest.mark.parametrize("how", [[], ["--json"]], ids=" ".join)
def test_a_full_disk(how: list[str], generate: Callable[..., Answer], runs: Callable[[str], Run], monkeypatch: Any):
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        answer = generate("x", "--adapter", runs("llama").folder, *how)
    assert answer.code == 3
    assert "error: stdout cannot be written (No space left on device)" in answer.err


def test_stdout_that_cannot_write_an_answer(tmp_path: Path):
    with open(tmp_path / "out", "w", encoding="ascii") as out, pytest.raises(MachineError) as at:
        write(out, "caf\u00e9")
    assert "stdout is ascii, which cannot write 'é'" in at.value.message


@pytest.mark.parametrize("closed", ["stdin", "stdout", "stderr"])
def test_closed_streams(
    closed: str, generate: Callable[..., Answer], runs: Callable[[str], Run], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(sys, closed, None)  # as Python has it behind `>&-`
    answer = generate("-" if closed == "stdin" else "x", "--adapter", runs("llama").folder)
    getattr(sys, closed).close()  # what stands in its place
    assert answer.code == (2 if closed == "stdin" else 0)
    assert "Traceback" not in answer.err


def test_an_adapter_that_is_called_base(generate: Callable[..., Answer], plain: Path, tmp_path: Path):
    called = shutil.copytree(plain, tmp_path / "odd" / "base")
    (line,) = lines(generate("x", "--adapter", called, "--use", "odd/base", "--json"))
    assert line["mix"] == {"odd/base": 1.0}
