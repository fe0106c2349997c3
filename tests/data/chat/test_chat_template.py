"""The day on which a run writes its rows, and what a chat template leaves out."""

from __future__ import annotations

import json
from pathlib import Path
from threading import Event, Thread
from types import SimpleNamespace
from typing import Any

import pytest
from data_helpers import CHATML, byte_tokenizer, dataset, task_named
from pico import pico_recipe
from tiny_run import train

from dynlora_cli.commands import evaluate
from dynlora_cli.config.load import load_recipe
from dynlora_cli.data.chat import template as chat_template
from dynlora_cli.data.chat.template import Writing
from dynlora_cli.data.example_view import show_example
from dynlora_cli.data.load import Data, load_data
from dynlora_cli.errors import DataError, Interrupted
from dynlora_cli.evaluation import options

DATED = "<|im_start|>system\nToday: {{ strftime_now('%d %b %Y %H:%M') }}<|im_end|>\n" + CHATML
THEN = "2026-01-02T03:04:05+0700"


def read(tmp_path: Path, rows: list[dict[str, Any]], template: str | None, **settings: Any) -> tuple[Data, Any]:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    tokenizer = byte_tokenizer(template)
    writing = settings.pop("writing", None)
    return load_data(dataset(path, **settings), tokenizer, task=task_named(), seed=0, writing=writing), tokenizer


def talk(*turns: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": "a fox"}, *turns], **more}


ANSWER = {"role": "assistant", "content": "the dog"}
CALL = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": {"x": "y"}}}]}

# -- the date ---------------------------------------------------------------------------------------------------------


def test_rows_are_written_on_the_day_the_run_began(tmp_path: Path) -> None:
    data, tokenizer = read(tmp_path, [talk(ANSWER)], DATED, writing=Writing(THEN))
    assert show_example(data.train[0], tokenizer)[0][0].startswith(
        "<|im_start|>system\nToday: 02 Jan 2026 03:04<|im_end|>"
    )
    assert any("writes the date: it is 2026-01-02" in note for note in data.notes)
    today, _ = read(tmp_path, [talk(ANSWER)], DATED)
    assert today.sha256 != data.sha256
    assert read(tmp_path, [talk(ANSWER)], DATED, writing=today.writing)[0].sha256 == today.sha256


def test_the_clock_of_templates_goes_on_behind_the_block() -> None:
    tokenizer = byte_tokenizer("{{ strftime_now('%Y') }}")
    before = tokenizer.apply_chat_template([ANSWER], tokenize=False)
    with chat_template.on_date(Writing("1999-01-01T00:00:00+0000").moment):
        assert tokenizer.apply_chat_template([ANSWER], tokenize=False) == "1999"
    assert tokenizer.apply_chat_template([ANSWER], tokenize=False) == before != "1999"


def test_the_clock_of_templates_stands_still_in_one_thread_alone() -> None:
    tokenizer = byte_tokenizer("{{ strftime_now('%Y') }}")
    inside, leave = Event(), Event()
    seen: list[str] = []

    def year() -> str:
        return str(tokenizer.apply_chat_template([ANSWER], tokenize=False))

    def other() -> None:
        with chat_template.on_date(Writing("1999-01-01T00:00:00+0000").moment):
            inside.set()
            leave.wait(10)
            seen.append(year())

    before, thread = year(), Thread(target=other)
    thread.start()
    assert inside.wait(10)
    assert year() == before
    with chat_template.on_date(Writing("1998-01-01T00:00:00+0000").moment):
        assert year() == "1998"
        leave.set()
        thread.join()
        assert (seen, year()) == (["1999"], "1998")
    assert year() == before


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        (
            {"data": {"date": THEN, "turned": {"completion": True}}, "started": "2020"},
            Writing(THEN, {"completion": True}),
        ),
        ({"started": THEN, "recipe": {"dataset": {"x": 1}}}, Writing(THEN, {"completion": False, "alpaca": True})),
    ],
    ids=["its own", "of version 0.1"],
)
def test_how_a_run_wrote_its_rows(record: dict[str, Any], expected: Writing) -> None:
    assert Writing.of(record) == expected


@pytest.mark.parametrize("record", [{}, {"started": THEN}, {"data": {"date": "yesterday"}}])
def test_a_record_that_says_nothing_is_of_today(record: dict[str, Any]) -> None:
    assert Writing.of(record).moment.year > 2000


def test_a_run_goes_on_and_is_measured_on_another_day(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [talk({"role": "assistant", "content": f"done {n}"}) for n in range(30)]
    for number, row in enumerate(rows):
        row["messages"][0] = {"role": "user", "content": f"sort {number}"}
    (tmp_path / "chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {"train": [str(tmp_path / "chat.jsonl")], "val_size": 0.2, "max_length": 96}
    settings |= {"chat_template": "{{ mode }}" + DATED, "chat_template_kwargs": {"mode": "x"}, "system": "y"}
    recipe = load_recipe(pico_recipe(tmp_path, dataset=settings))
    with monkeypatch.context() as patch:
        patch.setattr(chat_template, "time", SimpleNamespace(strftime=lambda form: THEN))
        with pytest.raises(Interrupted):
            train(recipe, interrupt_at=2)
    train(recipe, resume=True)
    record = json.loads((Path(recipe.output_dir) / "dynlora.json").read_text())
    assert record["data"]["date"] == THEN
    assert record["started"] != THEN
    kept = Writing.of(record)
    assert (kept.template_kwargs, kept.system, kept.reasoning) == ({"mode": "x"}, "y", "keep")
    report = evaluate.run([Path(recipe.output_dir)], None, options.Options(generate=0, samples=0), lambda line: None)
    assert not [note for note in report["notes"] if "have changed" in note or "among them" in note]
    assert report["data"]["sha256"] == record["data"]["sha256"]


@pytest.mark.parametrize("draw", ["{{ ['a', 'b'] | random }}", "{{ lipsum(1) }}"])
def test_a_template_that_draws_at_random_is_refused(tmp_path: Path, draw: str) -> None:
    with pytest.raises(DataError, match="draws at random"):
        read(tmp_path, [talk(ANSWER)], CHATML + draw)


# -- what a template leaves out ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("field", ["tool_calls", "function_call"])
@pytest.mark.parametrize("said", ["", "let me see"])
def test_a_template_that_leaves_out_calls_is_refused(tmp_path: Path, field: str, said: str) -> None:
    call = {
        "role": "assistant",
        "content": said,
        field: CALL["tool_calls"][0]["function"] if field == "function_call" else CALL["tool_calls"],
    }
    with pytest.raises(
        DataError, match=r"rows\.jsonl:2: the chat template leaves out 'tool_calls'.*set dataset\.chat_template"
    ):
        read(tmp_path, [talk(ANSWER), talk(call, ANSWER)], CHATML)


@pytest.mark.parametrize(
    ("row", "template", "lost"),
    [
        (talk(ANSWER), CHATML, None),
        (talk(ANSWER, tools=[{"name": "f"}]), CHATML, "'tools'"),
        (talk(ANSWER | {"name": "Ann"}), CHATML, "'name' of role 'assistant'"),
        (talk(ANSWER | {"name": "Ann"}), CHATML.replace("{{ m.role }}", "{{ m.role }}{{ m.name }}"), None),
        (
            {"messages": [{"role": "system", "content": "think"}, *talk(ANSWER)["messages"]]},
            "{% for m in messages %}{% if m.role != 'system' %}{{ m.content }}<|im_end|>{% endif %}{% endfor %}",
            "messages of role 'system'",
        ),
        (
            talk(CALL, {"role": "tool", "content": "over", "tool_call_id": "1"}, ANSWER),
            "{% for m in messages %}{% if m.role != 'tool' %}{{ m.content }}{{ m.tool_calls }}<|im_end|>{% endif %}{% endfor %}",
            "messages of role 'tool'",
        ),
        (
            talk(CALL | {"content": "let me see"}, ANSWER),
            "{% for m in messages %}{{ m.tool_calls or m.content }}<|im_end|>{% endfor %}",
            "what the assistant says beside a call",
        ),
    ],
)
def test_what_a_template_leaves_out_is_named(
    tmp_path: Path, row: dict[str, Any], template: str, lost: str | None
) -> None:
    (tmp_path / "chat.jinja").write_text(template)
    data, _ = read(tmp_path, [row] * 3, None, chat_template=str(tmp_path / "chat.jinja"))
    notes = [note for note in data.notes if "leaves out" in note]
    assert notes == (
        []
        if lost is None
        else [f"dataset.chat_template ({tmp_path / 'chat.jinja'}) leaves out {lost}: nothing is learned from that"]
    )


def test_a_field_that_is_shown_in_some_places_is_not_left_out(tmp_path: Path) -> None:
    """Thinking of earlier turns is taken out by many templates, that of the last turn is not."""
    template = CHATML.replace(
        "{{ m.content }}", "{% if loop.last %}{{ m.reasoning_content }}{% endif %}{{ m.content }}"
    )
    thought = ANSWER | {"reasoning_content": "hm"}
    early, late = talk(thought, {"role": "user", "content": "and?"}, ANSWER), talk(thought)
    for rows in ([early], [early, late]):
        assert not any("nothing is learned" in note for note in read(tmp_path, rows, template)[0].notes)


def test_rows_of_one_kind_are_looked_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = []
    usual = chat_template.write
    monkeypatch.setattr(chat_template, "write", lambda *a, **k: written.append(1) or usual(*a, **k))
    read(tmp_path, [talk(ANSWER)] * 50, CHATML)
    assert len(written) <= 2 + 2  # a look at each role's content
