"""Forgetting as a number: rows of other kinds before and after a run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from also_helpers import loss_in_double, sums, with_also
from cli_helpers import Dynlora
from eval_helpers import by_peft
from tiny_run import lines, make_recipe, train
from transformers import AutoModelForCausalLM, AutoTokenizer

from dynlora_cli.commands import preflight
from dynlora_cli.errors import DataError, Interrupted, MeasureError, RecipeError, UsageError
from dynlora_cli.evaluation.also import RowSet, forgotten, picks
from dynlora_cli.runs.folder import read_record

# -- the number ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_before_and_after_are_what_peft_computes_in_fp64(tmp_path: Path):
    recipe = with_also(tmp_path)
    summary, _ = train(recipe)
    rows = sums(tmp_path / "sums.jsonl")
    base, out = tmp_path / "llama", tmp_path / "out"
    tokenizer = AutoTokenizer.from_pretrained(out)
    before = loss_in_double(AutoModelForCausalLM.from_pretrained(base), tokenizer, rows)
    after = loss_in_double(by_peft(base, out), tokenizer, rows)
    found = summary["also"]["sums"]
    assert found["before"] == pytest.approx(before, abs=2e-6)
    assert found["after"] == pytest.approx(after, abs=2e-6)
    assert abs(after - before) > 1e-3
    assert found["forgetting"] == summary["forgetting"] == found["after"] - found["before"]
    assert (found["rows"], found["targets"]) == (24, sum(len(row["completion"]) + 1 for row in rows))
    assert read_record(out)["summary"]["also"] == summary["also"]


@pytest.mark.slow
def test_a_run_that_only_learns_words_forgets_sums(tmp_path: Path):
    # First the sums are learned; then a run that goes on from that model learns words.
    first = make_recipe(tmp_path, "adapter.variant=full", "train.learning_rate=1e-2", "train.max_steps=60",
                        f"dataset.train=[{sums_file(tmp_path)}]", out="learned")  # fmt: skip
    learned, _ = train(first)
    assert learned["loss_after"] < learned["loss_before"] - 1
    recipe = with_also(tmp_path, f"model.name_or_path={tmp_path / 'learned'}", "train.max_steps=30")
    summary, _ = train(recipe)
    assert summary["loss_after"] < summary["loss_before"]
    assert summary["forgetting"] > 0.1


def sums_file(folder: Path) -> Path:
    sums(folder / "sums.jsonl")
    return folder / "sums.jsonl"


def test_the_largest_of_several_sets(tmp_path: Path):
    one, other = RowSet("one", [], "a"), RowSet("other", [], "b")
    before = {"one": one.measured(2.0), "other": other.measured(3.0)}
    after = {"one": one.measured(2.5), "other": other.measured(2.75)}
    found = forgotten(before, after)
    assert found["forgetting"] == 0.5
    assert [set_["forgetting"] for set_ in found["also"].values()] == [0.5, -0.25]
    assert forgotten({}, {}) == {"also": {}, "forgetting": None}


@pytest.mark.slow
def test_a_run_without_sets_measures_nothing_else(tmp_path: Path):
    summary, events = train(make_recipe(tmp_path, "eval.also=[]"))
    assert summary["also"] == {}
    assert summary["forgetting"] is None
    assert not [event for event in events if event["event"] == "also"]


@pytest.mark.slow
def test_the_rows_are_the_same_whatever_their_order(tmp_path: Path):
    train(with_also(tmp_path, rows=10))
    first = read_record(tmp_path / "out")["summary"]["also"]["sums"]
    recipe = with_also(tmp_path, f"output_dir={tmp_path / 'again'}", rows=10)
    path = tmp_path / "sums.jsonl"
    path.write_text("".join(reversed(path.read_text().splitlines(keepends=True))))
    second = train(recipe)[0]["also"]["sums"]
    assert first["rows"] == second["rows"] == 10
    assert first["targets"] == second["targets"]
    assert first["before"] == pytest.approx(second["before"], abs=1e-6)


def test_picks_keeps_the_order_and_takes_all_of_a_few():
    class Row:
        def __init__(self, number: int) -> None:
            self.input_ids = self.label_ids = [number]
            self.token_types = None

    rows = [Row(number) for number in range(20)]
    assert picks(rows, 20) == picks(rows, 50) == list(range(20))
    some = picks(rows, 5)
    assert some == sorted(some)
    turned = [rows[::-1][index].input_ids[0] for index in picks(rows[::-1], 5)]
    assert sorted(turned) == [rows[index].input_ids[0] for index in some]


# -- in a run --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_it_does_not_change_what_is_learned(tmp_path: Path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    train(make_recipe(tmp_path / "a", "train.learning_rate=2e-2", "adapter.dropout=0.1"))
    train(with_also(tmp_path / "b", "adapter.dropout=0.1"))
    logs = [lines(tmp_path / name / "out" / "metrics.jsonl") for name in "ab"]
    assert logs[0] == [line for line in logs[1] if line["event"] != "also"]
    assert [line["step"] for line in logs[1] if line["event"] == "also"] == [0, 12]


@pytest.mark.slow
def test_a_resumed_run_has_what_was_before(tmp_path: Path):
    whole, _ = train(with_also(tmp_path, f"output_dir={tmp_path / 'whole'}"))
    recipe = with_also(tmp_path)
    with pytest.raises(Interrupted):
        train(recipe, interrupt_at=6)
    resumed, events = train(recipe, resume=True)
    assert resumed["also"] == whole["also"]
    assert [event["step"] for event in events if event["event"] == "also"] == [12]


@pytest.mark.slow
def test_rows_that_changed_while_the_run_stood_still(tmp_path: Path):
    recipe = with_also(tmp_path)
    with pytest.raises(Interrupted):
        train(recipe, interrupt_at=6)
    sums(tmp_path / "sums.jsonl", 20)
    summary, events = train(recipe, resume=True)
    assert summary["also"] == {}
    assert summary["forgetting"] is None
    notes = [event["text"] for event in events if event["event"] == "note"]
    assert any("forgetting on sums is not measured" in note for note in notes)


@pytest.mark.slow
def test_the_best_state_is_measured_where_it_is_the_one_that_is_kept(tmp_path: Path):
    # At this rate the run breaks after its best step.
    recipe = with_also(tmp_path, "eval.early_stopping_patience=9", "eval.steps=1", "train.learning_rate=0.3",
                       "train.lr_scheduler=constant")  # fmt: skip
    summary, _ = train(recipe)
    assert summary["adapter"] == "best"
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    after = loss_in_double(by_peft(tmp_path / "llama", tmp_path / "out"), tokenizer, sums(tmp_path / "sums.jsonl"))
    assert summary["also"]["sums"]["after"] == pytest.approx(after, rel=1e-5)


def test_prompts_that_are_trained_on_are_counted(tmp_path: Path):
    recipe = make_recipe(tmp_path, f"eval.also=[{{name: same, path: {tmp_path / 'llama.jsonl'}}}]")
    _, (start, *_) = train(recipe)
    assert any(note.startswith("same: 32 of 40 rows have a prompt that is also trained on") for note in start["notes"])


def test_text_and_classes(tmp_path: Path):
    (tmp_path / "story.txt").write_text("Once upon a time there was a word. " * 30)
    summary, _ = train(make_recipe(tmp_path, f"eval.also=[{{name: story, path: {tmp_path / 'story.txt'}}}]"))
    assert summary["also"]["story"]["targets"] > 900
    (tmp_path / "more.jsonl").write_text(
        '{"text": "few 1: a", "label": "few"}\n{"text": "many 2: b", "label": "many"}\n'
    )
    recipe = make_recipe(tmp_path, f"eval.also=[{{name: more, path: {tmp_path / 'more.jsonl'}}}]", kind="bert", out="b")
    assert train(recipe)[0]["also"]["more"]["targets"] == 2


def test_a_loss_that_is_no_number_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from dynlora_cli.training import held_out as module

    real = module.held_out
    monkeypatch.setattr(module, "held_out", lambda *a, **k: real(*a, **k) | {"loss": float("nan")})
    with pytest.raises(MeasureError, match=r"loss on sums \(eval\.also\) is nan after step 0"):
        train(with_also(tmp_path, "dataset.val_size=0", "eval.steps=null"))


# -- mistakes --------------------------------------------------------------------------------------------------------


def test_mistakes_in_the_recipe(tmp_path: Path):
    for text, said in (
        ("[{name: a, path: x.jsonl}, {name: a, path: y.jsonl}]", "two sets are called 'a'"),
        ("[{path: x.jsonl}]", "eval.also.0.name: missing"),
        ("[{name: a, path: x.jsonl, row: 3}]", "unknown key; did you mean 'rows'?"),
        ("[{name: a, path: x.jsonl, rows: 0}]", "must be a whole number, at least 1"),
        ("3", "a list"),
    ):
        with pytest.raises(RecipeError) as caught:
            make_recipe(tmp_path, f"eval.also={text}")
        assert said in caught.value.message


def test_a_missing_file_is_answered_before_anything_loads(tmp_path: Path):
    recipe = make_recipe(tmp_path, f"eval.also=[{{name: law, path: {tmp_path / 'law.jsonl'}}}]")
    with pytest.raises(UsageError, match=r"^eval\.also, law: no file or folder .*law\.jsonl"):
        preflight.training(recipe, writes=True)


def test_rows_that_cannot_be_read_are_named_with_their_set(tmp_path: Path):
    (tmp_path / "odd.jsonl").write_text('{"x": 1}\n')
    with pytest.raises(DataError, match=r"eval\.also, odd: .*no format fits"):
        train(make_recipe(tmp_path, f"eval.also=[{{name: odd, path: {tmp_path / 'odd.jsonl'}}}]"))


# -- what people see -------------------------------------------------------------------------------------------------


def test_the_terminal_the_report_and_the_card(tmp_path: Path, dynlora: Dynlora):
    recipe = with_also(tmp_path)
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe.model_dump(mode="json")))
    answer = dynlora("train", tmp_path / "recipe.yaml")
    assert answer.code == 0, answer.err
    found = read_record(tmp_path / "out")["summary"]["also"]["sums"]
    assert f"also   0/12  sums {found['before']:.4f}" in answer.err
    for text in (answer.err, (tmp_path / "out/README.md").read_text(), (tmp_path / "out/report.html").read_text()):
        assert "forgetting" in text
        assert f"{found['forgetting']:+.4f}" in text
