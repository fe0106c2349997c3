"""`dynlora adapt` from documents to an adapter: what is left, what goes on after a stop, and what is refused."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from adapt_helpers import SHORT, TEXT, lines, record, with_long_context
from cli_helpers import Answer, contents
from eval_helpers import by_peft
from pico import pico_model
from tiny_run import model_folder

from dynlora_cli import api
from dynlora_cli.documents import writer
from dynlora_cli.documents.begun import Begun
from dynlora_cli.errors import Interrupted, UsageError
from dynlora_cli.execution.interrupt import ask_here

Adapt = Callable[..., Answer]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model without a chat template."""
    return with_long_context(model_folder(tmp_path_factory.mktemp("base")))


@pytest.fixture(scope="module")
def chat_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return with_long_context(pico_model(tmp_path_factory.mktemp("chat")))


@pytest.fixture
def document(tmp_path: Path) -> Path:
    path = tmp_path / "velden.md"
    path.write_text(TEXT)
    return path


@pytest.fixture
def adapt(dynlora: Callable[..., Answer], base: Path, document: Path, tmp_path: Path) -> Adapt:
    """Runs `dynlora adapt` into tmp_path/a with three steps."""

    def run(*arguments: object, model: Path = base) -> Answer:
        given = ("--model", model, "--document", document, "--out", tmp_path / "a", *SHORT, "--json")
        return dynlora("adapt", *given, *arguments)

    return run


def test_a_model_that_cannot_be_asked_learns_the_sentences(adapt: Adapt, base: Path, document: Path, tmp_path: Path):
    done = adapt()
    assert done.code == 0, done.err
    out = tmp_path / "a"
    rows = lines(out / "rows.jsonl") + lines(out / "held_out.jsonl")
    assert len(rows) == 4
    assert all(row["prompt"] + row["completion"] in TEXT for row in rows)
    assert all(row["context"] in TEXT for row in rows)
    found = done.json
    adapted = found["adapted"]
    assert adapted == record(out)["adapted"]
    (one,) = adapted["documents"]
    assert (one["name"], one["characters"], one["chunks"]) == ("velden.md", len(TEXT), 1)
    assert (adapted["rows"], adapted["held_out"]) == (3, 1)
    assert found["loss_before"] > 0
    assert adapted["loss_with_document"] > 0
    assert found["peft_check"]["checked"]
    assert any("chat --adapter" in command for command in found["next"])
    # a plain adapter, which stock PEFT loads and which says something else than the base
    ids = torch.tensor([[5, 6, 7]])
    model = by_peft(base, out)
    with torch.no_grad():
        with model.disable_adapter():
            before = model(ids).logits
        assert not torch.equal(model(ids).logits, before)
    card = (out / "README.md").read_text()
    assert "velden.md" in card
    assert "What it was made from" in card
    assert "velden.md" in (out / "report.html").read_text()
    assert (out / "recipe.yaml").is_file()
    assert not Begun(out).folder.exists()


@pytest.mark.parametrize("layout", ["{context}\n\n{prompt}", "{prompt} by {context}: "])
def test_the_loss_with_the_document_is_that_of_the_teacher(adapt: Adapt, base: Path, tmp_path: Path, layout: str):
    """Against transformers: the mean over the answer's tokens, with chunk, blank line and prompt before them."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    found = adapt("--set", f"train.context_layout={json.dumps(layout)}").json["adapted"]["loss_with_document"]
    model, tokenizer = AutoModelForCausalLM.from_pretrained(base), AutoTokenizer.from_pretrained(base)
    total = targets = 0.0
    for row in lines(tmp_path / "a" / "held_out.jsonl"):
        prompt = tokenizer(layout.format(context=row["context"], prompt=row["prompt"])).input_ids
        answer = [*tokenizer(row["completion"], add_special_tokens=False).input_ids, tokenizer.eos_token_id]
        with torch.no_grad():
            logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
        total += torch.nn.functional.cross_entropy(logits.double(), torch.tensor(answer), reduction="sum").item()
        targets += len(answer)
    assert found == pytest.approx(total / targets, rel=1e-5)


def test_a_base_in_bfloat16(adapt: Adapt, tmp_path: Path):
    """On a CPU its autocast takes no fp16, in which the teacher's probabilities are kept."""
    done = adapt("--set", "model.dtype=bfloat16")
    assert done.code == 0, done.err
    assert record(tmp_path / "a")["dtype"] == "bfloat16"


def test_a_text_without_sentences_and_with_marks(adapt: Adapt, chat_base: Path, document: Path):
    from transformers import AutoTokenizer

    end = AutoTokenizer.from_pretrained(chat_base).eos_token
    document.write_text("\u6771\u4eac\u306f\u65e5\u672c\u306e\u9996\u90fd" * 100 + f"\n\n{TEXT} They wrote {end} last.")
    done = adapt("--answer-tokens", 4, model=chat_base)
    assert done.code == 0, done.err
    assert f"the documents hold {end}, which this model reads as marks" in done.err


def given_rows(folder: Path, *, answers: bool) -> Path:
    path = folder / "given.jsonl"
    rows = [{"prompt": f"Who was keeper {number}?", "completion": "Ines"} for number in range(5)]
    path.write_text("".join(json.dumps(row if answers else {"prompt": row["prompt"]}) + "\n" for row in rows))
    return path


def test_rows_that_are_given_and_answered_by_the_model(adapt: Adapt, chat_base: Path, tmp_path: Path):
    done = adapt("--data", given_rows(tmp_path, answers=False), model=chat_base)
    assert done.code == 0, done.err
    found = done.json["adapted"]
    assert found["questions"].startswith("given.jsonl (sha256 ")
    assert found["answers"] == str(chat_base)
    rows = lines(tmp_path / "a" / "rows.jsonl")
    assert {row["prompt"] for row in rows} < {f"Who was keeper {number}?" for number in range(5)}
    assert all(row["completion"] for row in rows)
    # the answers are what the model says with the chunk before it
    with api.load(tmp_path / "a") as loaded:
        row = rows[0]
        said = loaded.generate(f"{row['context']}\n\n{row['prompt']}", use="base", max_new_tokens=8)
    assert str(said).strip().startswith(row["completion"])


def test_given_answers_are_kept(adapt: Adapt, chat_base: Path, tmp_path: Path):
    done = adapt("--data", given_rows(tmp_path, answers=True), model=chat_base)
    assert done.code == 0, done.err
    assert {row["completion"] for row in lines(tmp_path / "a" / "rows.jsonl")} == {"Ines"}
    assert done.json["adapted"]["answers"].startswith("given.jsonl")


def test_a_model_that_can_be_asked_writes_requests(
    adapt: Adapt, chat_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """This one is random and writes nothing of use, so its words are put in its mouth; the answers are its own."""
    spoken = iter(range(1000))
    monkeypatch.setattr(writer, "read_request", lambda *_: f"Who kept the light in year {next(spoken)}?")
    done = adapt(model=chat_base)
    assert done.code == 0, done.err
    rows = lines(tmp_path / "a" / "rows.jsonl") + lines(tmp_path / "a" / "held_out.jsonl")
    assert sorted(row["prompt"] for row in rows) == [f"Who kept the light in year {number}?" for number in range(4)]
    assert done.json["adapted"]["questions"] == done.json["adapted"]["answers"] == str(chat_base)


def test_chunks_that_are_added(adapt: Adapt, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    chunks = ("--chunk-tokens", 120, "--add-chunks", "--budget", 3)
    with monkeypatch.context() as patched:
        patched.setattr("dynlora_cli.documents.added.read_adapter", Mock(side_effect=KeyboardInterrupt))
        stopped = adapt(*chunks)
    assert (stopped.code, stopped.json["hint"]) == (130, "go on with --resume")
    done = adapt(*chunks, "--resume")
    assert done.code == 0, done.err
    out, found = tmp_path / "a", done.json
    assert found["adapted"]["chunks_added"]
    assert found["adapted"]["documents"][0]["chunks"] == len(found["adapters"]) > 1
    assert found["parameters"] <= found["parameters_start"]
    # measured as `eval` measures it, which finds the rows by the run folder alone
    again = api.evaluate(out, generate=0)
    assert again.losses["a"] == pytest.approx(found["loss_after"], rel=1e-5)
    assert again.losses["base"] == pytest.approx(found["loss_before"], rel=1e-5)
    assert by_peft(base, out)
    assert "put side by side" in (out / "README.md").read_text()
    assert adapt(*chunks, "--resume").json["loss_after"] == found["loss_after"]


# -- stops -----------------------------------------------------------------------------------------------------------


def test_rows_are_gone_on_with_in_another_process(
    adapt: Adapt, chat_base: Path, document: Path, tmp_path: Path, warm: Path, monkeypatch: pytest.MonkeyPatch
):
    data = ("--data", given_rows(tmp_path, answers=False))
    whole = adapt(*data, model=chat_base)
    assert whole.code == 0, whole.err
    rows = (tmp_path / "a" / "rows.jsonl").read_text()
    weights = (tmp_path / "a" / "adapter_model.safetensors").read_bytes()

    answer = writer.Writer.answer

    def stopped(self: writer.Writer, chunk: Any, prompts: list[str]) -> list[str]:
        answer(self, chunk, prompts)
        raise Interrupted("stopped", "add --resume")

    monkeypatch.setattr(writer.Writer, "answer", stopped)
    out = tmp_path / "b"
    arguments = ["adapt", "--model", chat_base, "--document", document, "--out", out, *SHORT, *data]
    with pytest.raises(Interrupted):
        api.adapt(chat_base, document, out=out, **options_of(data))
    assert not out.exists()
    assert (Begun(out).folder / "chunk-00001.json").is_file()
    monkeypatch.undo()

    again = subprocess.run([warm, *map(str, arguments)], capture_output=True, text=True, check=False)
    assert again.returncode == 2
    assert "add --resume to go on with them, or --overwrite" in again.stderr
    other = subprocess.run(
        [warm, *map(str, arguments), "--resume", "--set", "seed=3"], capture_output=True, text=True, check=False
    )
    assert other.returncode == 2
    assert "other documents or options" in other.stderr
    done = subprocess.run([warm, *map(str, arguments), "--resume"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (out / "rows.jsonl").read_text() == rows
    assert (out / "adapter_model.safetensors").read_bytes() == weights
    assert not Begun(out).folder.exists()


def options_of(data: tuple[object, ...]) -> dict[str, Any]:
    """SHORT and `--data FILE`, as Python has them."""
    settings = {"train.max_steps": 3, "train.learning_rate": 1e-2, "eval.samples": 0, "train.micro_batch_size": 4}
    return {"questions": 4, "answer_tokens": 8, "set": settings, "data": data[1], "progress": None}


def test_training_is_gone_on_with(adapt: Adapt, base: Path, document: Path, tmp_path: Path):
    whole = adapt()
    assert whole.code == 0, whole.err
    out = tmp_path / "b"

    def interrupts(event: dict[str, Any]) -> None:
        if event["event"] == "tick" and event["step"] == 1:
            os.kill(os.getpid(), signal.SIGINT)

    how = options_of(("--data", None)) | {"progress": interrupts}
    with pytest.raises(Interrupted):
        api.adapt(base, document, out=out, **how)
    assert (out / "rows.jsonl").is_file()
    assert not Begun(out).folder.exists()
    with pytest.raises(UsageError, match="holds a run that was stopped") as caught:
        api.adapt(base, document, out=out, **how)
    assert "--resume" in (caught.value.hint or "")
    run = api.adapt(base, document, out=out, resume=True, **how | {"progress": None})
    assert run.summary["loss_after"] == whole.json["loss_after"]
    assert contents(out)["adapter_model.safetensors"] == contents(tmp_path / "a")["adapter_model.safetensors"]
    assert record(out)["adapted"]["documents"] == record(tmp_path / "a")["adapted"]["documents"]
    # finished: nothing happens
    once_more = api.adapt(base, document, out=out, resume=True, **how | {"progress": None})
    assert once_more.summary["loss_after"] == run.summary["loss_after"]
    # nor with another document
    other = tmp_path / "other.txt"
    other.write_text(TEXT.replace("Ines", "Olaf"))
    with pytest.raises(Exception, match="made from other documents"):
        api.adapt(base, other, out=out, resume=True, **how | {"progress": None})
    for otherwise in ({"questions": 5}, {"add_chunks": True}, {"answer_tokens": 9}):
        with pytest.raises(UsageError, match="asked for with other options"):
            api.adapt(base, document, out=out, resume=True, **how | {"progress": None} | otherwise)


def test_ctrl_c_while_a_loss_is_measured(adapt: Adapt, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(writer.Writer, "loss", lambda *_: float(ask_here()))
    done = adapt()
    assert done.code == 130
    assert not (tmp_path / "a").exists()
    monkeypatch.undo()
    assert adapt("--resume").code == 0


def test_an_earlier_run_stays_until_the_new_one_has_its_rows(
    adapt: Adapt, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    assert adapt().code == 0
    before = contents(tmp_path / "a")
    assert adapt().code == 2

    def stopped(*_: Any) -> None:
        raise Interrupted("stopped", "add --resume")

    monkeypatch.setattr(writer.Writer, "loss", stopped)
    assert adapt("--overwrite").code == 130
    assert contents(tmp_path / "a") == before
    monkeypatch.undo()
    done = adapt("--resume")
    assert done.code == 0, done.err
    assert record(tmp_path / "a")["adapted"]["id"] != json.loads(before["dynlora.json"])["adapted"]["id"]


# -- what others make of it ------------------------------------------------------------------------------------------


def test_a_library_finds_its_keys_by_itself(adapt: Adapt, dynlora: Callable[..., Answer], tmp_path: Path):
    assert adapt().code == 0
    added = dynlora("library", "add", tmp_path / "lib", "--adapter", tmp_path / "a", "--json")
    assert added.code == 0, added.err
    update = added.json["update"]
    assert update["keys"] > 3  # the prompts, and the document
    assert [(one["kind"], Path(one["path"]).name) for one in update["sources"]] == [
        ("rows", "rows.jsonl"),
        ("documents", "velden.md"),
    ]
    assert update["held_out"] == 1


def test_a_plan_writes_nothing(adapt: Adapt, tmp_path: Path):
    before = sorted(tmp_path.rglob("*"))
    done = adapt("--dry-run")
    assert done.code == 0, done.err
    plan = done.json["plan"]
    assert (plan["documents"][0]["name"], plan["chunks"], plan["rows"], plan["budget"]) == ("velden.md", 1, 4, 8)
    assert f"dynlora train {tmp_path / 'a' / 'recipe.yaml'} --dry-run" in " ".join(done.err.split())
    assert sorted(tmp_path.rglob("*")) == before


# -- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--resume",), "nothing was begun"),
        (("--document", ""), "'' names no file"),
        (("--resume", "--overwrite"), "exclude each other"),
        (("--budget", "many"), "--budget many"),
        (("--set", "train.nonsense=1"), "train.nonsense"),
        (("--set", "dataset.train=[rows.jsonl]"), "the rows of `adapt` are those that are written"),
        (("--set", "output_dir=x"), "--out says where"),
        (("--set", "train.objective=sft"), "for others: dynlora train"),
        (("--set", "adapter.variant=doc-to-lora"), "a network that writes adapters"),
        (("--set", "model.name_or_path=other"), "--model says"),
        (("--set", "train.context_layout='{prompt}'"), "train.context_layout: must hold"),
        (("--questions", 2), "three at least are needed"),
        (("--columns", "prompt=question"), "add --data FILE"),
        (("--data", "none.jsonl"), "no file or folder none.jsonl"),
        (("--document", "none.txt"), "no file or folder ./none.txt"),
        (("--chunk-tokens", 5000), "is the most"),
        (("--answer-tokens", 1020), "allow shorter ones"),
        (("--add-chunks", "--set", "adapter.variant=dora"), "adapter.variant=dora is not that"),
        (("--add-chunks", "--budget", "200kB"), "to a number of parameters, and rank.budget is 200kB"),
    ],
)
def test_what_cannot_be(adapt: Adapt, tmp_path: Path, arguments: tuple[object, ...], words: str):
    done = adapt(*arguments)
    assert done.code == 2
    assert words in done.json["error"] + (done.json["hint"] or "")
    assert not (tmp_path / "a").exists()
    assert not Begun(tmp_path / "a").folder.exists()


def test_a_document_that_says_next_to_nothing(adapt: Adapt, document: Path, tmp_path: Path):
    document.write_text("Nothing here.")
    done = adapt()
    assert done.code == 2
    assert "0 rows could be written" in done.json["error"]
    assert not (tmp_path / "a").exists()
    document.write_text(TEXT)
    assert adapt().code == 0  # which is not asked about rows that were begun


def test_wrong_names_are_answered_before_torch_is_loaded(tmp_path: Path, base: Path):
    script = (
        "import sys\n"
        "from dynlora_cli.cli.app import main\n"
        "try:\n"
        f"    main(['adapt', '--model', {str(base)!r}, '--document', 'none.txt', '--out', {str(tmp_path / 'a')!r}])\n"
        "except SystemExit as end:\n"
        "    print(end.code, sorted({'torch', 'transformers', 'datasets'} & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "2 []", done.stderr
