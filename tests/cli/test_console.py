"""What a person sees: plain lines in a pipe, a live picture on a terminal, and a clean terminal afterwards."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
from rich.text import Text

from dynlora_cli.cli.views.console import Console, pairs
from dynlora_cli.cli.views.plan import show_plan
from dynlora_cli.cli.views.progress import printable, sparkline
from dynlora_cli.cli.views.rank_map import rank_map
from dynlora_cli.errors import MachineError, RecipeError

EXAMPLE = Path(__file__).parents[1] / "fixtures" / "run_example"
SUMMARY = json.loads((EXAMPLE / "dynlora.json").read_text())["summary"]
HIDE, SHOW = "\x1b[?25l", "\x1b[?25h"


@pytest.fixture(autouse=True)
def _terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    for name in ("NO_COLOR", "FORCE_COLOR", "COLUMNS", "LINES", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)


class Pipe(io.StringIO):
    def isatty(self) -> bool:
        return False


class Window(io.StringIO):
    def isatty(self) -> bool:
        return True


def layers(blocks: int = 4, components: int = 16) -> list[dict[str, Any]]:
    modules = ("self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj")
    names = [f"model.layers.{block}.{module}" for block in range(blocks) for module in modules]
    return [{"name": name, "d_in": 64, "d_out": 128, "components": components} for name in names]


def start_event(blocks: int = 4) -> dict[str, Any]:
    run = {"name": "demo", "model": "builtin:tiny", "task": "causal-lm", "variant": "lora", "policy": "fisher"}
    run |= {"device": "cpu", "dtype": "float32", "steps": 400, "epochs": 1, "train_rows": 4210, "val_rows": 221}
    run |= {"components": 1344, "parameters": 250_000, "budget_parameters": 62_500, "output_dir": "out/demo"}
    return {"event": "start", "run": run, "layers": layers(blocks), "notes": ["format is chat"], "example": []}


TRAIN = {"event": "train", "step": 120, "loss": 2.10432, "learning_rate": 1.8e-4, "tokens_per_second": 5120.4}
TRAIN |= {"components": 512, "parameters": 95_000, "memory_bytes": 812e6, "seconds": 12.34}
EVAL = {"event": "eval", "step": 120, "loss": 2.2, "accuracy": 0.934, "best": True, "seconds": 1.0}
PRUNE = {"event": "prune", "step": 120, "components_before": 512, "components": 486, "parameters_before": 95_000}
PRUNE |= {"parameters": 90_000, "ranks": {layer["name"]: 3 for layer in layers()}, "removed": {}}
PRUNE |= {"predicted_loss_change": 0.002, "measured_loss_change": 0.0031}


def play(console: Console, *events: dict[str, Any]) -> None:
    with console.train_view() as view:
        for event in events:
            view(event)


def test_plain_lines_are_exact() -> None:
    pipe = Pipe()
    checkpoint = {"event": "checkpoint", "step": 120, "path": "out/demo/checkpoints/step-120"}
    tick = {"event": "tick", "step": 121, "loss": 2.0}
    warning = {"event": "warning", "text": "3 rows were cut"}
    play(Console(pipe), start_event(), TRAIN, EVAL, PRUNE, TRAIN | {"step": 130}, checkpoint, tick, warning)
    assert pipe.getvalue().splitlines() == [
        "demo",
        "  model        builtin:tiny · causal-lm · float32 on cpu",
        "  data         4,210 rows to train, 221 held out",
        "  adapter      lora · fisher · 1,344 components in 12 layers",
        "  parameters   250 k, budget 62.5 k",
        "  steps        400 · 1 epoch",
        "  output       out/demo",
        "note: format is chat",
        "step  120/400  loss 2.1043  held-out -                lr 1.8e-04   5,120 tok/s  components  512/1344  12.3 s",
        "eval  120/400  held-out 2.2000  accuracy 93.4 %  best  1.0 s",
        "prune 120/400  components 512 -> 486  parameters 90.0 k, budget 62.5 k  loss +0.0031  predicted +0.0020",
        "step  130/400  loss 2.1043  held-out 2.2000 (at 120)  lr 1.8e-04   5,120 tok/s  components  512/1344  12.3 s",
        "saved 120/400  out/demo/checkpoints/step-120",
        "warning: 3 rows were cut",
    ]


@pytest.mark.parametrize("file", [Pipe(), Window()], ids=["pipe", "dumb"])
def test_nothing_moves_where_nothing_can(file: io.StringIO, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    monkeypatch.setenv("FORCE_COLOR", "1")
    console = Console(file)
    play(console, start_event(), TRAIN, PRUNE, {"event": "end", "summary": SUMMARY})
    console.show_summary(SUMMARY)
    console.error(MachineError("no disk", "free some"))
    assert not re.search(r"[\x00-\x09\x0b-\x1f]", file.getvalue())


def test_a_missing_number_is_a_dash() -> None:
    pipe = Pipe()
    play(Console(pipe), {"event": "start", "run": {"steps": 9}}, {"event": "train", "step": 3, "loss": None})
    assert pipe.getvalue().splitlines() == [
        "dynlora train",
        "  data         - rows to train, - held out",
        "  parameters   -",
        "  steps        9",
        "step  3/9  loss -  held-out -              lr -       - tok/s  -",
    ]


@pytest.mark.parametrize(("objective", "loss"), [("sft", "2.1043"), ("reconstruction", "2.1043 z-scores")])
def test_what_trains_without_components_is_counted_and_its_loss_named(objective: str, loss: str) -> None:
    run = {"steps": 9, "components": None, "parameters": None, "trainable_parameters": 41_116, "objective": objective}
    start, step = {"event": "start", "run": run}, {"event": "train", "step": 3, "loss": 2.10432}
    pipe = Pipe()
    console = Console(pipe)
    play(console, start, step)
    console.show_summary({"ok": True, "parameters": 41_116, "loss_before": 3.0, "loss_after": 2.0})
    said = pipe.getvalue()
    assert "  parameters   41.1 k\n" in said
    assert f"step  3/9  loss {loss}  held-out" in said
    assert ["parameters", "41,116", "41,116"] in [line.split() for line in said.splitlines()]
    assert "components" not in said
    live = "\n".join(picture(100, 24, start, step))
    assert loss in live
    assert "41.1 k" in live
    assert "components" not in live


def picture(width: int, height: int, *events: dict[str, Any]) -> list[str]:
    """The live view as lines of text without colours."""
    console = Console(Window(), width=width, height=height)
    view = console.train_view()
    for event in events:
        view.progress.hear(event)
    with console.rich.capture() as capture:
        console.rich.print(view)
    return [line.rstrip() for line in Text.from_ansi(capture.get()).plain.splitlines()]


@pytest.mark.parametrize("width", [100, 60, 40])
@pytest.mark.parametrize("blocks", [4, 80])
def test_the_live_picture_fits_its_window(width: int, blocks: int) -> None:
    shown = picture(width, 24, start_event(blocks), TRAIN, EVAL, PRUNE)
    assert len(shown) < 24
    assert max(map(len, shown)) <= width
    text = "\n".join(shown)
    for part in (
        "120/400",
        "2.1043",
        "2.2000",
        "93.4 %",
        "486 of 1,344",
        "90.0 k, budget 62.5 k",
        "1.8e-04",
        "5,120 tok/s",
    ):
        assert part in text
    assert re.search(r"q +v +up", text)


def test_the_rank_map_stands_beside_the_numbers_only_where_there_is_room() -> None:
    wide = next(line for line in picture(100, 24, start_event(), PRUNE) if "q " in line)
    narrow = next(line for line in picture(60, 24, start_event(), PRUNE) if "q " in line)
    assert wide.index("q") > 40 > narrow.index("q")


def map_lines(blocks: int, width: int = 60, height: int = 20, **ranks: int) -> list[str]:
    start = {layer["name"]: 16 for layer in layers(blocks)}
    now = start | {f"model.layers.{key[1:]}".replace("_q", ".self_attn.q_proj"): rank for key, rank in ranks.items()}
    return rank_map(now, start, width, height).plain.splitlines()


def test_the_rank_map_shows_each_layer_and_a_dot_for_none() -> None:
    assert [line.split() for line in map_lines(3, b1_q=0, b2_q=5)] == [
        ["q", "v", "up"],
        ["0", "16", "16", "16"],
        ["1", "·", "16", "16"],
        ["2", "5", "16", "16"],
    ]


def test_many_blocks_share_lines_that_show_their_mean() -> None:
    shown = [line.split() for line in map_lines(30, height=11, b0_q=4)]
    assert len(shown) == 11
    assert shown[1] == ["0-2", "12", "16", "16"]


def test_module_types_that_do_not_fit_are_counted() -> None:
    shown = map_lines(3, width=14)
    assert shown[0].split() == ["q", "+2"]
    assert max(map(len, shown)) <= 14


def test_a_cell_is_coloured_by_what_it_kept() -> None:
    names = [layer["name"] for layer in layers(1)]
    text = rank_map(dict(zip(names, (16, 1, 0), strict=True)), dict.fromkeys(names, 16), 60, 5)
    cells = [span.style for span in text.spans if getattr(span.style, "bgcolor", None)]
    brightness = [sum(style.bgcolor.triplet) for style in cells]  # type: ignore[union-attr]
    assert len(brightness) == 2
    assert brightness[0] > 2 * brightness[1]


def test_the_live_picture_is_gone_at_the_end_and_the_cursor_is_back() -> None:
    window = Window()
    play(Console(window, width=100, height=30), start_event(), TRAIN, {"event": "end", "summary": SUMMARY})
    shown = window.getvalue()
    assert shown.count(HIDE) == 1
    assert shown.rindex(SHOW) > shown.rindex(HIDE)
    assert "\x1b[2K" in shown  # lines were erased


def test_an_error_leaves_the_cursor_shown_and_the_last_picture_in_place() -> None:
    window = Window()
    view = Console(window, width=100, height=30).train_view()
    with pytest.raises(RuntimeError, match="boom"), view:  # noqa: PT012 - it is the leaving that is tested
        view(start_event())
        view(TRAIN)
        raise RuntimeError("boom")
    shown = window.getvalue()
    assert shown.rindex(SHOW) > shown.rindex(HIDE)
    assert "512 of 1,344" in shown[shown.rindex("120/400") :]


def test_no_color_keeps_the_picture_but_not_the_colours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    window = Window()
    console = Console(window, width=100, height=30)
    play(console, start_event() | {"example": [["2+2=", False], ["4", True]]}, TRAIN, PRUNE)
    assert "⟦4⟧" in window.getvalue()
    assert not re.search(r"\x1b\[[0-9;]*[34]8;", window.getvalue())


def test_the_example_marks_what_counts_in_the_loss() -> None:
    pipe, window = Pipe(), Window()
    pieces = [["<user>Hi\x1b[2J\n", False], ["Hello.</s>", True]]
    Console(pipe).show_example(pieces)
    assert pipe.getvalue() == "\none example; ⟦this⟧ counts in the loss\n  <user>Hi␛[2J\n  ⟦Hello.</s>⟧\n\n"
    Console(window, width=80).show_example(pieces)
    assert "\x1b[1;36m⟦Hello.</s>⟧" in window.getvalue()  # for those who see no colours


def test_a_long_piece_keeps_both_its_ends() -> None:
    pipe = Pipe()
    Console(pipe).show_example([["START" + "x" * 5000 + "END", False], ["answer", True]])
    assert len(pipe.getvalue()) < 900
    for part in ("START", "END", "characters", "⟦answer⟧"):
        assert part in pipe.getvalue()


def test_the_summary() -> None:
    pipe = Pipe()
    Console(pipe).show_summary(SUMMARY | {"accuracy_before": 0.5, "accuracy_after": 0.9342})
    rows = [line.split() for line in pipe.getvalue().splitlines()]
    assert ["held-out", "loss", "2.9514", "2.0214", "-31.5", "%"] in rows
    assert ["held-out", "accuracy", "50.0", "%", "93.4", "%", "+86.8", "%"] in rows
    assert ["parameters", "73,984", "18,328", "budget", "18,496"] in rows
    assert ["components", "448", "128", "per", "layer", "0", "to", "14,", "mean", "4.6"] in rows
    assert ["q", "k", "v", "o", "gate", "up", "down"] in rows
    assert ["1", "·", "1", "13", "13", "3", "2", "4"] in rows
    assert pipe.getvalue().endswith(
        "Next\n  dynlora eval --adapter out/example\n  dynlora merge --adapter out/example\n"
    )


def test_a_summary_with_only_the_least() -> None:
    pipe = Pipe()
    Console(pipe).show_summary({"ok": True, "steps": 3, "seconds": 1.0})
    assert "Done in 1.0 s   3 steps" in pipe.getvalue()


def test_the_plan_groups_modules_by_pattern() -> None:
    pipe = Pipe()
    plan = {
        "recipe_yaml": "model: builtin:tiny\n",
        "example": [["2+2=", False], ["4", True]],
        "modules": layers(6),
        "parameters": {"base": 2_950_000, "start": 250_000, "budget": 62_500},
        "schedule": [{"step": 20, "rank": 6.0, "parameters": 250_000, "learning_rate": 2e-4}],
        "steps": 400,
        "notes": ["nothing was written"],
    }
    show_plan(Console(pipe), plan)
    rows = [line.split() for line in pipe.getvalue().splitlines()]
    assert ["model.layers.*.self_attn.q_proj", "x6", "128", "x", "64", "16"] in rows
    assert ["base", "parameters", "2,950,000"] in rows
    assert ["20", "6.0", "250,000", "2.0e-04", "█" * 24] in rows
    assert "  model: builtin:tiny" in pipe.getvalue()
    assert "⟦4⟧" in pipe.getvalue()


def test_errors_are_plain_text() -> None:
    pipe = Pipe()
    Console(pipe).error(
        RecipeError(["r.yaml:3: `alhpa` is unknown " + "x" * 200, "r.yaml:7: [bold]no"], "see `dynlora schema`")
    )
    Console(pipe).error(MachineError("no disk"))
    assert pipe.getvalue().splitlines() == [
        "error: r.yaml:3: `alhpa` is unknown " + "x" * 200,
        "       r.yaml:7: [bold]no",
        " hint: see `dynlora schema`",
        "error: no disk",
    ]


def test_time_left_follows_the_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    view = Console(Window(), width=80).train_view()
    clock = iter([10.0, 12.0, 14.0])
    monkeypatch.setattr("dynlora_cli.cli.views.progress.time.monotonic", lambda: next(clock))
    view.progress.hear(start_event())
    assert view.progress.seconds_left is None
    for step in (1, 2, 3):
        view.progress.hear({"event": "tick", "step": step, "loss": 2.0})
    assert view.progress.seconds_left == pytest.approx(2.0 * 397)


def test_sparkline_and_printable() -> None:
    assert sparkline((4.0, 3.0, 2.0, 1.0), 4) == "█▆▃▁"
    assert sparkline((1.0, 1.0, float("nan")), 8) == "▄▄"
    assert sparkline((1.0,), 8) == ""
    assert printable("a\x1b[31m\tb\nc\x9bd é") == "a␛[31m\tb\nc\\x9bd é"


def test_names_from_files_do_not_steer_the_terminal() -> None:
    window = Window()
    Console(window, width=80).show(pairs([("whole \x1b[2J", "\x1b[31mred")]))
    assert "\x1b[2J" not in window.getvalue()
    assert "\x1b[31m" not in window.getvalue()


SAMPLES = {"event": "samples", "step": 120, "samples": [
    {"prompt": "x" * 200 + " the\nend?", "expected": "red\x1b[31m", "answer": "", "right": False},
    {"prompt": "two?", "expected": "yes", "answer": "yes", "right": True},
]}  # fmt: skip


def test_answers_stand_under_their_evaluation() -> None:
    pipe = Pipe()
    play(Console(pipe), start_event(), EVAL, SAMPLES)
    lines = pipe.getvalue().splitlines()
    at = next(index for index, line in enumerate(lines) if line.startswith("eval"))
    asked, expected, answered, *second = lines[at + 1 :]
    assert asked == f"      asked     …{'x' * 90} the end?"
    assert expected == "      expected  red\u241b[31m"
    assert answered == "      answered  (nothing)"
    assert second == ["      asked     two?", "      expected  yes", "      answered  yes"]


def test_on_a_terminal_answers_stay_above_the_picture_and_fit_the_window() -> None:
    window = Window()
    play(Console(window, width=60, height=30), start_event(), EVAL, SAMPLES)
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", window.getvalue()).replace("\r", "")
    assert "at 120, held out 2.2000" in shown
    lines = re.findall(r"  (?:asked|expected|answered) .*", shown)
    assert len(lines) == 6
    assert all(len(line) <= 60 for line in lines)
    assert lines[-1] == "  answered  yes"
