"""Every view in narrow and wide windows: nothing sticks out, nothing is in a colour that some background swallows."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
from rich.text import Text

from dynlora_cli.cli.views.adapters import AdapterView
from dynlora_cli.cli.views.console import Console
from dynlora_cli.cli.views.evaluation import show_evaluation
from dynlora_cli.cli.views.plan import show_plan
from dynlora_cli.cli.views.start import show_findings

SUMMARY = json.loads((Path(__file__).parents[1] / "fixtures" / "run_example" / "dynlora.json").read_text())["summary"]
LAYERS = [
    {"name": f"model.layers.{block}.{module}", "d_in": 2048, "d_out": 11008, "components": 16}
    for block in range(28)
    for module in ("self_attn.q_proj", "self_attn.k_proj", "mlp.gate_proj", "mlp.down_proj")
]
LONG = (
    "builtin:stdlib-docs: completion rows become turns of user and assistant, for the model has a chat template "
    "(dataset.chat: auto; false trains them as bare text)"
)
RUN = {"name": "demo", "model": "Qwen/Qwen3-4B-Instruct-2507", "task": "causal-lm", "device": "cuda:0, 8 of them"}
RUN |= {
    "variant": "lora",
    "policy": "fisher",
    "dtype": "bfloat16",
    "steps": 14000,
    "epochs": 3,
    "train_rows": 4_210_000,
}
RUN |= {"components": 1344, "parameters": 25_000_000, "budget_parameters": 6_250_000, "output_dir": "out/demo"}
START = {
    "event": "start",
    "run": RUN,
    "layers": LAYERS,
    "notes": [LONG],
    "example": [["2+2=" * 60, False], ["4", True]],
}
EVAL = {"event": "eval", "step": 8000, "loss": 2.2, "accuracy": 0.934, "best": True, "seconds": 1.0}
TRAIN = {"event": "train", "step": 9000, "loss": 2.10432, "learning_rate": 1.8e-4, "tokens_per_second": 51201.4}
TRAIN |= {"components": 512, "parameters": 9_500_000, "memory_bytes": 81e9, "seconds": 12345.0}
PRUNE = {"event": "prune", "step": 9000, "components_before": 512, "components": 486, "parameters_before": 9_500_000}
PRUNE |= {"parameters": 9_000_000, "ranks": {layer["name"]: 3 for layer in LAYERS}, "removed": {}}
PRUNE |= {"predicted_loss_change": 0.002, "measured_loss_change": 0.0031}
PLAN: dict[str, Any] = {
    "recipe_yaml": "model:\n  name_or_path: Qwen/Qwen3-4B-Instruct-2507\n",
    "example": [["<|im_start|>user\n" + "word " * 60, False], ["answer", True]],
    "modules": LAYERS,
    "parameters": {"base": 4_022_468_096, "start": 33_030_144, "budget": 16_515_072},
    "steps": 14000,
    "schedule": [{"step": 100 * k, "rank": 16 / (k + 1), "parameters": 10**7 // (k + 1), "learning_rate": 1e-4} for k in range(9)],
    "memory": dict.fromkeys(("base", "adapter", "optimizer", "activations", "libraries", "total", "free"), 10 ** 9)
    | {"rows": 8, "length": 1024, "most_rows": 31},
    "notes": [LONG],
}  # fmt: skip
SAMPLES = {"event": "samples", "step": 8000, "samples": [{"prompt": "p " * 150, "expected": "e " * 150, "answer": "a " * 150, "right": True}]}  # fmt: skip


def numbers(loss: float) -> dict[str, Any]:
    scores = dict.fromkeys(("accuracy", "token_accuracy", "exact_match", "rouge_l"), 0.25)
    return {"loss": loss, "perplexity": 9.1, "bleu": 12.3, "chrf": 40.1, "also": {}, **scores}


def difference(to: str) -> dict[str, Any]:
    return {"to": to, "loss": -0.2, "low": -0.3, "high": -0.1}


NAME = "experiment-with-a-long-name"
REPORT: dict[str, Any] = {
    "task": "causal-lm", "rows": 1319, "tokens": 41000, "data": {"source": f"held-out rows of {NAME}"},
    "generated": {"prompts": 24, "references": 48}, "base": numbers(2.0), "labels": [], "tasks": {}, "notes": [LONG],
    "adapters": [{"name": f"{NAME}-{k}", "difference": difference("base"), **numbers(1.0 + k)} for k in range(2)],
    "best": {"name": f"{NAME}-0", "next": f"{NAME}-1", "difference": {"loss": -0.01, "low": -0.1, "high": 0.1}},
    "samples": [{"prompt": "question " * 30, "references": ["right " * 30], "answers": {NAME: "answer " * 30}}],
}  # fmt: skip
FINDINGS = [
    {"part": "optional", "name": "embedding", "found": f"installed; for {LONG}", "fault": None, "hint": None},
    {"part": "settings", "name": "HF_HUB_OFFLINE", "found": "1", "fault": None, "hint": None},
]


def training(console: Console) -> None:
    view = console.train_view()
    for event in (START, EVAL, SAMPLES, TRAIN, PRUNE):
        view.progress.hear(event)
    console.show_start(START)
    console.show_samples(SAMPLES, view.progress)
    console.rich.print(view)
    console.warning(LONG)


def pruned(console: Console) -> None:
    AdapterView(console)({"event": "note", "text": LONG})
    AdapterView(console)({"event": "point", "loss": 2.0, "parameters": 10**7, "components": 300})


VIEWS = {
    "training": training,
    "summary": lambda console: console.show_summary(SUMMARY | {"next": []}),
    "plan": lambda console: show_plan(console, PLAN),
    "eval": lambda console: show_evaluation(console, REPORT),
    "doctor": lambda console: show_findings(console, FINDINGS),
    "points": pruned,
}


class Window(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def _terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    for name in ("NO_COLOR", "FORCE_COLOR", "COLUMNS", "LINES", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)


def shown(view: str, width: int) -> str:
    window = Window()
    VIEWS[view](Console(window, width=width, height=40))
    return window.getvalue()


@pytest.mark.parametrize("width", [60, 80, 200])
@pytest.mark.parametrize("view", VIEWS)
def test_no_line_is_longer_than_the_window(view: str, width: int) -> None:
    lines = [Text.from_ansi(line).plain.rstrip() for line in shown(view, width).splitlines()]
    assert len(lines) > 1
    assert not [line for line in lines if len(line) > width]


@pytest.mark.parametrize("view", VIEWS)
def test_no_colour_that_a_light_or_a_dark_window_swallows(view: str) -> None:
    """Yellow, white and bright colours are lost on white, black and blue on black; cells bring their background along."""
    codes = re.findall(r"\x1b\[([0-9;]*)m", shown(view, 80))
    assert codes
    for code in codes:
        parts = code.split(";")
        cell = {"38", "48"} <= set(parts)  # both of its own
        assert cell or not {"30", "33", "34", "37", "90", "93", "97", "38"} & set(parts), code


@pytest.mark.parametrize("view", VIEWS)
def test_no_color_is_respected(view: str, monkeypatch: pytest.MonkeyPatch) -> None:
    coloured = Text.from_ansi(shown(view, 80)).plain
    monkeypatch.setenv("NO_COLOR", "1")
    plain = shown(view, 80)
    assert not re.search(r"\x1b\[(?:[0-9;]*;)?(?:3[0-8]|4[0-8]|9[0-7]|10[0-7])(?:;[0-9;]*)?m", plain)
    without_bar = re.compile("[━╸╺ ]+")  # without colours what is left of a bar is blank
    assert without_bar.sub(" ", Text.from_ansi(plain).plain) == without_bar.sub(" ", coloured)


def test_a_note_is_broken_between_words_in_a_window_and_nowhere_else() -> None:
    window, pipe = Window(), io.StringIO()
    Console(window, width=60).note(LONG)
    Console(pipe).note(LONG)
    lines = Text.from_ansi(window.getvalue()).plain.splitlines()
    assert [line[:6] for line in lines] == ["note: ", *["      "] * (len(lines) - 1)]
    assert " ".join(line.strip() for line in lines) == f"note: {LONG}" == pipe.getvalue().rstrip()
