"""What a person sees of prune, merge, export and inspect. To stderr, like all that is for people."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from dynlora_cli.cli.views.console import Console, pairs, plain_table
from dynlora_cli.cli.views.progress import joined, printable
from dynlora_cli.cli.views.rank_map import rank_map
from dynlora_cli.runs.lineage import DID, day
from dynlora_cli.runs.log import Event
from dynlora_cli.text import change, count, counted, duration, number, percent, size

BAR = 24  # characters
MAP_LINES = 20  # of the map under a curve, so that both are on one screen


class AdapterView:
    """A listener of these commands' events, and the tables of what came out."""

    def __init__(self, console: Console) -> None:
        self.console = console

    def __call__(self, event: Event) -> None:
        if event["event"] == "note":
            self.console.note(event["text"])
        elif event["event"] == "point":
            facts = f"{counted(event['parameters'], 'parameter')}, {counted(event['components'], 'component')}"
            self.console.sentence(f"held-out loss {number(event['loss'])}  at {facts}")

    def show_pruned(self, summary: dict[str, Any]) -> None:
        """Before and after, loss against size, and what each layer kept."""
        head = Text.assemble(
            ("Pruned", "bold green"),
            (f" to {percent(summary['parameters'] / summary['parameters_start'])} of its parameters", "head"),
            (f"   policy {summary['policy']}, {duration(summary['seconds'])}", "label"),
        )
        parts: list[RenderableType] = [Text(), head, Text(), _before_after(summary)]
        if summary["curve"]:
            measured = summary["curve"][0]["loss"] is not None
            title = "Loss against size" if measured else "Share of the update against size"
            parts += [Text(), Text(title, style="head"), _curve(summary)]
        before = {**dict.fromkeys(summary["ranks"], 0), **summary["ranks_before"]}
        parts += [Text(), rank_map(summary["ranks"], before, self.console.rich.width - 2, MAP_LINES)]
        parts += [Text(), Text.assemble(("adapter  ", "label"), summary["output_dir"])]
        self.console.show(Group(*parts))

    def show_retired(self, summary: dict[str, Any]) -> None:
        """Whether what is left is what there was before, and what changed on the rows of every run."""
        names = " and ".join(birth["name"] for birth in summary["born"])
        gone = counted(summary["components_start"] - summary["components"], "component")
        head = Text.assemble(
            ("Retired", "bold green"), (f" {names}: {gone}", "head"), (f"   {duration(summary['seconds'])}", "label")
        )
        parts: list[RenderableType] = [Text(), head, Text(), Text(printable(summary["words"]))]
        if summary["rows_by_update"]:
            parts += [Text(), Text("Held-out loss", style="head"), _by_update(summary["rows_by_update"])]
        if summary["agreement"]:
            same, kl = summary["agreement"]["same_choice"], summary["agreement"]["kl"]
            unrelated = f"on unrelated text: the same choice at {same:.1%} of the positions, KL {kl:.1e} nats"
            parts += [Text(), Text(unrelated, style="label")]
        before = {**dict.fromkeys(summary["ranks"], 0), **summary["ranks_before"]}
        parts += [Text(), rank_map(summary["ranks"], before, self.console.rich.width - 2, 40)]
        parts += [Text(), Text.assemble(("adapter  ", "label"), summary["output_dir"])]
        if summary["next"]:
            parts.append(Text.assemble(("to train what is left for some steps  ", "label"), summary["next"]))
        self.console.show(Group(*parts))

    def show_merged(self, summary: dict[str, Any]) -> None:
        """What was merged, and how well it agrees."""
        if summary["into"] == "adapter":
            head = f" {len(summary['adapters'])} adapters into one"
            rows = [
                ("method", f"{summary['method']}, weights {', '.join(f'{w:g}' for w in summary['weights'])}"),
                ("parameters", f"{count(summary['parameters'])}, of {count(summary['parameters_start'])} together"),
                ("update kept", f"{percent(summary['energy_kept'])} of ‖ΔW‖²"),
            ]
        elif summary["into"] == "pipeline":
            head = f" {counted(summary['modules'], 'layer')} into the pipeline"
            rows = [
                ("base", summary["base_model"]),
                ("layers", ", ".join(f"{part} {layers}" for part, layers in summary["layers"].items())),
                *((name, ", ".join(dtypes)) for name, dtypes in summary["dtypes"].items()),
            ]
            if summary["rounding"]:
                rows.append(("lost by rounding", f"{summary['rounding']:.2%} of the update"))
        else:
            head = f" {summary['modules']} of {summary['modules']} modules into the base"
            rows = [
                ("base", f"{summary['base_model']}, {summary['base_weights']} weights"),
                *_agreement(summary["check"], vectors=summary.get("compared") == "vectors"),
            ]
            if summary["trained_base"]:
                rows.append(("", "and against the quantized base that training saw:"))
                rows += _agreement(summary["trained_base"])
            if summary["untied"]:
                rows.append(("untied", "input table and output head now have a weight each"))
        self._done("Merged", head, rows, summary)

    def show_exported(self, summary: dict[str, Any]) -> None:
        """The files, and how well they agree."""
        rows = [(name, size(file["bytes"])) for name, file in summary["files"].items()]
        if summary.get("check"):
            rows += _agreement(summary["check"])
        else:
            rows.append(("largest |ΔW| difference", f"{summary['max_weight_difference']:.1e}"))
        for note in summary["notes"]:
            self.console.note(note)
        if pushed := summary.get("pushed"):
            rows.append(("on the hub", f"{pushed['url']}, {'private' if pushed['private'] else 'public'}"))
        self._done("Exported", f" to {summary['to']}", rows, summary)

    def show_exported_library(self, summary: dict[str, Any]) -> None:
        """The adapters, and how well the one that agrees least does."""
        adapters = summary["adapters"]
        rows = [(name, f"rank {facts['largest_rank']}") for name, facts in adapters.items()]
        checks = [facts["check"] for facts in adapters.values() if facts.get("check")]
        if checks:
            rows += _agreement(max(checks, key=lambda check: check["kl"]))
        else:
            worst = max(facts["max_weight_difference"] for facts in adapters.values())
            rows.append(("largest |ΔW| difference", f"{worst:.1e}"))
        head = f" {counted(len(adapters), 'adapter')} to {summary['to']}"
        self._done("Exported", head, rows, summary)
        if start := summary.get("start"):
            self.console.show_next([shlex.join([f"{summary['output_dir']}/{start}"])])

    def _done(self, done: str, head: str, rows: Sequence[tuple[str, str]], summary: dict[str, Any]) -> None:
        title = Text.assemble((done, "bold green"), (head, "head"), (f"   {duration(summary['seconds'])}", "label"))
        folder = Text.assemble(("folder  ", "label"), summary["output_dir"])
        self.console.show(Group(Text(), title, Text(), pairs(rows), Text(), folder))

    def show_inspected(self, found: dict[str, Any]) -> None:
        """One adapter, or two side by side."""
        for note in found["notes"]:
            self.console.note(note)
        for adapter in found["adapters"]:
            self._show_adapter(adapter)
        if "comparison" in found:
            self.console.show(Group(Text(), Text("Side by side", style="head"), _side_by_side(found)))

    def _show_router(self, adapter: dict[str, Any]) -> None:
        rows = [
            ("kind", f"{adapter['kind']}, {adapter['task']}"),
            ("options", ", ".join(f"{key}: {value}" for key, value in adapter["options"].items())),
            ("size", f"{count(adapter['parameters'])} parameters, {size(adapter['bytes'])}"),
            ("router's own", f"{count(adapter['router_parameters'])} parameters"),
            *((key.replace("_", " "), _plain(value)) for key, value in adapter["provenance"].items()),
        ]
        members = plain_table("adapter", "kind", "layers", "components", "parameters", "")
        for one in adapter["adapters"]:
            sizes = (count(one[key]) for key in ("layers", "components", "parameters"))
            members.add_row(printable(one["name"]), one["kind"], *sizes, "off" if one["off"] else "")
        numbers = plain_table("router", "shape", "norm")
        for name, tensor in adapter["router"].items():
            numbers.add_row(printable(name), " x ".join(map(str, tensor["shape"])), number(tensor["norm"]))
        head = Text(printable(adapter["name"]), style="head")
        self.console.show(Group(Text(), head, pairs(rows), Text(), members, Text(), numbers))

    def _show_hypernet(self, adapter: dict[str, Any]) -> None:
        source = f"a {adapter['reads']}" + (f", read by {adapter['encoder']}" if adapter["encoder"] else "")
        rows = [
            ("kind", adapter["kind"]),
            ("options", ", ".join(f"{key}: {value}" for key, value in adapter["options"].items())),
            ("size", f"{count(adapter['parameters'])} parameters, {size(adapter['bytes'])}"),
            ("writes from", source),
            ("writes", f"{count(adapter['written_parameters'])} parameters, of which a budget keeps the largest"),
            ("budget", f"{count(adapter['budget_parameters'])} parameters, where --budget does not say"),
            *((key, _plain(value)) for key, value in adapter["provenance"].items()),
        ]
        layers = plain_table("layer", "out x in", "components")
        for name, (d_out, d_in, rank) in adapter["hypernet"].items():
            layers.add_row(printable(name), f"{d_out} x {d_in}", count(rank))
        head = Text(printable(adapter["name"]), style="head")
        self.console.show(Group(Text(), head, pairs(rows), Text(), layers))

    def _show_adapter(self, adapter: dict[str, Any]) -> None:
        if "hypernet" in adapter:
            self._show_hypernet(adapter)
            return
        if "router" in adapter:
            self._show_router(adapter)
            return
        layers = adapter["layers"]
        ranks = {name: layer["rank"] for name, layer in layers.items()}
        largest = max(ranks.values(), default=0)
        directions = ", ".join(f"{share} in {number}" for share, number in adapter["directions"].items())
        rows = [
            ("kind", f"{adapter['kind']}, {adapter['task']}"),
            ("size", f"{count(adapter['parameters'])} parameters, {size(adapter['bytes'])}"),
            *_of_pipeline(adapter),
            (
                "components",
                f"{count(adapter['components'])}, average rank {adapter['average_rank']:.2f}, 0 to {largest}",
            ),
            *([("in use", _in_use(plan))] if (plan := adapter.get("rank_by_timestep")) else []),
            ("energy", f"{directions} of {sum(len(layer['spectrum']) for layer in layers.values())} directions"),
            *_beside_components(adapter),
            *((key.replace("_", " "), printable(_plain(value))) for key, value in adapter["provenance"].items()),
        ]
        if not ranks:
            self.console.show(Group(Text(), Text(printable(adapter["name"]), style="head"), pairs(rows)))
            return
        map_ = rank_map(ranks, dict.fromkeys(ranks, largest), self.console.rich.width - 2, 40)
        self.console.show(
            Group(
                Text(),
                Text(printable(adapter["name"]), style="head"),
                pairs(rows),
                *([Text(), _births(adapter["births"])] if len(adapter["births"]) > 1 else []),
                Text(),
                map_,
                Text(),
                _layer_table(layers),
            )
        )


def _of_pipeline(adapter: dict[str, Any]) -> list[tuple[str, str]]:
    """The form of the file of a pipeline's adapter, and what it has in each part of the pipeline."""
    rows = [("file", f"{adapter['file_form']}, {adapter['dtype']}")] if "file_form" in adapter else []
    for part, sizes in adapter.get("parts", {}).items():
        convolutions = f", {count(sizes['convolutions'])} of them convolutions" if sizes["convolutions"] else ""
        layers = f"{counted(sizes['layers'], 'layer')}{convolutions}"
        held = f"{count(sizes['components'])} components, {count(sizes['parameters'])} parameters"
        rows.append((part, f"{layers}; {held}"))
    return rows


def _agreement(check: dict[str, Any], *, vectors: bool = False) -> list[tuple[str, str]]:
    largest = f"{check['max_logit_difference']:.1e}"
    if vectors:  # in which the largest number is no choice
        return [("largest difference", f"{largest}, of numbers up to {check['max_logit']:.1f} in the vectors of texts")]
    rows = [
        ("largest |Δlogit|", f"{largest}, of logits up to {check['max_logit']:.1f}"),
        ("KL", f"{check['kl']:.1e} nats per position, over {count(check['positions'])}"),
        ("other choices", f"at {1 - check['same_choice']:.1%}, at {check['changed']:.1%} more than rounding explains"),
    ]
    if check["loss"] is not None:
        rows.append(("loss on the probe", f"{number(check['loss_reference'])} before, {number(check['loss'])} now"))
    return rows


def _beside_components(adapter: dict[str, Any]) -> list[tuple[str, str]]:
    """What an adapter has beside its components: whole tensors, rows of tables, biases."""
    biases = adapter["biases"]
    whole = {name: shape for name, shape in adapter["whole_tensors"].items() if name not in biases}
    rows = [(f"whole {printable(name)}", " x ".join(map(str, shape))) for name, shape in whole.items()]
    for table, tokens in adapter["token_rows"].items():
        texts = adapter["token_texts"]
        named = [printable(f"{texts[token]!r} ({token})") if token in texts else str(token) for token in tokens[:8]]
        some = ", ".join(named) + (", ..." if len(tokens) > 8 else "")
        rows.append((f"rows of {printable(table)}", f"{counted(len(tokens), 'token')}: {some}"))
    if biases:
        rows.append(("biases", f"{len(biases)} in place of the base's, such as {printable(biases[0])}"))
    if adapter["lora_bias"]:
        rows.append(("lora_bias", f"added in {counted(adapter['lora_bias'], 'layer')}"))
    return rows


def _births(births: Sequence[dict[str, Any]]) -> RenderableType:
    """The runs that the components began in, and what is left of each."""
    table = plain_table("born in", "date", "components", "parameters", "energy", "")
    for birth in births:
        cells = (count(birth["components"]), count(birth["parameters"]), f"{birth['energy']:.3g}")
        table.add_row(printable(birth["name"]), printable(day(birth["date"])), *cells, Text(DID[birth["old"]], "label"))
    return table


def _layer_table(layers: dict[str, Any]) -> RenderableType:
    """Rank (by birth, where there are several), energy and spectrum of every layer, as bars from its largest value."""
    table = plain_table("layer", "out x in", "rank", "energy", "")
    highest = max((layer["energy"] for layer in layers.values()), default=0.0) or 1.0
    for name, layer in layers.items():
        spectrum = _bars(layer["spectrum"])
        style = "accent" if layer["energy"] > 0.5 * highest else "label"
        ranks = " + ".join(map(count, layer["born"])) if len(layer["born"]) > 1 else count(layer["rank"])
        cells = (f"{layer['d_out']} x {layer['d_in']}", ranks, f"{layer['energy']:.3g}")
        table.add_row(name, *cells, Text(spectrum, style=style))
    return table


def _bars(values: Sequence[float]) -> str:
    """Singular values as blocks, the largest full; only the first ones where there are many."""
    blocks = "▁▂▃▄▅▆▇█"
    largest = max(values, default=0.0) or 1.0
    return "".join(blocks[min(7, int(8 * value / largest))] for value in values[:BAR])


def _side_by_side(found: dict[str, Any]) -> RenderableType:
    first, second = (adapter["name"] for adapter in found["adapters"])
    table = plain_table("layer", f"rank {first}", f"rank {second}", "energy", "energy", "cosine")
    for name, layer in found["comparison"]["layers"].items():
        cosine = "" if layer["cosine"] is None else f"{layer['cosine']:+.3f}"
        energies = [f"{energy:.3g}" for energy in layer["energies"]]
        table.add_row(name, *map(count, layer["ranks"]), *energies, cosine)
    whole = found["comparison"]["cosine"]
    table.add_row("all", "", "", "", "", "" if whole is None else f"{whole:+.3f}")
    return table


def _in_use(plan: dict[str, Any]) -> str:
    """How many components a T-LoRA uses when."""
    least, most = f"{plan['min_rank']} at least", f"T = {plan['timesteps']:g}"
    share = {"falling": "(T - t) / T", "rising": "t / T"}.get(plan["shape"], "a drawn share")
    return f"{share} of a layer's, {least}; {most}" + (f", power {plan['power']:g}" if plan["power"] != 1 else "")


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        inner = {key: item for key, item in value.items() if not isinstance(item, (list, dict)) and item is not None}
        return ", ".join(f"{key} {item}" for key, item in inner.items())
    if isinstance(value, list):
        return "; ".join(map(_plain, value))
    return str(value)


def _before_after(summary: dict[str, Any]) -> RenderableType:
    table = plain_table("", "before", "after", "")
    table.columns[0].style, table.columns[2].style = "label", "head"
    before, after = summary["loss_before"], summary["loss_after"]
    if after is not None:
        table.add_row("held-out loss", number(before), number(after), change(before, after))
    for key in ("parameters", "components"):
        table.add_row(key, count(summary[f"{key}_start"]), count(summary[key]), "")
    most = f"budget {count(summary['budget_bytes'])}" if summary.get("budget_bytes") else ""
    table.add_row("bytes of the file", "", count(summary.get("adapter_bytes")), joined(most, summary.get("save_dtype")))
    table.add_row("update kept", "", percent(summary["energy_kept"]), "of ‖ΔW‖²")
    return table


def _by_update(rows: Sequence[dict[str, Any]]) -> RenderableType:
    table = plain_table("rows of", "rows", "before", "after", "")
    for line in rows:
        name = printable(line["update"]) + (" (retired)" if line["retired"] else "")
        before, after = line["loss_before"], line["loss_after"]
        moved = "" if after is None else change(before, after)
        table.add_row(name, count(line["rows"]), number(before), number(after), moved)
    return table


def _curve(summary: dict[str, Any]) -> RenderableType:
    points: Sequence[dict[str, Any]] = summary["curve"]
    measured = points[0]["loss"] is not None
    heads = ("parameters", "components", "update kept", *(["held-out loss"] if measured else []), "")
    table = plain_table(*heads)
    values = [point["loss"] if measured else point["energy"] for point in points]
    lowest, highest = min(values), max(values)
    for point, value in zip(points, values, strict=True):
        share = (value - lowest) / (highest - lowest) if highest > lowest else 0.0
        chosen = point["parameters"] == summary["parameters"]
        bar = Text("█" * (1 + round((BAR - 1) * share)), style="accent" if chosen else "label")
        if chosen:
            bar.append("  ← this one", style="accent")
        cells = [count(point["parameters"]), count(point["components"]), percent(point["energy"])]
        table.add_row(*cells, *([number(point["loss"])] if measured else []), bar)
    return table
