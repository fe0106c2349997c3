"""What a person sees of an evaluation: the table, who is better and how sure that is, tasks, answers side by side."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from dynlora_cli import plugins
from dynlora_cli.cli.views.console import Console, plain_table
from dynlora_cli.cli.views.progress import middle_cut, printable
from dynlora_cli.text import count, counted, number, percent

CLASSES, CONFUSED = 12, 3  # classes described in words, and for each the classes it was taken for
LONGEST_SHOWN = 600  # characters of a prompt or an answer
LONGEST_NAME = 28  # characters of a name in a table

# Key of the report, heading, and how its values are shown; a column without values is left out.
COLUMNS: Sequence[tuple[str, str, Callable[[float | None], str]]] = (
    ("loss", "loss", number),
    ("perplexity", "perplexity", lambda value: number(value, 2)),
    ("accuracy", "accuracy", percent),
    ("margin", "margin", number),
    ("reward_chosen", "reward chosen", number),
    ("reward_rejected", "rejected", number),
    ("log_odds", "log odds", number),
    ("recall@1", "recall@1", percent),
    ("recall@5", "@5", percent),
    ("recall@10", "@10", percent),
    ("mrr", "MRR", number),
    ("ndcg@10", "nDCG@10", number),
    ("spearman", "rank correlation", number),
    ("f1", "F1", number),
    ("matthews", "Matthews", number),
    ("token_accuracy", "tokens right", percent),
    ("exact_match", "exact", percent),
    ("bleu", "BLEU", lambda value: number(value, 1)),
    ("chrf", "chrF", lambda value: number(value, 1)),
    ("rouge_l", "ROUGE-L", number),
)


def show_evaluation(console: Console, report: Mapping[str, Any]) -> None:
    """The whole report, as `evaluate.run` returns it."""
    unit = plugins.loss_in(report["task"], report.get("objective"))
    console.line()
    if report["rows"]:
        console.sentence(Text(_what(report), style="head"))
        console.show(_table(report))
    compared = [adapter for adapter in report["adapters"] if adapter["difference"]]
    if compared:
        console.line()
    for name, values in [("base", report["base"]), *((one["name"], one) for one in report["adapters"])]:
        if values and "confusion" in values:
            console.line()
            for line in confusion_in_words(values["confusion"], report["labels"]):
                console.sentence(f"{_short(name)}: {line}")
    for adapter in compared:
        console.sentence(_verdict(adapter["name"], adapter["difference"]["to"], adapter["difference"], unit))
    if report["best"] and len(report["adapters"]) > 1:
        best = report["best"]
        console.sentence(_verdict(best["name"], best["next"], best["difference"], unit))
    if any(adapter["also"] for adapter in report["adapters"]):
        console.line()
        console.show(_forgetting(report))
    if report["tasks"]:
        console.line()
        console.show(_tasks(report))
    for sample in report["samples"]:
        console.line()
        console.show(shown_sample(sample))
    if report["notes"]:
        console.line()
    for note in report["notes"]:
        console.note(note)


def confusion_in_words(confusion: Sequence[Sequence[int]], labels: Sequence[str]) -> list[str]:
    """What became of the rows of each class: `of 97 rows of ham 95 are right, 2 taken for spam`.

    Args:
        confusion: rows counted by their class (line) and by what was predicted (column).
        labels: names of the classes in that order.
    """
    lines = []
    for truth, counts in enumerate(confusion):
        wrong = sorted(((n, labels[k]) for k, n in enumerate(counts) if n and k != truth), reverse=True)
        if rows := sum(counts):
            taken = "".join(f", {count(n)} taken for {label}" for n, label in wrong[:CONFUSED])
            others = sum(n for n, _ in wrong[CONFUSED:])
            taken += f", {count(others)} for others" if others else ""
            lines.append(f"of {counted(rows, 'row')} of {labels[truth]} {count(counts[truth])} are right{taken}")
    return lines[:CLASSES] + ([f"and {count(len(lines) - CLASSES)} more classes"] if len(lines) > CLASSES else [])


def _what(report: Mapping[str, Any]) -> str:
    targets = "" if report["tokens"] == report["rows"] else f", {count(report['tokens'])} tokens in the loss"
    text = f"{counted(report['rows'], 'row')}{targets}: {printable(report['data']['source'])}"
    if prompts := report["generated"]["prompts"]:
        text += f"; answers to {count(prompts)} prompts with {count(report['generated']['references'])} references"
    return text


def _table(report: Mapping[str, Any]) -> Table:
    lines = [("base", report["base"])] if report["base"] else []
    lines += [(adapter["name"], adapter) for adapter in report["adapters"]]
    shown = [column for column in COLUMNS if any(column[0] in values for _, values in lines)]
    table = Table(box=None, padding=(0, 3, 0, 0), pad_edge=False, header_style="label")
    table.add_column("")
    for _, head, _ in shown:
        table.add_column(head, justify="right", no_wrap=True)
    lowest = min(values["loss"] for _, values in lines)
    for name, values in lines:
        style = "head" if values["loss"] == lowest and len(lines) > 1 else ""
        table.add_row(_short(name), *(show(values.get(key)) for key, _, show in shown), style=style)
    return table


def _short(name: str) -> str:
    """A name that may be a path, by its end."""
    shown = printable(name)
    return shown if len(shown) <= LONGEST_NAME else f"…{shown[1 - LONGEST_NAME :]}"


def _verdict(name: str, other: str, difference: Mapping[str, float], unit: str) -> Text:
    """Which of two is better, and how sure that is."""
    loss, low, high = (difference[key] for key in ("loss", "low", "high"))
    if loss == low == high == 0:
        return Text(f"{printable(name)} and {printable(other)} have the very same loss on every row")
    if low <= 0 <= high:
        text, style = "is neither clearly better nor clearly worse than", "warn"
    else:
        text, style = ("is better than", "good") if high < 0 else ("is worse than", "bad")
    margin, most = sorted((abs(low), abs(high)))
    amount = f"{abs(loss):.4f} {unit} {'lower' if loss <= 0 else 'higher'}"
    interval = f"{margin:.4f} to {most:.4f}" if low * high > 0 else f"{low:+.4f} to {high:+.4f}"
    return Text.assemble(
        printable(name),
        " ",
        (text, style),
        f" {printable(other)}: ",
        f"{amount} ",
        (f"(95 % interval {interval})", "label"),
    )


def _forgetting(report: Mapping[str, Any]) -> Table:
    """What each adapter does on rows of other kinds; what is above 0 was forgotten."""
    table = plain_table("", "also measured", "rows", "before", "after", "forgetting", "compared with")
    for adapter in report["adapters"]:
        for at, (name, one) in enumerate(adapter["also"].items()):
            lost = Text(f"{one['forgetting']:+.4f}", style="bad" if one["forgetting"] > 0 else "good")
            losses = number(one["before"]), number(one["after"])
            who = "" if at else _short(adapter["name"])
            table.add_row(who, _short(name), count(one["rows"]), *losses, lost, one["to"])
    return table


def _tasks(report: Mapping[str, Any]) -> Table:
    models = list(next(iter(report["tasks"].values())))
    table = Table(box=None, padding=(0, 3, 0, 0), pad_edge=False, header_style="label")
    table.add_column("task")
    table.add_column("")
    for name in models:
        table.add_column(_short(name), justify="right")
    for task, by_model in report["tasks"].items():
        metrics = [metric for metric in by_model[models[0]] if "_stderr" not in metric]
        for at, metric in enumerate(metrics):
            cells = [_with_error(by_model[name], metric) for name in models]
            table.add_row("" if at else printable(task), metric, *cells)
    return table


def _with_error(values: Mapping[str, float], metric: str) -> str:
    name, comma, kind = metric.partition(",")
    error = values.get(f"{name}_stderr{comma}{kind}")
    return number(values[metric]) + (f" ± {error:.4f}" if error is not None else "")


def shown_sample(sample: Mapping[str, Any]) -> Padding:
    grid = Table.grid(padding=(0, 3, 0, 0))
    grid.add_column(style="label", no_wrap=True)
    grid.add_column(overflow="fold")
    lines = [("prompt", sample["prompt"]), *(("right", text) for text in sample["references"])]
    for label, text in [*lines, *sample["answers"].items()]:
        style = "" if label in ("prompt", "right") else "accent"
        grid.add_row(
            _short(label),
            Text(middle_cut(printable(text), LONGEST_SHOWN) or "(nothing)", style=style),
        )
    return Padding(grid, (0, 0, 0, 2))
