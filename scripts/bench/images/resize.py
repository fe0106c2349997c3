"""Image adapters made smaller: one threshold for the whole file, against the rules of kohya's resize_lora, at equal size.

    python scripts/bench/images/resize.py FILE... [--pipeline FOLDER] [--budgets 0.5,0.25,0.125] [--out LINES.jsonl]

Kohya's script truncates each layer by itself, by a number that is the same for all layers:

    fixed          so many singular directions
    sv_ratio       those above the layer's largest singular value divided by it
    sv_fro         as many as hold this share of the layer's ‖ΔW‖
    sv_cumulative  as many as hold this share of the sum of its singular values

For each budget the number is found at which a rule fills it best; `dynlora prune --policy magnitude` then gets exactly
the size that the rule reached. Two things are measured, each as a share of what the whole adapter does:

    update   ‖ΔW - ΔW'‖² / ‖ΔW‖², which one threshold makes smallest by construction
    output   with --pipeline: mean ‖ε' - ε‖² / mean ‖ε - ε₀‖², ε of the denoiser with the whole adapter, ε' with the small
             one, ε₀ without any, on the mixtures that the pipeline with the whole adapter goes through as it draws

Only the denoiser's layers count for the output. Rules: sd-scripts, networks/resize_lora.py.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dynlora_cli import plugins
from dynlora_cli.adapters.adapter import Adapter
from dynlora_cli.adapters.images.names import DENOISERS
from dynlora_cli.adapters.images.of_run import as_image
from dynlora_cli.adapters.read import read_adapter
from dynlora_cli.lora.svd_basis import svd_factors
from dynlora_cli.pruning.posthoc import Order

Kept = dict[str, int]  # singular directions that stay, by layer
Spectra = Mapping[str, Tensor]
CAPTIONS = ("a photo", "a drawing of a face", "a red thing", "an animal")
STEPS = 8


def fixed(values: Tensor, number: float) -> int:
    """So many."""
    return min(len(values), max(1, round(number)))


def sv_ratio(values: Tensor, number: float) -> int:
    """Above the largest, divided by the number."""
    return max(1, int((values > values[0] / number).sum()))


def sv_cumulative(values: Tensor, number: float) -> int:
    """A share of the sum."""
    return _first(values.cumsum(0) / values.sum(), number)


def sv_fro(values: Tensor, number: float) -> int:
    """A share of the norm, so its square of the sum of squares."""
    return _first(values.square().cumsum(0) / values.square().sum(), number**2)


def _first(shares: Tensor, wanted: float) -> int:
    return max(1, min(int(torch.searchsorted(shares, wanted)) + 1, len(shares)))


# By rule: what it does, and numbers between which its sizes go from smallest to largest.
RULES: dict[str, tuple[Callable[[Tensor, float], int], float, float]] = {
    "fixed": (fixed, 1, 1024),
    "sv_ratio": (sv_ratio, 1 + 1e-9, 1e6),
    "sv_fro": (sv_fro, 1e-6, 1),
    "sv_cumulative": (sv_cumulative, 1e-6, 1),
}


def by_rule(rule: str, spectra: Spectra, costs: Mapping[str, int], most: int) -> tuple[Kept, float]:
    """What a rule keeps where it may keep so many numbers, and the number of the rule at which it does.

    A rule keeps a direction in each layer, so its smallest size may be more than that.
    """
    keep, low, high = RULES[rule]

    def kept(number: float) -> Kept:
        return {name: keep(values, number) for name, values in spectra.items()}

    if size(kept(high), costs) <= most:
        return kept(high), high
    for _ in range(60):
        middle = (low * high) ** 0.5
        low, high = (middle, high) if size(kept(middle), costs) <= most else (low, middle)
    return kept(low), low


def size(kept: Kept, costs: Mapping[str, int]) -> int:
    """Numbers that so many directions hold."""
    return sum(count * costs[name] for name, count in kept.items())


def truncated(adapter: Adapter, kept: Kept) -> Adapter:
    """The adapter, whose components are singular directions, with the first of each layer."""
    return adapter.with_layers({name: f.keep(torch.arange(f.rank) < kept[name]) for name, f in adapter.layers.items()})


def lost(whole: Adapter, small: Adapter) -> float:
    """‖ΔW - ΔW'‖² / ‖ΔW‖², of an adapter and some of its singular directions."""
    energies = [sum(f.energy() ** 2 for f in each.layers.values()) for each in (whole, small)]
    return 1 - energies[1] / energies[0]


class Outputs:
    """What a denoiser says on mixtures that the whole adapter goes through."""

    def __init__(self, folder: Path, adapter: Adapter, captions: list[str]) -> None:
        from dynlora_cli.models.pipelines.denoiser import load_denoiser
        from dynlora_cli.tasks.images.pipeline import Pipeline
        from dynlora_cli.tasks.images.sampling import sample

        pipeline = Pipeline(folder)
        self.part = next(part for part in DENOISERS if (folder / part).is_dir())
        self.model: Any = load_denoiser(folder / self.part, torch.float32, torch.device("cpu")).eval()
        self.inputs: list[dict[str, Any]] = []
        with self.having(adapter):
            hook = self.model.register_forward_pre_hook(self._see, with_kwargs=True)
            sample(pipeline, self.model, captions, steps=STEPS, guidance=1.0)
            hook.remove()
            self.whole = self._said()
        self.effect = self._distance(self._said())

    def _see(self, _: Any, args: tuple[Any, ...], given: dict[str, Any]) -> None:
        assert not args
        self.inputs.append(given)

    @contextmanager
    def having(self, adapter: Adapter) -> Iterator[None]:
        """The denoiser with an adapter in its weights."""
        modules = dict(self.model.named_modules())
        before: dict[str, Tensor] = {}
        for name, factors in adapter.layers.items():
            part, _, path = name.partition(".")
            if part == self.part:
                weight = modules[path].weight.data
                before[path] = weight.clone()
                weight += factors.delta_OI().reshape(weight.shape)
        yield
        for path, weight in before.items():
            modules[path].weight.data.copy_(weight)

    @torch.no_grad()
    def _said(self) -> list[Tensor]:
        return [self.model(**given)[0].double() for given in self.inputs]

    def _distance(self, said: list[Tensor]) -> float:
        return sum(float((one - two).square().sum()) for one, two in zip(said, self.whole, strict=True))

    def lost(self, small: Adapter) -> float:
        """The share of the adapter's effect on the output that a smaller one does not have."""
        with self.having(small):
            return self._distance(self._said()) / self.effect


def compared(adapter: Adapter, budgets: list[float], outputs: Outputs | None) -> Iterator[dict[str, Any]]:
    """A line for every budget and rule, with the one threshold at the size of the rule beside it."""
    turned = adapter.with_layers({name: f.turned(svd_factors) for name, f in adapter.layers.items()})
    spectra = {name: f.singular_values_C() for name, f in turned.layers.items()}
    costs = {name: f.cost for name, f in turned.layers.items()}
    order = Order.by_policy(adapter, plugins.load("policies", "magnitude"), None, None)
    for budget in budgets:
        for rule in RULES:
            kept, number = by_rule(rule, spectra, costs, int(budget * adapter.parameters))
            theirs, ours = truncated(turned, kept), order.cut(order.keep(size(kept, costs))[0])
            line: dict[str, Any] = {"budget": budget, "rule": rule, "number": number}
            for name, small in (("theirs", theirs), ("ours", ours)):
                line[name] = {"parameters": small.parameters, "update": lost(adapter, small)}
                if outputs:
                    line[name]["output"] = outputs.lost(small)
            yield line


def table(lines: list[dict[str, Any]]) -> str:
    """Means over files, as Markdown."""
    measures = [key for key in ("update", "output") if key in lines[0]["ours"]]
    head = ["budget", "rule", "size", *(f"{key} lost: {who}" for key in measures for who in ("rule", "one threshold"))]
    rows = [head, ["---:", "---", *["---:"] * (len(head) - 2)]]
    for budget, rule in dict.fromkeys((line["budget"], line["rule"]) for line in lines):
        of = [line for line in lines if (line["budget"], line["rule"]) == (budget, rule)]
        share = sum(line["theirs"]["parameters"] / line["parameters"] for line in of) / len(of)
        means = [sum(line[who][key] for line in of) / len(of) for key in measures for who in ("theirs", "ours")]
        rows.append([f"{budget:g}", rule, f"{share:.3f}", *(f"{mean:.2%}" for mean in means)])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def main(arguments: list[str] | None = None) -> None:
    """Compare, write lines as they come, and show the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("files", nargs="+", type=Path, help="files of image adapters, or folders with one")
    parser.add_argument("--pipeline", type=Path, help="the folder of their pipeline, to measure outputs")
    parser.add_argument("--captions", type=Path, help="a file with a caption on each line")
    parser.add_argument("--budgets", default="0.5,0.25,0.125")
    parser.add_argument("--out", type=Path, help="JSONL that lines are added to")
    wanted = parser.parse_args(arguments)
    captions = wanted.captions.read_text(encoding="utf-8").splitlines() if wanted.captions else list(CAPTIONS)
    lines = []
    for file in wanted.files:
        adapter = as_image(read_adapter(file, images=True))
        if adapter is None:
            sys.exit(f"{file} is no adapter of a diffusion pipeline")
        if adapter.schedule:
            sys.exit(f"{file} is a T-LoRA, whose components have an order that no rule here keeps")
        outputs = Outputs(wanted.pipeline, adapter, captions) if wanted.pipeline else None
        for line in compared(adapter, [float(text) for text in wanted.budgets.split(",")], outputs):
            lines.append({"file": str(file), "parameters": adapter.parameters, **line})
            if wanted.out:
                with wanted.out.open("a", encoding="utf-8") as handle:
                    handle.write(json.dumps(lines[-1]) + "\n")
    print(table(lines))


if __name__ == "__main__":
    main()
