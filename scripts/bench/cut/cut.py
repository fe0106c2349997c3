"""Cutting adapters that other tools trained, on a real model: loss and forgetting against size, ours and the others' rules.

    python scripts/bench/cut/cut.py run --work FOLDER [--only e2e-16,gsm8k-16]   # what is missing in cut.jsonl
    python scripts/bench/cut/cut.py small|peft --work FOLDER      # trained at the small size; PEFT's own program
    python scripts/bench/cut/cut.py heal --work FOLDER [...]      # `dynlora prune --heal`, its rate and steps
    python scripts/bench/cut/cut.py table                         # writes cut.md and cut.svg again from cut.jsonl

Stock PEFT trains LoRA adapters as people have them (cut_model.py). Each is cut by every rule of cut_rules.py, by PEFT's own
`convert_to_lora` and by the policies of `dynlora prune`, these with at most the parameters that PEFT's rule left. Stock
PEFT loads what is left, and judges it by its loss on the test part and on general text. What an adapter trained at the
small size reaches stands beside them. The model is in DYNLORA_REAL_MODELS, data in DYNLORA_SHARED; adapters are kept in
FOLDER.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cut_rules as rules
import peft
import torch
from cut_tables import picture, table
from peft import PeftModel

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "cut.jsonl"
TRAINED = [("e2e", 16), ("gsm8k", 16), ("e2e", 64), ("gsm8k", 64)]  # those that are cut
SMALL = [("e2e", 4), ("gsm8k", 4), ("e2e", 1), ("gsm8k", 1)]  # trained at the size that a cut may leave
RATE, SEED = "5e-4", 0
SHARES = (0.9, 0.6, 0.3)  # of the squared singular values that PEFT's rule keeps; ours gets the sizes
OTHERS: list[tuple[str, float | None]] = [
    ("stable", None), ("hard_threshold", None), ("energy", 0.99), ("mp", None), ("gradience_layer", 0.9),
    ("gradience_median", 0.9), ("gradience_p90", 0.9), ("effective", None), ("kohya_ratio", 4.0),
    ("kohya_cumulative", 0.6),
]  # fmt: skip
SCALES = (0.85, 0.7)  # the whole update made weaker instead of smaller: the control for what cutting forgets less
FEW = [("mp", None), ("gradience_layer", 0.9), ("gradience_median", 0.9), ("effective", None)]
POLICIES = {"magnitude": False, "activation": True, "fisher": True}  # whether it looks at data
CALIBRATION_ROWS = 48
HEAL_ROWS = 240
HEALED = [
    ("magnitude", 0.0658, 10, 5e-4), ("magnitude", 0.0658, 10, 2e-4), ("activation", 0.25, 0, 0.0),
    ("activation", 0.25, 10, 5e-4), ("activation", 0.25, 10, 2e-4),
]  # fmt: skip
Result = dict[str, Any]


def read_results(path: Path = RESULTS) -> list[Result]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def folder_of(work: Path, task: str, rank: int) -> Path:
    return work / "adapters" / f"{task}-r{rank}-{RATE}-s{SEED}"


class Bench:
    """Measures one thing at a time, and nothing twice."""

    def __init__(self, work: Path) -> None:
        from cut_model import MODEL, TEST_ROWS, encode, general_rows, load_base, rows_of
        from transformers import AutoTokenizer

        self.work, self.results = work, read_results()
        self.base, self.tokenizer = load_base(), AutoTokenizer.from_pretrained(MODEL)
        self.base.requires_grad_(False)
        self.general = general_rows(self.tokenizer)
        self.tests = {t: encode(self.tokenizer, rows_of(work, t, "test")[:n]) for t, n in TEST_ROWS.items()}
        self.calibration = {task: work / f"{task}-calibration.jsonl" for task in TEST_ROWS}
        for task, path in self.calibration.items():
            rows = rows_of(work, task, "val")[:CALIBRATION_ROWS]
            path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")

    def known(self, adapter: str, method: str, parameter: float | None) -> Result | None:
        key = (adapter, method, parameter)
        return next((r for r in self.results if (r["adapter"], r["method"], r["parameter"]) == key), None)

    def judge(self, task: str, folder: Path | None) -> dict[str, float]:
        """Stock PEFT's losses with what is in the folder; without one, the base's."""
        from cut_model import loss_on

        model = PeftModel.from_pretrained(self.base, str(folder)) if folder else self.base
        losses = {"loss": loss_on(model, self.tests[task]), "general": loss_on(model, self.general)}
        if folder:
            self.base = model.unload()
        return losses

    def measure(
        self, adapter: str, method: str, parameter: float | None, make: Callable[[Path], dict[str, Any]] | None
    ) -> Result:
        """Make an adapter in a scratch folder, judge it, write its line. None: the base alone."""
        if found := self.known(adapter, method, parameter):
            return found
        out = self.work / "scratch" / f"{adapter}-{method}-{parameter}"
        out.mkdir(parents=True, exist_ok=True)
        facts = make(out) if make else {}
        result = {"adapter": adapter, "method": method, "parameter": parameter}
        result |= {"parameters": count(out) if make else 0, **facts}
        result |= self.judge(adapter.partition("-")[0], out if make else None)
        return self.write(result)

    def write(self, result: Result) -> Result:
        result |= {"date": time.strftime("%Y-%m-%d"), "peft": peft.__version__, "torch": torch.__version__}
        with RESULTS.open("a", encoding="utf-8") as file:
            file.write(json.dumps(result) + "\n")
        self.results.append(result)
        print(json.dumps({k: v for k, v in result.items() if k not in ("peft", "torch", "date")}), flush=True)
        return result


def count(adapter: Path) -> int:
    """Numbers in an adapter's file."""
    from safetensors.torch import load_file

    return sum(tensor.numel() for tensor in load_file(adapter / "adapter_model.safetensors").values())


def cut_by_ranks(adapter: Any, ranks: dict[str, int]) -> Any:
    """The best approximation with these ranks; `adapter` is in its SVD basis, largest first."""
    layers = {name: factors.keep(torch.arange(factors.rank) < ranks[name]) for name, factors in adapter.layers.items()}
    return adapter.with_layers(layers)


def sorted_svd(adapter: Any) -> Any:
    from dynlora_cli.lora.svd_basis import svd_factors

    return adapter.with_layers({name: f.turned(svd_factors) for name, f in adapter.layers.items()})


def saving(make: Callable[[], Any]) -> Callable[[Path], dict[str, Any]]:
    """Save what `make` gives, and say what it cost."""

    def save_it(out: Path) -> dict[str, Any]:
        from dynlora_cli.adapters.write import save

        started = time.process_time()
        adapter = make()
        seconds = time.process_time() - started
        save(adapter, out)
        return {"cpu": round(seconds, 2), "layers": len(adapter.layers), "largest": max(adapter.ranks.values())}

    return save_it


def orders(bench: Bench, adapter: Any, task: str) -> Callable[[str], tuple[Any, float]]:
    """The order of a policy and the seconds it cost, made when first asked for, as `dynlora prune` makes it."""
    from functools import cache

    from dynlora_cli import plugins
    from dynlora_cli.adapters.base import find_base, read_tokenizer
    from dynlora_cli.config.options import given
    from dynlora_cli.evaluation.rows import held_out_rows
    from dynlora_cli.pruning.posthoc import Order

    place = find_base(adapter)
    rows = held_out_rows(adapter, place, read_tokenizer(adapter, place), bench.calibration[task])
    pad = bench.tokenizer.pad_token_id

    @cache
    def order(policy: str) -> tuple[Any, float]:
        started = time.process_time()
        batches = (lambda: rows.batches(pad, bench.base.device)) if POLICIES[policy] else None
        model = bench.base if POLICIES[policy] else None
        with torch.enable_grad():
            bench.base.eval()
            made = Order.by_policy(
                adapter, plugins.load("policies", policy), model, batches, options=given("policies", policy, ())
            )
        return made, time.process_time() - started

    return order


def peft_itself(bench: Bench, source: Path, share: float) -> Callable[[Path], dict[str, Any]]:
    def convert(out: Path) -> dict[str, Any]:
        started = time.process_time()
        model = PeftModel.from_pretrained(bench.base, str(source))
        peft.save_as_lora(out, model, rank=share)
        bench.base = model.unload()
        return {"cpu": round(time.process_time() - started, 2)}

    return convert


def train_missing(work: Path, task: str, rank: int) -> Path:
    from cut_model import train

    folder = folder_of(work, task, rank)
    if not (folder / "made.json").is_file():
        made = train(work, task, rank, float(RATE), SEED, folder)
        (folder / "made.json").write_text(json.dumps(made), encoding="utf-8")
    return folder


def run_adapter(bench: Bench, task: str, rank: int, shares: list[float], few: bool) -> None:
    """Everything that is cut from one adapter."""
    from dynlora_cli.adapters.read import read_adapter

    source = train_missing(bench.work, task, rank)
    name, made = source.name, json.loads((source / "made.json").read_text(encoding="utf-8"))
    copied = lambda out: link(source, out) | {"cpu": made["cpu"]}  # noqa: E731
    bench.measure(f"{task}-base", "base", None, None)
    bench.measure(name, "uncut", None, copied)
    adapter = read_adapter(source)
    svd = sorted_svd(adapter)
    spectra = {
        n: rules.Spectrum(f.singular_values_C().tolist(), f.a_CI.shape[1], f.b_OC.shape[0])
        for n, f in svd.layers.items()
    }
    order = orders(bench, adapter, task)
    for share in shares:
        ranks = rules.energy(spectra, share)
        energy = bench.measure(name, "energy", share, saving(lambda r=ranks: cut_by_ranks(svd, r)))
        size = energy["parameters"]
        globally = rules.global_energy(spectra, size)
        bench.measure(name, "global_energy", share, saving(lambda r=globally: cut_by_ranks(svd, r)))
        for policy in POLICIES:
            if not bench.known(name, policy, share):
                made_order, seconds = order(policy)
                result = lambda o=made_order, s=size: o.cut(o.keep(s)[0])  # noqa: E731
                bench.measure(
                    name, policy, share, lambda out, m=result, s=seconds: saving(m)(out) | {"cpu": round(s, 2)}
                )
    for factor in SCALES:
        smaller = {n: dataclasses.replace(f, b_OC=factor * f.b_OC) for n, f in svd.layers.items()}
        bench.measure(name, "scaled", factor, saving(lambda layers=smaller: svd.with_layers(layers)))
    for rule, parameter in FEW if few else OTHERS:
        ranks = getattr(rules, rule)(spectra, parameter)
        bench.measure(name, rule, parameter, saving(lambda r=ranks: cut_by_ranks(svd, r)))


def heal_adapter(bench: Bench, task: str, rank: int) -> None:
    """As cut and as healed, on rows that the adapter was trained on."""
    from cut_model import rows_of

    from dynlora_cli.adapters.base import base_in_memory, find_base, read_tokenizer
    from dynlora_cli.adapters.read import read_adapter
    from dynlora_cli.config.load import load_recipe
    from dynlora_cli.training.healing.heal import heal

    source = train_missing(bench.work, task, rank)
    adapter, rows = read_adapter(source), bench.work / f"{task}-healing.jsonl"
    lines = rows_of(bench.work, task, "train")[:HEAL_ROWS]
    rows.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    recipe_file = bench.work / "heal.yaml"
    place = find_base(adapter)
    place = dataclasses.replace(place, options=place.options.model_copy(update={"dtype": "bfloat16"}))
    recipe_file.write_text(f"model: {place.folder}\ndataset: {{train: [{{path: {rows}}}], val_size: 0}}\n")
    order = orders(bench, adapter, task)
    for policy, share, steps, rate in HEALED:

        def make(
            out: Path, policy: str = policy, share: float = share, steps: int = steps, rate: float = rate
        ) -> dict[str, Any]:
            made, seconds = order(policy)
            cut = made.cut(made.keep(int(share * adapter.parameters))[0])
            started = time.process_time()
            if steps:
                recipe = load_recipe(recipe_file, [f"train.learning_rate={rate}", f"output_dir={out}-run"])
                base = base_in_memory(adapter, place, read_tokenizer(adapter, place))
                cut = heal(cut, base, recipe, steps, out, print)
            healing = round(time.process_time() - started, 1)
            return saving(lambda: cut)(out) | {"cpu": round(seconds, 2), "healing": healing}

        bench.measure(source.name, f"{policy} {share:g}" + (f" healed {steps}" if steps else ""), rate or None, make)


def link(source: Path, out: Path) -> dict[str, Any]:
    import shutil

    for file in source.iterdir():
        if file.is_file():
            shutil.copy2(file, out / file.name)
    return {}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=["run", "small", "peft", "heal", "table"])
    parser.add_argument("--work", type=Path, help="folder for adapters, outside the repository")
    parser.add_argument("--only", default="", help="adapters, such as e2e-16,gsm8k-16")
    parser.add_argument("--shares", default=",".join(map(str, SHARES)), help="sizes, as energy shares of PEFT's rule")
    parser.add_argument("--few", action="store_true", help="only the rules of others that differ most")
    options = parser.parse_args()
    if options.stage != "table":
        if not options.work:
            parser.error("--work FOLDER is missing")
        torch.set_num_threads(1)
        bench = Bench(options.work.resolve())
        wanted = [tuple(cell.split("-")) for cell in options.only.split(",") if cell]
        cells = [(task, int(rank)) for task, rank in wanted] or (SMALL if options.stage == "small" else TRAINED)
        for task, rank in cells:
            if options.stage == "run":
                run_adapter(bench, task, rank, list(map(float, options.shares.split(","))), options.few)
            elif options.stage == "heal":
                heal_adapter(bench, task, rank)
            elif options.stage == "small":
                source = train_missing(bench.work, task, rank)
                cpu = json.loads((source / "made.json").read_text(encoding="utf-8"))["cpu"]
                bench.measure(source.name, "trained", None, lambda out, s=source, c=cpu: link(s, out) | {"cpu": c})
            elif options.stage == "peft":
                source = train_missing(bench.work, task, rank)
                for share in SHARES[:1]:
                    bench.measure(source.name, "convert_to_lora", share, peft_itself(bench, source, share))
    results = read_results()
    (HERE / "cut.md").write_text(table(results), encoding="utf-8")
    if drawn := picture(results):
        (HERE / "cut.svg").write_text(drawn, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
