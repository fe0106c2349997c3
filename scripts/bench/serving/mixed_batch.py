"""What does a batch cost whose rows use different adapters? Against the base alone, one adapter after another, and PEFT.

    python scripts/bench/serving/mixed_batch.py          # writes mixed_batch.jsonl; about ten minutes on one core
    python scripts/bench/serving/mixed_batch.py --models wide --adapters 2     # measures these lines anew
    python scripts/bench/serving/mixed_batch.py --ways   # one layer, each way to compute it; prints a table

Rows use k adapters in random order (rank 8, every linear layer but the head); a batch has max(8, k) rows. Prefill is 128 tokens
of each, decode one more token behind a cache of 16. Every number is process time on one thread, of the same round; all
methods take turns in it, and ratios are to the base alone in that round. Four things are compared:

    bank      dynlora_cli/adapters/bank.py: one mixed batch
    peft      stock PEFT's `adapter_names`: one mixed batch
    merged    k models, each with its adapter merged, run on its rows one after the other (merging is not counted)
    base      the base alone on all rows: the floor

Memory is counted in the bytes of tensors: the base with the adapters, what the bank copies while a batch runs, and k
merged models. Logits of bank and PEFT are compared before anything is measured.
The trained model is in DYNLORA_SHARED (../shared); the other one is random.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from dynlora_cli.adapters.adapter import Adapter, Factors
from dynlora_cli.adapters.bank import Bank
from dynlora_cli.lora.multi import Choice, MultiLinear
from dynlora_cli.lora.ways.plan import Plan

SHARED = Path(os.environ.get("DYNLORA_SHARED", "../shared")).resolve()
WIDE = LlamaConfig(
    vocab_size=4096, hidden_size=512, intermediate_size=1408, num_hidden_layers=8, num_attention_heads=8,
    num_key_value_heads=4, max_position_embeddings=512,
)  # fmt: skip
RANK, PROMPT, CACHED, DECODED = 8, 128, 16, 10
Step = Callable[[], float]


def a_model(name: str) -> Any:
    torch.manual_seed(0)
    model = LlamaForCausalLM(WIDE) if name == "wide" else AutoModelForCausalLM.from_pretrained(SHARED / "models" / name)
    return model.eval().requires_grad_(False)


def by_peft(model: Any, count: int) -> tuple[Any, dict[str, Adapter]]:
    """The model with random adapters as PEFT holds them, and the same as ours."""
    config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped: Any = get_peft_model(model, config, adapter_name="a0")
        for number in range(1, count):
            wrapped.add_adapter(f"a{number}", config)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.02, generator=generator)
    layers: dict[str, dict[str, Factors]] = {f"a{number}": {} for number in range(count)}
    for name, module in wrapped.base_model.model.named_modules():
        if hasattr(module, "lora_A"):
            for one, found in layers.items():
                a, b = module.lora_A[one].weight.data.clone(), module.lora_B[one].weight.data
                found[name] = Factors(a, b * module.scaling[one])
    adapters = {one: Adapter(Path(one), found, {}) for one, found in layers.items()}
    return wrapped.eval().requires_grad_(False), adapters


def merged(model: Any, adapter: Adapter) -> Any:
    model = copy.deepcopy(model)
    for name, factors in adapter.layers.items():
        model.get_submodule(name).weight += factors.delta_OI()
    return model


def bytes_of(tensors: Iterator[Tensor] | Sequence[Tensor]) -> int:
    """Each storage once."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def tensors_of(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


@torch.inference_mode()
def prefill(model: Callable[..., Any], ids_BT: Tensor, **options: Any) -> float:
    start = time.process_time()
    model(input_ids=ids_BT, use_cache=False, **options)
    return time.process_time() - start


@torch.inference_mode()
def decode(model: Callable[..., Any], ids_BT: Tensor, **options: Any) -> float:
    """Of one token."""
    cache = model(input_ids=ids_BT[:, :CACHED], use_cache=True, **options).past_key_values
    start = time.process_time()
    for _ in range(DECODED):
        model(input_ids=ids_BT[:, :1], past_key_values=cache, use_cache=True, **options)
    return (time.process_time() - start) / DECODED


def measure(name: str, count: int, rounds: int) -> Iterator[dict[str, Any]]:
    rows = max(8, count)
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(3)).tolist()  # requests come as they come
    names = [f"a{row % count}" for row in order]
    wrapped, adapters = by_peft(a_model(name), count)
    base, model = a_model(name), a_model(name)
    bank = Bank(model, adapters)
    assert not bank.alone, bank.alone
    mixes = [{one: 1.0} for one in names]
    rows_of = [[row for row, one in enumerate(names) if one == f"a{number}"] for number in range(count)]
    models = [merged(base, adapter) for adapter in adapters.values()]
    ids_BT = torch.randint(3, 4096, (rows, PROMPT), generator=torch.Generator().manual_seed(2))
    with torch.inference_mode(), bank.active(mixes):
        ours = model(input_ids=ids_BT[:, :8]).logits
        theirs = wrapped(input_ids=ids_BT[:, :8], adapter_names=names).logits
        alike = float((ours - theirs).abs().max() / theirs.abs().max())
        assert alike < 1e-4, alike
    memory = {"base": bytes_of(tensors_of(base)), "bank": bytes_of(tensors_of(model))}
    memory |= {"peft": bytes_of(tensors_of(wrapped)), "merged": sum(bytes_of(tensors_of(one)) for one in models)}
    for phase, run in (("decode", decode), ("prefill", prefill)):
        copied = 0

        def mixed(run: Any = run) -> float:
            nonlocal copied
            with bank.active(mixes):
                took = run(model, ids_BT)
                plans = [p for p in bank.choice.mixes.plans.values() if p] if bank.choice.mixes else []
                held = [t for plan in plans for t in (plan.a_RI, plan.b_RO, *vars(plan).get("stack", ()))]
                own = {t.untyped_storage().data_ptr() for t in tensors_of(model)}
                copied = bytes_of([t for t in held if t.untyped_storage().data_ptr() not in own])
            return took

        steps: dict[str, Step] = {
            "base": lambda run=run: run(base, ids_BT),
            "bank": mixed,
            "merged": lambda run=run: sum(run(one, ids_BT[rows_of[number]]) for number, one in enumerate(models)),
            "peft": lambda run=run: run(wrapped, ids_BT, adapter_names=names),
        }
        times: dict[str, list[float]] = {method: [] for method in steps}
        for number in range(rounds + 1):  # the first one warms up
            for method, step in steps.items():
                took = step()
                if number:
                    times[method].append(took)
        for method, took in times.items():
            ratios = [one / floor for one, floor in zip(took, times["base"], strict=True)]
            yield {
                "model": name,
                "phase": phase,
                "adapters": count,
                "rows": rows,
                "method": method,
                "ms": round(1e3 * statistics.median(took), 2),
                "ratio": round(statistics.median(ratios), 3),
                "ratio_least": round(min(ratios), 3),
                "ratio_most": round(max(ratios), 3),
                "rounds": rounds,
                "bytes": memory[method],
                "bytes_while_running": copied if method == "bank" else 0,
                "largest_difference_from_peft": alike if method == "bank" else None,
            }
    bank.close()


@torch.inference_mode()
def ways() -> None:
    """Microseconds that the adapters add to one layer, by way, with the one that `Plan.way` chooses."""
    for width, count, rows, rank, tokens in (
        (d, k, b, r, t) for d in (192, 512, 1024) for k, b in ((2, 8), (8, 8), (8, 32), (32, 32)) for r in (4, 16)
        for t in (1, 4, 16, 64)
    ):  # fmt: skip
        if rows * tokens * width > 2**20:
            continue
        layer = MultiLinear(nn.Linear(width, width).requires_grad_(False), "layer", Choice())
        layer.hold([(n, torch.randn(rank, width), torch.randn(width, rank)) for n in range(count)])
        layer.choice.weights_BE = torch.eye(count)[[row % count for row in range(rows)]]
        x = torch.randn(rows, tokens, width)
        plan = Plan(layer, layer.choice.mixes)  # type: ignore[arg-type]
        chosen, floor = plan.way(tokens), least(lambda layer=layer, x=x: layer.base(x))
        found = []
        for way in ("mask", "stack", "segments"):
            other = Plan(layer, layer.choice.mixes)  # type: ignore[arg-type]
            other.way = lambda _tokens, way=way: way  # type: ignore[method-assign]
            layer.choice.mixes.plans[layer] = other  # type: ignore[union-attr]
            found.append(f"{way} {1e6 * (least(lambda layer=layer, x=x: layer(x)) - floor):.0f}")
        print(f"width {width}, {count} adapters of rank {rank}, {rows} rows of {tokens}: base {1e6 * floor:.0f},",
              ", ".join(found), f"-> {chosen}", flush=True)  # fmt: skip


def least(call: Callable[[], object]) -> float:
    call()
    start = time.process_time()
    call()
    times = max(2, int(0.003 / max(time.process_time() - start, 1e-6)))
    best = float("inf")
    for _ in range(3):
        start = time.process_time()
        for _ in range(times):
            call()
        best = min(best, (time.process_time() - start) / times)
    return best


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--ways", action="store_true")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--models", nargs="+", default=["stories3M", "wide"])
    parser.add_argument("--adapters", nargs="+", type=int, default=[2, 8, 32])
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.ways:
        ways()
        return
    path = Path(__file__).with_suffix(".jsonl")
    for name in options.models:
        for count in options.adapters:
            new = list(measure(name, count, options.rounds))
            old = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []
            kept = [line for line in old if (line["model"], line["adapters"]) != (name, count)]
            lines = sorted(kept + new, key=lambda line: (line["model"], line["phase"], line["adapters"]))
            path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
            for line in new:
                print(line, flush=True)


if __name__ == "__main__":
    main()
