"""The page `report.html`: a RunRecord to one HTML file with its style, pictures and few lines of script inside."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from dynlora_cli import plugins
from dynlora_cli.runs.documents import COLUMNS, documents, made_from
from dynlora_cli.runs.layer_grid import layer_grid
from dynlora_cli.runs.lineage import day, lineage
from dynlora_cli.runs.log import Event, RunRecord
from dynlora_cli.runs.report import svg
from dynlora_cli.runs.report.samples import prior_part, samples_part
from dynlora_cli.runs.report.svg import Series, text
from dynlora_cli.text import MEASURES, change, count, counted, duration, number, rate, short, size

ASSETS = Path(__file__).parents[2] / "assets"


def report_page(record: RunRecord) -> str:
    """The whole page for one run. Whatever the record lacks is left out, not shown as empty."""
    name = _name(record)
    style = (ASSETS / "report.css").read_text(encoding="utf-8")
    parts = (
        _header,
        _size_curve,
        _charts,
        samples_part,
        prior_part,
        _documents,
        _forgetting,
        _lineage,
        _ranks,
        _layer_table,
        _run_record,
    )
    sections = [part(record) for part in parts]
    return (
        '<!doctype html>\n<html lang="en">\n<head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{text(name)} · dynlora</title><style>\n{style}</style></head>\n<body>\n"
        f"{chr(10).join(section for section in sections if section)}\n</body>\n</html>\n"
    )


def _name(record: RunRecord) -> str:
    return record.info.get("name") or record.folder.resolve().name


def _header(record: RunRecord) -> str:
    info, summary, name = record.info, record.summary, _name(record)
    model = (info.get("base_model") or {}).get("name_or_path") or summary.get("model")
    policy = summary.get("policy") or ((info.get("recipe") or {}).get("pruning") or {}).get("policy")
    about = [
        model,
        info.get("task"),
        info.get("variant"),
        policy and f"policy {policy}",
        counted(record.last_step, "step") if record.last_step else "pruned after training",
    ]
    tiles = "".join(
        f"<div><dt>{text(label)}</dt><dd>{text(value)}<small>{text(note)}</small></dd></div>"
        for label, value, note in _tiles(record)
    )
    lead = " · ".join(text(part) for part in about if part)
    return f'<header><h1>{text(name)}</h1><p class="lead">{lead}</p><dl class="tiles">{tiles}</dl></header>'


def _tiles(record: RunRecord) -> Iterator[tuple[str, str, str]]:
    """(label, value, note) of the numbers that a reader wants first."""
    summary = record.summary
    held_out = [event.get("loss") for event in record.evals]
    before = summary.get("loss_before", held_out[0] if held_out else None)
    after = summary.get("loss_after", held_out[-1] if held_out else None)
    if after is not None:
        yield "held-out loss", number(after), f"from {number(before)}, {change(before, after)}"
    for key, label, show, _ in MEASURES[1:]:
        if summary.get(f"{key}_after") is not None:
            yield label, show(summary[f"{key}_after"]), f"from {show(summary.get(f'{key}_before'))}"
    if summary.get("parameters") is not None:
        budget = summary.get("budget_parameters")
        yield "trained parameters", short(summary["parameters"]), f"budget {short(budget)}" if budget else "no budget"
    if summary.get("components") is not None:
        yield "components", count(summary["components"]), f"from {count(summary.get('components_start'))}"
    if summary.get("seconds") is not None:
        yield (
            "time",
            duration(summary["seconds"]),
            f"{short(summary['tokens'])} tokens" if summary.get("tokens") else "",
        )
    if summary.get("learning_rate") is not None:
        spent = summary.get("rate_seconds")
        origin = f"{summary.get('learning_rate_from') or ''}{f', {duration(spent)}' if spent else ''}"
        yield "learning rate", rate(summary["learning_rate"]), origin
    if summary.get("tokens_per_second") is not None:
        yield "speed", f"{short(summary['tokens_per_second'])} tok/s", _speeds(summary)
    memory = record.info.get("peak_memory_bytes") or summary.get("peak_memory_bytes")
    if memory:
        yield "peak memory", size(memory), f"on {record.info['device']}" if record.info.get("device") else ""


def _speeds(summary: dict[str, Any]) -> str:
    start, end = summary.get("tokens_per_second_start"), summary.get("tokens_per_second_end")
    return f"{short(start)} at first, {short(end)} at the end" if start and end else ""


def _size_curve(record: RunRecord) -> str:
    """Loss against size, of an adapter that was pruned after training."""
    pruned = record.info.get("prune") or {}
    points = sorted(pruned.get("curve") or [], key=lambda point: point["parameters"])
    if not points:
        return ""
    chosen = record.summary.get("parameters")
    chart = partial(svg.line_chart, last_step=points[-1]["parameters"], x_unit="parameters", y_text=_plain, wide=True)
    loss = [(point["parameters"], point["loss"]) for point in points]
    energy = [(point["parameters"], point["energy"]) for point in points]
    heights = [y for _, y in loss if y is not None]
    here = [(chosen, y) for y in (min(heights), max(heights))] if heights and chosen else []
    figures = chart(
        "Held-out loss against size",
        [Series("measured", loss, "dots"), Series("this adapter", here, "dash")],
        unit="nats per token",
    ) + chart("Share of the update kept", [Series("‖ΔW‖²", energy, "dots")], unit="share")
    source, policy = text(pruned.get("from", "")), text(pruned.get("policy", ""))
    lead = f'<p class="muted">Cut from {source} by the policy {policy}, in one order of its components.</p>'
    return f'<h2>Loss against size</h2>{lead}<div class="charts">{figures}</div>'


def _charts(record: RunRecord) -> str:
    if not record.last_step:
        return ""  # pruned after training, with nothing trained since
    train, prunes = record.metrics, record.prunes
    loss = _column(train, "loss")
    budget = (record.info.get("budget") or {}).get("parameters") or record.summary.get("budget_parameters")
    ends = (0, record.last_step)
    limit = [Series("budget", [(step, budget) for step in ends], "dash")] if budget else []
    learned = [Series("", loss, "faint"), Series("training, smoothed", svg.smooth(loss))]
    held_out = [Series("held out", _column(record.evals, "loss"), "dots")]
    unit, own_unit = record.loss_in, plugins.unit(record.objective)
    accuracy = Series("held out", _column(record.evals, "accuracy"), "dots")
    # How sure a model has become of its preferences; there where an objective compares answers.
    margin = [Series("training", _column(train, "margin")), Series("held out", _column(record.evals, "margin"), "dots")]
    sides = (("chosen", "reward_chosen"), ("rejected", "reward_rejected"))
    rewards = [Series(f"{side}, held out", _column(record.evals, key), "dots") for side, key in sides]
    chart = partial(svg.line_chart, marks=[event["step"] for event in prunes], last_step=record.last_step)
    small = partial(chart, y_text=svg.axis_number, from_zero=True)
    figures = (
        chart("Loss in training", learned if own_unit else [], unit=own_unit or unit, y_text=_plain, wide=True),
        chart("Loss", [*([] if own_unit else learned), *held_out], unit=unit, y_text=_plain, wide=True),
        chart("Accuracy", [accuracy], unit="share right", y_text=_plain, wide=True),
        chart("Margin of the rewards", margin, unit="nats", y_text=_plain),
        chart("Rewards", rewards, unit="nats", y_text=_plain),
        small("Parameters alive", [Series("alive", _stairs(record, "parameters")), *limit], unit="parameters"),
        small("Components alive", [Series("", _stairs(record, "components"))], unit="components"),
        small("Step time", [Series("", _column(train, "step_seconds"))], unit="seconds per step"),
        small("Throughput", [Series("", _column(train, "tokens_per_second"))], unit="tokens per second"),
        small("Learning rate", [Series("", _column(train, "learning_rate"))], unit="per step"),
        svg.dumbbell_chart("Loss change at each prune event", _changes(prunes), unit=unit),
    )
    drawn = "".join(figures)
    return f'<h2>How it went</h2><div class="charts">{drawn}</div>' if drawn else ""


def _documents(record: RunRecord) -> str:
    """What it was made from."""
    rows = "".join(
        "<tr>" + "".join(f"<td>{text(cell)}</td>" for cell in row) + "</tr>" for row in documents(record.info)
    )
    head = "<thead><tr>" + "".join(f'<th scope="col">{column}</th>' for column in COLUMNS) + "</tr></thead>"
    table = f'<table class="list">{head}<tbody>{rows}</tbody></table>'
    lead = f'<p class="muted">{text(made_from(record.info))}</p>'
    return f'<h2>What it was made from</h2>{lead}<div class="tablewrap">{table}</div>' if rows else ""


def _forgetting(record: RunRecord) -> str:
    """What became of rows of other kinds."""
    also = record.summary.get("also") or {}
    rows = ""
    for name, one in also.items():
        cells = (count(one["rows"]), number(one["before"]), number(one["after"]), f"{one['forgetting']:+.4f}")
        rows += f"<tr><td>{text(name)}</td>" + "".join(f'<td class="n">{cell}</td>' for cell in cells) + "</tr>"
    heads = "".join(f'<th scope="col" class="n">{head}</th>' for head in ("rows", "before", "after", "forgetting"))
    head = f'<thead><tr><th scope="col">rows of</th>{heads}</tr></thead>'
    table = f'<table class="list">{head}<tbody>{rows}</tbody></table>'
    lead = f"Losses on rows of other kinds, in {record.loss_in}. Above 0 is worse than before this run."
    return f'<h2>Forgetting</h2><p class="muted">{lead}</p><div class="tablewrap">{table}</div>' if also else ""


def _lineage(record: RunRecord) -> str:
    """The runs that its components began in, where there are several."""
    rows = "".join(
        f"<tr><td>{text(run['name'])}</td><td>{text(day(run['date']))}</td><td>{text(run['did'])}</td>"
        f'<td class="n">{count(run["components"])}</td></tr>'
        for run in lineage(record.info)
    )
    heads = "".join(f'<th scope="col">{head}</th>' for head in ("run", "date", "what it did"))
    head = f'<thead><tr>{heads}<th scope="col" class="n">components left</th></tr></thead>'
    table = f'<table class="list">{head}<tbody>{rows}</tbody></table>'
    return f'<h2>Where its components come from</h2><div class="tablewrap">{table}</div>' if rows else ""


def _ranks(record: RunRecord) -> str:
    history = record.rank_history()
    if not history:
        return ""
    layers, (start, final) = record.layers, (history[0][1], history[-1][1])
    data = {
        "steps": [step for step, _ in history],
        "ranks": [[ranks.get(name, 0) for name in layers] for _, ranks in history],
        "start": [start.get(name, 0) for name in layers],
    }
    slider = (
        '<div class="slider"><button id="play" type="button">Play</button><input id="step" type="range" min="0" max="0"'
        ' aria-label="event to show"><span id="at"></span></div>'
    )
    code = (ASSETS / "report.js").read_text(encoding="utf-8")
    script = f'<script type="application/json" id="ranks">{json.dumps(data)}</script>\n<script>\n{code}</script>'
    several = len(history) > 1
    return (
        f'<h2>Rank map</h2><p class="muted">{text(_rank_sentence(start, final))}</p><div class="card">'
        f"{slider if several else ''}{svg.rank_map(layers, final, start)}"
        f"{svg.map_legend()}</div>"
        f"{script if several else ''}"
    )


def _rank_sentence(start: dict[str, int], final: dict[str, int]) -> str:
    """What the map says, in words."""
    total, kept = sum(start.values()), sum(final.values())
    empty = sum(1 for rank in final.values() if rank == 0)
    by_module: dict[str, list[int]] = {}
    for (_, module), name in layer_grid(final)[2].items():
        by_module.setdefault(module, []).append(final[name])
    richest = max(by_module, key=lambda module: sum(by_module[module]) / len(by_module[module]))
    mean = sum(by_module[richest]) / len(by_module[richest])
    return (
        f"Components per layer. {count(kept)} of {count(total)} are alive at the end, "
        f"{kept / len(final):.1f} per layer, most in {richest} ({mean:.1f} per layer); "
        f"{count(empty)} of {count(len(final))} layers kept none."
    )


def _layer_table(record: RunRecord) -> str:
    layers = record.info.get("layers") or {}
    if not layers:
        return ""
    most_rank = max(layer.get("rank") or 0 for layer in layers.values())
    most_important = max(layer.get("importance") or 0 for layer in layers.values())
    rows = ""
    for name, layer in sorted(layers.items(), key=lambda item: -(item[1].get("importance") or 0)):
        rank, importance = layer.get("rank") or 0, layer.get("importance")
        rows += (
            f"<tr{' class=gone' if rank == 0 else ''}><td>{text(name)}</td>"
            f'<td class="n">{text(layer.get("d_out", ""))} × {text(layer.get("d_in", ""))}</td>'
            f'<td class="n">{rank}</td><td>{svg.bar(rank, most_rank)}</td>'
            f'<td class="n">{"-" if importance is None else f"{importance:.3g}"}</td>'
            f"<td>{svg.bar(importance or 0, most_important)}</td></tr>"
        )
    head = (
        '<th scope="col">layer</th><th scope="col" class="n">out × in</th><th scope="col" class="n">rank</th><th></th>'
    )
    head += '<th scope="col" class="n">importance</th><th></th>'
    table = f'<table class="list"><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>'
    opened = " open" if len(layers) <= 30 else ""
    return (
        f"<h2>Layers</h2><details{opened}><summary>{count(len(layers))} layers by importance</summary>"
        f'<div class="tablewrap">{table}</div></details>'
    )


def _run_record(record: RunRecord) -> str:
    info = record.info
    facts = {key: info.get(key) for key in ("base_model", "device", "seeds", "versions", "timings", "adapter", "scale")}
    parts = []
    if info.get("recipe_yaml"):
        parts.append(("Recipe", f"<pre>{text(info['recipe_yaml'])}</pre>"))
    if info.get("data"):
        parts.append(("Data", _facts(info["data"])))
    if any(value is not None for value in facts.values()):
        parts.append(("Model, machine, versions, seeds", _facts(facts)))
    if record.rank_events:
        parts.append((f"{count(len(record.rank_events))} rank events", _event_table(record.rank_events)))
    body = "".join(f"<details><summary>{text(title)}</summary>{inside}</details>" for title, inside in parts)
    return f"<h2>Run record</h2>{body}" if body else ""


def _facts(tree: dict[str, Any]) -> str:
    rows = "".join(f'<tr><td>{text(k)}</td><td class="wrap">{text(v)}</td></tr>' for k, v in _flat(tree))
    return f'<div class="tablewrap"><table class="list"><tbody>{rows}</tbody></table></div>'


def _flat(tree: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """The leaves of a nested mapping as (dotted name, value), those that are null left out."""
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield from _flat(value, f"{path}.{key}" if path else str(key))
    elif isinstance(tree, list) and tree and all(isinstance(item, dict) for item in tree):
        for number, item in enumerate(tree):
            yield f"{path}.{number}", ", ".join(f"{key} {value}" for key, value in _flat(item))
    elif tree is not None:
        yield path, tree


def _event_table(events: Sequence[Event]) -> str:
    heads = ("step", "event", "components", "parameters", "target", "threshold", "predicted", "measured", "time")
    rows = ""
    for event in events:
        cells = (
            count(event["step"]),
            event["event"],
            f"{count(event.get('components_before'))} → {count(event.get('components'))}",
            f"{count(event.get('parameters_before'))} → {count(event.get('parameters'))}",
            count(event.get("target_parameters")),
            *(
                "-" if event.get(key) is None else f"{event[key]:.3g}"
                for key in ("threshold", "predicted_loss_change", "measured_loss_change")
            ),
            duration(event.get("seconds")),
        )
        rows += "<tr>" + "".join(f'<td class="n">{text(cell)}</td>' for cell in cells) + "</tr>"
    head = "".join(f'<th scope="col" class="n">{text(title)}</th>' for title in heads)
    return (
        f'<div class="tablewrap"><table class="list"><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'
    )


def _column(events: Sequence[Event], key: str) -> list[tuple[float, float | None]]:
    return [(event["step"], event.get(key)) for event in events]


def _changes(prunes: Sequence[Event]) -> list[tuple[float, float, float]]:
    """(step, predicted, measured) of the events that tell both."""
    keys = ("step", "predicted_loss_change", "measured_loss_change")
    return [
        (event[keys[0]], event[keys[1]], event[keys[2]])
        for event in prunes
        if all(event.get(k) is not None for k in keys)
    ]


def _stairs(record: RunRecord, key: str) -> list[tuple[float, float | None]]:
    """A count that changes only at events: level, drop, level."""
    points: list[tuple[float, float | None]] = []
    for event in record.prunes:
        if event.get(f"{key}_before") is not None:
            points += [(0 if not points else event["step"], event[f"{key}_before"])]
            points += [(event["step"], event[f"{key}_before"]), (event["step"], event.get(key))]
    if not points:
        return _column(record.metrics, key)
    return [*points, (record.last_step, points[-1][1])]


def _plain(value: float) -> str:
    return f"{value:.4g}"
