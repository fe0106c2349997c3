"""The run log, what is read back from it, the HTML report and the model card."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml

from dynlora_cli.errors import DynloraError, UsageError
from dynlora_cli.runs.layer_grid import layer_grid
from dynlora_cli.runs.log import RunLog, read_run
from dynlora_cli.runs.report.svg import nice_ticks, smooth
from dynlora_cli.runs.report.write import write_card, write_report
from dynlora_cli.text import change, count, duration, percent, rate, short, size

EXAMPLE = Path(__file__).parents[1] / "fixtures" / "run_example"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A copy of the example run, to write into."""
    return Path(shutil.copytree(EXAMPLE, tmp_path / "run_example"))


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def edit_info(run: Path, **changes: object) -> None:
    info = json.loads((run / "dynlora.json").read_text())
    (run / "dynlora.json").write_text(json.dumps(info | changes))


class Page(HTMLParser):
    """Tags must nest; text and attributes are collected."""

    VOID = ("meta", "input", "br", "link", "img")

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.text: list[str] = []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(key, value or "") for key, value in attrs]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("style", "script"):
            self.text.append(data)


def test_events_go_to_their_files_flushed(tmp_path: Path) -> None:
    with RunLog(tmp_path / "new") as log:
        log({"event": "start", "run": {}})
        log({"event": "train", "step": 1, "loss": 2.5})
        log({"event": "tick", "step": 1, "loss": 2.5})
        log({"event": "eval", "step": 1, "loss": 2.4})
        log({"event": "prune", "step": 2, "ranks": {"a": 1}})
        log({"event": "end", "summary": {}})
        assert [e["event"] for e in lines(tmp_path / "new" / "metrics.jsonl")] == ["train", "eval"]  # before it closes
        assert lines(tmp_path / "new" / "rank_events.jsonl") == [{"event": "prune", "step": 2, "ranks": {"a": 1}}]


def test_nan_and_infinity_are_null(tmp_path: Path) -> None:
    with RunLog(tmp_path) as log:
        log({"event": "train", "step": 1, "loss": math.nan, "extra": {"norms": [math.inf, 1.0]}})
    assert lines(tmp_path / "metrics.jsonl") == [
        {"event": "train", "step": 1, "loss": None, "extra": {"norms": [None, 1.0]}}
    ]


def test_resume_drops_later_steps_and_the_torn_line(run: Path) -> None:
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"event": "train", "st')
    with RunLog(run, keep_until_step=30) as log:
        log({"event": "train", "step": 31, "loss": 1.0})
    assert [e["step"] for e in lines(run / "metrics.jsonl")] == [0, 1, 5, 10, 15, 20, 25, 30, 31]
    assert [e["step"] for e in lines(run / "rank_events.jsonl")] == [17, 23, 30]


def test_resume_leaves_kept_lines_as_they_were(run: Path) -> None:
    RunLog(run, keep_until_step=10_000)
    for name in ("metrics.jsonl", "rank_events.jsonl"):
        assert (run / name).read_bytes() == (EXAMPLE / name).read_bytes()


def test_a_torn_last_line_is_left_out_and_a_torn_other_line_is_an_error(run: Path) -> None:
    whole = (run / "metrics.jsonl").read_text()
    (run / "metrics.jsonl").write_text(whole[:-30])
    assert len(read_run(run).evals) == len(read_run(EXAMPLE).evals) - 1
    (run / "metrics.jsonl").write_text(whole.replace('"loss"', "loss", 1))
    with pytest.raises(DynloraError, match=r"metrics\.jsonl:1 is damaged: not valid JSON"):
        read_run(run)


DAMAGED_LINES = [
    "null", "[1]", "{}", '{"event": "train"}', '{"event": "train", "step": "five"}', '{"event": "train", "step": -1}',
    '{"event": "prune", "step": 5, "ranks": [1]}', '{"event": "train", "step": 5, "loss": "low"}', "[" * 100_000,
    '{"event": "train", "step": ' + "9" * 6000 + "}", '{"event": "train", "step": 1, "x": ' + "[" * 900 + "]" * 900 + "}",
]  # fmt: skip


@pytest.mark.parametrize("line", DAMAGED_LINES, ids=lambda line: line[:40])
@pytest.mark.parametrize("name", ["metrics.jsonl", "rank_events.jsonl"])
def test_damaged_lines_are_named(run: Path, name: str, line: str) -> None:
    whole = (run / name).read_text().splitlines()
    (run / name).write_text("\n".join([whole[0], line, *whole[2:]]) + "\n")
    for read in (read_run, lambda folder: RunLog(folder, keep_until_step=3)):
        with pytest.raises(UsageError, match=rf"{name}:2 is damaged: "):
            read(run)


def test_zeros_and_folders_in_place_of_a_log_are_named(run: Path) -> None:
    (run / "metrics.jsonl").write_bytes(bytes(1000))
    with pytest.raises(UsageError, match=r"metrics\.jsonl:1 is damaged"):
        read_run(run)
    (run / "metrics.jsonl").unlink()
    (run / "metrics.jsonl").mkdir()
    with pytest.raises(UsageError, match="is no file"):
        read_run(run)


@pytest.mark.parametrize(
    "change",
    [{"summary": {"loss_after": "low"}}, {"summary": {"ranks": [1]}}, {"budget": 3}, {"layers": {"a": {"rank": "x"}}}],
)
def test_a_damaged_record_is_named(run: Path, change: dict) -> None:
    edit_info(run, **change)
    with pytest.raises(UsageError, match=rf"dynlora\.json is damaged: {next(iter(change))}"):
        read_run(run)


def test_a_folder_without_a_run_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="holds no record of a run"):
        read_run(tmp_path / "absent")


def test_rank_history_starts_before_the_first_event() -> None:
    record = read_run(EXAMPLE)
    history = record.rank_history()
    assert [step for step, _ in history] == [0, 17, 23, 30, 37, 43, 50]
    assert set(history[0][1].values()) == {16}
    assert history[-1][1] == record.summary["ranks"]
    assert sum(history[-1][1].values()) == 128


def test_layer_grid_of_a_decoder() -> None:
    blocks, modules, cell = layer_grid(
        [f"model.layers.{i}.{m}" for i in (10, 2) for m in ("self_attn.q_proj", "mlp.up_proj")]
    )
    assert (blocks, modules) == (["2", "10"], ["q_proj", "up_proj"])
    assert cell["10", "up_proj"] == "model.layers.10.mlp.up_proj"


def test_layer_grid_of_an_encoder_tells_its_three_dense_layers_apart() -> None:
    inside = ("attention.self.query", "attention.output.dense", "intermediate.dense", "output.dense")
    names = [f"bert.encoder.layer.2.{module}" for module in inside] + ["bert.pooler.dense"]
    blocks, modules, cell = layer_grid(names)
    assert blocks == ["2", "other"]
    assert modules == ["query", "attention.output.dense", "intermediate.dense", "output.dense", "pooler.dense"]
    assert sorted(cell.values()) == sorted(names)
    assert cell["other", "pooler.dense"] == "bert.pooler.dense"


def test_layer_grid_of_a_unet_has_a_row_for_each_of_its_inner_blocks() -> None:
    names = [
        "unet.down_blocks.1.attentions.0.transformer_blocks.3.attn1.to_out.0",
        "unet.down_blocks.1.attentions.0.proj_in",
        "unet.mid_block.resnets.1.conv1",
        "unet.conv_in",
    ]
    blocks, modules, cell = layer_grid(names)
    assert blocks == ["down.1.attentions.0.blocks 3", "down.1.attentions 0", "mid.resnets 1", "other"]
    assert modules == ["0", "proj_in", "conv1", "conv_in"]
    assert cell[blocks[2], "conv1"] == names[2]


def test_layer_grid_keeps_two_stacks_apart() -> None:
    names = [
        "encoder.block.0.layer.0.SelfAttention.q",
        "decoder.block.0.layer.0.SelfAttention.q",
        "transformer.h.0.attn.c_attn",
    ]
    assert layer_grid(names[:2])[0] == ["encoder 0", "decoder 0"]
    assert layer_grid(names[2:]) == (["0"], ["c_attn"], {("0", "c_attn"): names[2]})


def test_the_report_says_the_numbers_and_loads_nothing(run: Path) -> None:
    html = write_report(run).read_text()
    page = Page(html)
    text = " ".join(page.text)
    for shown in (
        "run_example",
        "builtin:tiny",
        "2.0214",
        "from 2.9514, -31.5 %",
        "18.3 k",
        "budget 18.5 k",
        "128",
        "812 MB",
    ):
        assert shown in text
    assert "nats per token" in text
    assert "optimizer step" in text
    assert page.tags.count("svg") == 8  # the wide one for narrow screens, too
    assert not re.search(r"https?://|//cdn|@import|url\(", html)
    assert not [value for key, value in page.attributes if key in ("src", "href")]


def test_losses_in_other_units_than_the_held_out_ones_have_a_chart_of_their_own(run: Path) -> None:
    assert "Loss in training" not in write_report(run).read_text()
    edit_info(run, recipe={"train": {"objective": "reconstruction"}})
    html = write_report(run).read_text()
    own, _, both = html.partition("Loss in training")[2].partition("</figure>")
    assert "z-scores" in own
    assert "nats per token" not in own
    assert "nats per token" in both.partition("</figure>")[0]
    assert "training, smoothed" not in both


def test_the_rank_map_has_a_cell_for_each_layer(run: Path) -> None:
    html = write_report(run).read_text()
    record = read_run(run)
    cells = dict(re.findall(r'data-name="([^"]+)" title="[^"]+">(\d*)</td>', html))
    assert {name: int(rank or 0) for name, rank in cells.items()} == record.summary["ranks"]
    assert html.count('class="cell zero"') == sum(1 for rank in record.summary["ranks"].values() if rank == 0)
    data = json.loads(re.search(r'<script type="application/json" id="ranks">(.*?)</script>', html)[1])  # type: ignore[index]
    assert data["steps"] == [0, 17, 23, 30, 37, 43, 50]
    assert {len(ranks) for ranks in data["ranks"]} == {28}


def test_names_from_outside_are_escaped(run: Path) -> None:
    evil = "</script><script>alert(1)</script>"
    edit_info(
        run,
        base_model={"name_or_path": evil},
        recipe_yaml=f"model: {evil}",
        layers={f"model.layers.0.{evil}": {"rank": 1, "d_in": 8, "d_out": 8}},
        versions={evil: evil},
    )
    for name in ("metrics.jsonl", "rank_events.jsonl"):
        (run / name).write_text(
            (run / name).read_text().replace("self_attn.q_proj", f"self_attn.{evil.replace('/', '<')}")
        )
    html = write_report(run).read_text()
    assert "<script>alert" not in html
    assert "&lt;script&gt;alert(1)" in html
    Page(html)


def test_a_run_that_still_goes_on_has_a_report_and_a_card(tmp_path: Path) -> None:
    with RunLog(tmp_path) as log:
        log({"event": "train", "step": 1, "loss": math.nan})
        log({"event": "train", "step": 2, "loss": 2.0})
    page = Page(write_report(tmp_path).read_text())
    assert page.tags.count("svg") == 2
    assert "PeftModel" in write_card(tmp_path).read_text()


def test_a_report_from_dynlora_json_alone(run: Path) -> None:
    for name in ("metrics.jsonl", "rank_events.jsonl"):
        (run / name).unlink()
    text = " ".join(Page(write_report(run).read_text()).text)
    assert "2.0214" in text
    assert "28 layers by importance" in text


def test_the_card_has_front_matter_numbers_ranks_and_code(run: Path) -> None:
    card = write_card(run).read_text()
    meta = yaml.safe_load(card.split("---\n")[1])
    assert meta == {
        "base_model": "builtin:tiny",
        "library_name": "peft",
        "tags": ["lora", "dynlora"],
    }
    assert "| held-out loss | 2.9514 | 2.0214 |" in card
    assert "    1  .  1  13  13     3   2     4\n" in card
    assert "AutoModelForCausalLM.from_pretrained(PeftConfig" in card
    assert "rank: {init: auto, budget: 4}" in card


@pytest.mark.parametrize("task", ["causal-lm", "seq2seq-lm", "sequence-classification"])
def test_the_code_of_the_card_is_python_with_the_class_of_the_task(run: Path, task: str) -> None:
    edit_info(
        run, task=task, base_model={"name_or_path": "org/it's", "revision": "abc"}, recipe={"model": {"num_labels": 3}}
    )
    code = re.search(r"```python\n(.*?)```", write_card(run).read_text(), re.DOTALL)[1]  # type: ignore[index]
    compile(code, "card", "exec")
    names = {"causal-lm": "CausalLM", "seq2seq-lm": "Seq2SeqLM", "sequence-classification": "SequenceClassification"}
    assert f"AutoModelFor{names[task]}.from_pretrained(\"org/it's\", revision='abc', num_labels=3)" in code


def test_a_recipe_cannot_break_out_of_its_code_block(run: Path) -> None:
    edit_info(run, recipe_yaml="a: |\n  ```\n  # not a heading\n")
    assert "````yaml\na: |\n  ```\n" in write_card(run).read_text()


def test_units() -> None:
    assert [short(n) for n in (512, 9408, 12_345, 999_960, 4_100_000, 7e9)] == [
        "512",
        "9,408",
        "12.3 k",
        "1.0 M",
        "4.1 M",
        "7.0 B",
    ]
    assert [size(n) for n in (12, 76_312, 512e6, 1.5e9)] == ["12 B", "76.3 kB", "512 MB", "1.5 GB"]
    times = (0, 0.085, 12.34, 59.99, 245, 3599.7, 3720, 97_200)
    shown = ["0 s", "85 ms", "12.3 s", "1 min 00 s", "4 min 05 s", "1 h 00 min", "1 h 02 min", "1 d 03 h"]
    assert [duration(seconds) for seconds in times] == shown
    assert (count(42061), rate(1.8e-4), percent(0.9342)) == ("42,061", "1.8e-04", "93.4 %")
    assert [show(None) for show in (short, size, duration, count, rate, percent)] == ["-"] * 6
    assert (change(2.0, 1.5), change(None, 1.0), change(0.0, 1.0)) == ("-25.0 %", "", "")


def test_ticks_are_round_and_inside() -> None:
    assert nice_ticks(0.0, 1.0) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1.0])
    assert nice_ticks(1.93, 3.01) == pytest.approx([2, 2.25, 2.5, 2.75, 3])
    assert nice_ticks(5.0, 5.0) == [5.0]


def test_smoothing_starts_at_the_first_value_and_skips_gaps() -> None:
    assert smooth([(1, 4.0), (2, None), (3, 2.0)], keep=0.5) == [(1, 4.0), (3, pytest.approx(8 / 3))]


def test_report_and_console_import_nothing_heavy() -> None:
    code = "import sys, dynlora_cli.runs.report.write; assert 'rich' not in sys.modules\n"
    code += "import dynlora_cli.cli.views.console; print(*sys.modules)"
    modules = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"torch", "transformers", "datasets", "accelerate", "bitsandbytes", "numpy"} & set(modules)
