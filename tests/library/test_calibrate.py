"""`library calibrate` and `eval --library` on real adapters of a tiny model: to the bit, and with and without an update."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from cli_helpers import Dynlora, contents
from library_helpers import Made, silent
from tiny_run import write_rows

from dynlora_cli.adapters.attach import attached
from dynlora_cli.commands.evaluate_library import Wanted as Asked
from dynlora_cli.commands.evaluate_library import run as evaluate
from dynlora_cli.evaluation.generation import find_prompts, generate
from dynlora_cli.evaluation.rows import held_out_rows
from dynlora_cli.library import calibrate as calibrating
from dynlora_cli.library.activation import Activator
from dynlora_cli.library.add import add
from dynlora_cli.library.addition import Addition
from dynlora_cli.library.calibrate import Wanted, calibrate
from dynlora_cli.library.calibration import Confidence, Threshold
from dynlora_cli.library.held_out import read_held_out
from dynlora_cli.library.library import Library, library_for_writing
from dynlora_cli.library.loaded import Loaded, load
from dynlora_cli.library.losses import RowLosses
from dynlora_cli.models.quiet import quiet


@pytest.fixture(scope="session")
def strangers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("strangers") / "strangers.jsonl"
    rows = [{"prompt": f"{n * 7919} % {n}? ", "completion": f"{n * 7919 % max(n, 1)}"} for n in range(30)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="session")
def two_once(made_once: Made, strangers: Path, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A calibrated library of two updates, one of which does harm."""
    root = Path(shutil.copytree(made_once.root, tmp_path_factory.mktemp("two") / "lib"))
    rows = write_rows(root.parent / "other.jsonl", 30)
    rows.write_text(rows.read_text().replace(" -> ", " becomes "))
    with quiet:
        add(root, Addition(made_once.other, name="other", data=rows, date="2020-01-01"), silent)
        calibrate(root, Wanted(strangers, rate=0.2), silent)
    return made_once._replace(root=root)


@pytest.fixture
def two(two_once: Made, tmp_path: Path) -> Made:
    return two_once._replace(root=Path(shutil.copytree(two_once.root, tmp_path / "two")))


@pytest.fixture
def loaded(two_once: Made) -> Loaded:
    with quiet:
        return load(two_once.root)


def test_what_is_learned_is_written(two: Made, strangers: Path):
    library = Library.open(two.root)
    kept = library.calibration
    assert kept is not None
    assert kept["entries"] == library.seen == ["first", "other"]
    quality = kept["quality"]
    assert quality["requests"] == {name: library.entry(name).held_out for name in kept["entries"]}
    assert quality["unrelated"] == kept["threshold"]["requests"] == 30
    assert quality["pairs"] == 2 * (30 + sum(quality["requests"].values()))
    assert kept["threshold"] == {
        "evidence": kept["threshold"]["evidence"],
        "rate": 0.2,
        "requests": 30,
        "promised": True,
    }
    page = (two.root / "report.html").read_text()
    assert "Reliability: what was said, and what was true" in page
    assert "Gain against false activations" in page


def test_a_report_is_of_the_calibration_beside_it(two: Made, strangers: Path, monkeypatch: pytest.MonkeyPatch):
    """Also where the process ends between the two."""
    before = Library.open(two.root).calibration

    def end(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(calibrating, "write_text", end)
    with quiet, pytest.raises(KeyboardInterrupt):
        calibrate(two.root, Wanted(strangers, rate=0.5), silent)
    assert Library.open(two.root).calibration != before
    assert not (two.root / "report.html").exists()


def set_threshold(root: Path, evidence: float, at_most: int = 1) -> None:
    with library_for_writing(root) as library:
        kept = dict(library.calibration or {})
        by_score = Confidence((1.0, 0.0, 0.0), 0.0).as_dict()  # a random model has no words to tell requests apart by
        kept |= {"at_most": at_most, "model": by_score, "threshold": kept["threshold"] | {"evidence": evidence}}
        library.put_calibration(kept)


def test_an_update_that_helps_is_active_on_its_rows(two: Made):
    set_threshold(two.root, -1e9)
    report = evaluate(two.root, Asked(), silent)
    own = next(one for one in report["sets"] if one["origin"] == "first")
    assert own["losses"]["first"] < own["losses"]["base"]
    assert own["losses"]["library"] < own["losses"]["base"]
    assert own["active"].keys() <= {"first", "other"}
    assert own["oracle"] <= own["losses"]["library"]
    assert any("calibrated the library too" in note for note in report["notes"])


def test_each_row_has_the_loss_of_what_was_chosen_to_the_bit(two: Made, loaded: Loaded):
    held_out = read_held_out(loaded.library.entry("first"))
    activator = Activator(loaded.library, loaded.encoder)
    found = activator.finder.find([row.text for row in held_out])
    set_threshold(two.root, float(np.median(activator.calibration.judge.background.scores(found.scores_QE).max(1))))
    report = evaluate(two.root, Asked(), silent)
    rows = [row.example for row in held_out]
    measure = RowLosses(loaded.base, rows)
    plain = {"base": measure.of(None, "base")}
    plain |= {name: measure.of(loaded.adapter(name), name) for name in ("first", "other")}
    mine = [one for one in report["decisions"] if one["source"] == "held-out rows of first"]
    assert sum(not one["chosen"] for one in mine) == -(-len(mine) // 2)
    for row, one in enumerate(mine):
        assert one["loss"] == plain[(one["chosen"] or ["base"])[0]][row]
        assert one["base_loss"] == plain["base"][row]


def test_rows_are_measured_alike_whichever_are_wanted(loaded: Loaded):
    rows = [row.example for row in read_held_out(loaded.library.entry("other"))]
    measure = RowLosses(loaded.base, rows, 4)
    every = measure.of(None, "base")
    wanted = np.arange(len(rows)) % 5 == 3
    adapted = measure.of(loaded.adapter("other"), "other", wanted)
    assert (np.isnan(adapted) == ~wanted).all()
    assert (adapted[wanted] == measure.of(loaded.adapter("other"), "other")[wanted]).all()
    assert (measure.of(None, "base") == every).all(), "the base is as it was before"
    assert np.isnan(measure.of(None, "base", np.zeros(len(rows), dtype=bool))).all()


def test_a_removed_update_leaves_nothing(two: Made, made: Made, strangers: Path):
    """Library, decisions, losses and texts are those of a library that never had it, to the bit."""
    with quiet:
        calibrate(made.root, Wanted(strangers, rate=0.2), silent)
        with library_for_writing(two.root) as library:
            assert library.remove("other")
        calibrate(two.root, Wanted(strangers, rate=0.2), silent)
    ours, theirs = contents(two.root), contents(made.root)
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert ours[name].replace(b">two<", b">lib<").replace(b"<title>two ", b"<title>lib ") == theirs[name], name
    asked = Asked((str(made.rows), f"unrelated={strangers}"), max_samples=12)
    one, other = evaluate(two.root, asked, silent), evaluate(made.root, asked, silent)
    assert {**one, "library": ""} == {**other, "library": ""}
    assert answers(two.root) == answers(made.root)


def answers(root: Path) -> list[str]:
    """What the base says after an evaluation of the library, and its numbers."""
    with quiet:
        loaded = load(root)
        rows = [row.example for row in read_held_out(loaded.library.entry("first"))]
        before = loaded.base.model(torch.arange(5, 20)[None]).logits
        RowLosses(loaded.base, rows).of(loaded.adapter("first"), "first")
        assert torch.equal(loaded.base.model(torch.arange(5, 20)[None]).logits, before)
        prompts = find_prompts(rows, loaded.tokenizer, 4)
        return generate(loaded.base.model, loaded.tokenizer, prompts, batch_size=2, context=128)


def test_the_sum_of_several_updates(two: Made):
    set_threshold(two.root, -1e9, at_most=2)
    report = evaluate(two.root, Asked(max_samples=3), silent)
    (chosen,) = {tuple(one["chosen"]) for one in report["decisions"]}
    assert chosen == ("first", "other"), "the newest first"
    singles = report["all"]["losses"]
    assert report["all"]["losses"]["library"] not in (singles["first"], singles["other"], singles["base"])


def test_answers_are_those_of_the_chosen(two: Made):
    set_threshold(two.root, -1e9, at_most=1)
    report = evaluate(two.root, Asked((f"first={two.rows}",), max_samples=6, answers=3), silent)
    assert len(report["samples"]) == 3
    with quiet:
        loaded = load(two.root)
    prompts = find_prompts(
        held_out_rows(loaded.first, loaded.place, loaded.tokenizer, two.rows).examples, loaded.tokenizer, 3
    )
    longest = max(prompt.longest for prompt in prompts)
    for sample, prompt in zip(report["samples"], prompts, strict=True):
        prompt.longest = longest
        (name,) = sample["chosen"]
        plain = generate(loaded.base.model, loaded.tokenizer, [prompt], batch_size=1, context=128)
        with attached(loaded.base.model, loaded.adapter(name)):
            spoken = generate(loaded.base.model, loaded.tokenizer, [prompt], batch_size=1, context=128)
        assert sample["prompt"] == prompt.text
        assert sample["references"] == prompt.references
        assert sample["answers"] == {"base": plain[0], "library": spoken[0]}
        assert plain != spoken


def test_without_a_file_other_updates_and_the_standard_library_are_unrelated(two: Made):
    with quiet:
        learned, notes = calibrate(two.root, Wanted(rows=12), silent)
    assert learned.quality["unrelated"] == 12
    assert learned.threshold.requests >= 12
    assert not learned.threshold.promised
    assert any("builtin:stdlib-docs" in note and "--unrelated FILE" in note for note in notes)
    assert any("cannot be promised" in note for note in notes)


@pytest.mark.parametrize(
    ("active", "unrelated", "updates", "said"),
    [
        (0.49, None, 2, "and so does --unrelated FILE"),
        (0.49, "asked.txt", 2, "pass"),
        (0.49, None, 1, "pass"),
        (0.5, None, 2, ""),
    ],
)
def test_a_quiet_library_is_told_and_what_makes_it_speak(active: float, unrelated: str | None, updates: int, said: str):
    quality = {
        "helped": 0.3,
        "at_threshold": {"active": active},
        "requests": {str(number): 9 for number in range(updates)},
    }
    learned: Any = SimpleNamespace(threshold=Threshold(1.0, 0.01, 200, promised=True), quality=quality)
    found = calibrating._said_of(learned, Wanted(Path(unrelated) if unrelated else None))
    assert len(found) == bool(said)
    if said:
        assert found[0].startswith("quiet: 49.0 % of the updates' own held-out requests")
        assert "--false-activation than 1.0 %" in found[0]
        assert said in found[0]
        assert ("--unrelated" in found[0]) == ("--unrelated" in said)


def test_of_one_update_no_other_updates_are_told(made: Made):
    with quiet:
        _, notes = calibrate(made.root, Wanted(rows=12), silent)
    assert any(note.startswith("unrelated requests are rows of builtin:stdlib-docs:") for note in notes)


def test_bare_requests_set_the_threshold_alone(two: Made, tmp_path: Path):
    (tmp_path / "asked.txt").write_text("".join(f"What is {n}?\n\n" for n in range(15)))
    with quiet:
        learned, _ = calibrate(two.root, Wanted(tmp_path / "asked.txt", rate=0.1), silent)
    assert learned.threshold.requests == learned.quality["unrelated"] == 15
    assert learned.quality["pairs"] == 2 * (15 + sum(learned.quality["requests"].values()))


def test_the_commands(two: Made, strangers: Path, dynlora: Dynlora):
    told = dynlora("library", "calibrate", two.root, "--unrelated", strangers, "--false-activation", "20%", "--json")
    assert told.code == 0
    result: dict[str, Any] = json.loads(told.out)
    assert result["calibration"] == Library.open(two.root).calibration
    assert "calibration error" in told.err
    data = ("--data", f"first={two.rows}", "--data", f"unrelated={strangers}")
    shown = dynlora("eval", "--library", two.root, *data, "--max-samples", 4, "--explain", "--json")
    assert shown.code == 0
    report = json.loads(shown.out)
    assert [one["origin"] for one in report["sets"]] == ["first", "unrelated"]
    assert all(one["reason"].split(":")[0] in shown.err for one in report["decisions"])
    assert "of the unrelated rows" in shown.err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["library", "calibrate", "LIB", "--false-activation", "0"], "must be above 0"),
        (["library", "calibrate", "LIB", "--unrelated", "nowhere.jsonl"], "nowhere.jsonl is no file"),
        (["library", "calibrate", "nowhere"], "nowhere does not exist"),
        (["eval", "--library", "LIB", "--adapter", "x"], "--library and --adapter do not go together"),
        (["eval", "--library", "LIB", "--router", "calibrated"], "is not calibrated"),
        (["eval", "--explain"], "--explain is of a library's decisions"),
        (["eval", "--adapter", "x", "--data", "a", "--data", "b"], "--data is given more than once"),
    ],
)
def test_what_cannot_be(made: Made, dynlora: Dynlora, words: list[str], said: str):
    answer = dynlora(*(made.root if word == "LIB" else word for word in words))
    assert answer.code == 2
    assert said in answer.err


def test_rows_of_an_update_that_is_not_there(two: Made, dynlora: Dynlora):
    answer = dynlora("eval", "--library", two.root, "--data", "frist=x.jsonl")
    assert answer.code == 2
    assert "no update 'frist'; did you mean 'first'?" in answer.err
    assert "--data x.jsonl does not exist" in dynlora("eval", "--library", two.root, "--data", "first=x.jsonl").err
