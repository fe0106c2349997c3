"""How near does a training step come to the frozen model's own cost? Against that floor and stock PEFT, in one run.

    python scripts/bench/speed/speed.py                          # all shapes that fit a CPU, appended to speed.jsonl, then speed.md
    python scripts/bench/speed/speed.py --models 512x8 --ranks 16 --tokens 1024 --rounds 9
    python scripts/bench/speed/speed.py --models llama-3.2-1b,llama-3.1-8b --base plain,nf4 --tokens 4096   # on a GPU
    python scripts/bench/speed/speed.py --models llama-3.2-1b --tokens 4096 --compile   # every method's blocks compiled
    python scripts/bench/speed/speed.py --table                  # only write speed.md again

The floor is the forward pass of a frozen Llama with random weights and the backward pass to its embeddings, as
transformers runs them: what every adapter method has to do. Ours does some of it in fewer passes (execution/lean_blocks.py); the
lean floor is the frozen model with those, and what is above it is what components cost. A step is forward, loss over
all tokens, backward, clipping and AdamW; ours also observes its components. Methods take turns within a round, and
ratios are of times of the same round. Nothing else should run. On a GPU everything is in bf16 under autocast, as
trainers run it, with adapters in fp32; all methods share one frozen base.
"""

from __future__ import annotations

import argparse
import copy
import gc
import itertools
import json
import platform
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import lru_cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest import mock

import peft
import torch
from speed_tables import details, table
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from dynlora_cli.data.batches import Batch
from dynlora_cli.execution.blocks import blocks
from dynlora_cli.execution.lean_blocks import lean_blocks
from dynlora_cli.execution.modes.compile import compile_blocks
from dynlora_cli.execution.modes.cuda_graphs import LEAST_PASSES, SIGHTINGS, BlockGraphs
from dynlora_cli.kernels import frozen
from dynlora_cli.kernels.frozen import CPU_INFO
from dynlora_cli.kernels.linear_cross_entropy import ending
from dynlora_cli.lora.layer import ComponentLinear
from dynlora_cli.lora.pool import Pool
from dynlora_cli.lora.shared_inputs import share_inputs
from dynlora_cli.lora.surgery import shrink
from dynlora_cli.models.linear import linear_shape
from dynlora_cli.models.targets import find_targets
from dynlora_cli.pruning.signals import GateGradients
from dynlora_cli.tasks.loss import summed_loss
from dynlora_cli.training.optimizers import make_optimizer

RESULTS = Path(__file__).with_suffix(".jsonl")
ROW = 256  # tokens of a row
VOCABULARY = 4096
Step = Callable[[], None]
# Published shapes, by the arguments of LlamaConfig that tell them apart; `512x8` is hidden size x layers.
PUBLISHED = {
    "llama-3.2-1b": {"hidden_size": 2048, "num_hidden_layers": 16, "intermediate_size": 8192, "tie_word_embeddings": True},
    "llama-3.1-8b": {"hidden_size": 4096, "num_hidden_layers": 32, "intermediate_size": 14336, "tie_word_embeddings": False},
}  # fmt: skip


@dataclass(frozen=True)
class Shape:
    model: str
    rank: int
    tokens: int
    base: str  # plain or nf4
    compiled: bool = False  # the blocks of every method, the floor's too


def config(shape: Shape) -> LlamaConfig:
    if shape.model in PUBLISHED:
        heads = {"num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256}
        return LlamaConfig(**PUBLISHED[shape.model], **heads, use_cache=False)
    hidden, layers = map(int, shape.model.split("x"))
    return LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=hidden, intermediate_size=hidden * 11 // 4 // 8 * 8,
        num_hidden_layers=layers, num_attention_heads=hidden // 64, num_key_value_heads=hidden // 64,
        tie_word_embeddings=True, use_cache=False,
    )  # fmt: skip


def llama(shape: Shape, *, alone: bool = False) -> LlamaForCausalLM:
    """The model; its frozen weights are in memory once, whatever the number of methods, unless it shall train alone."""
    model = fresh_llama(shape) if alone else copy.deepcopy(frozen_llama(shape), shared_weights(shape))
    return model.train()


@lru_cache(maxsize=1)
def frozen_llama(shape: Shape) -> LlamaForCausalLM:
    return fresh_llama(shape).requires_grad_(False)


def shared_weights(shape: Shape) -> dict[int, Tensor]:
    """What deepcopy shall not copy."""
    model = frozen_llama(shape)
    return {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}


def fresh_llama(shape: Shape) -> LlamaForCausalLM:
    torch.manual_seed(0)
    with torch.device(DEVICE):
        model = LlamaForCausalLM(config(shape)).to(TYPE)
    return quantized(model) if shape.base == "nf4" else model


def quantized(model: LlamaForCausalLM) -> LlamaForCausalLM:
    """The model with its layers in 4 bits, but for the output layer; as transformers loads them."""
    import bitsandbytes as bnb

    for name, module in find_targets(model, "all-linear").items():
        small = bnb.nn.Linear4bit(
            module.in_features, module.out_features, bias=False, compute_dtype=TYPE, quant_type="nf4"
        )  # type: ignore[arg-type]
        small.weight = bnb.nn.Params4bit(module.weight.detach().cpu(), requires_grad=False, quant_type="nf4")
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, small.to(DEVICE))
    return model


def batch_ids(shape: Shape) -> Tensor:
    length = min(ROW if DEVICE == "cpu" else 1024, shape.tokens)
    return torch.randint(0, config(shape).vocab_size, (shape.tokens // length, length), device=DEVICE)


def compiled(model: nn.Module, shape: Shape) -> nn.Module:
    if shape.compiled:
        for block in blocks(model):
            block.compile()
    return model


def floor(shape: Shape, *, lean: bool = False) -> Step:
    model, ids = compiled(llama(shape), shape), batch_ids(shape)
    if lean:
        lean_blocks(model)

    def step() -> None:
        embedded = model.get_input_embeddings()(ids).requires_grad_(True)
        with mixed():
            loss = model(inputs_embeds=embedded, labels=ids).loss
        loss.backward()

    return step


def full(shape: Shape) -> Step:
    model = llama(shape, alone=True)
    return labelled(compiled(model, shape), batch_ids(shape))


def rival(shape: Shape, config: type[peft.PeftConfig], **options: Any) -> Step:
    model = llama(shape)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = peft.get_peft_model(model, config(target_modules="all-linear", **options))
    return labelled(compiled(wrapped, shape), batch_ids(shape))


def mixed(**options: bool) -> torch.autocast:
    return torch.autocast(DEVICE, TYPE, enabled=torch.float32 != TYPE, **options)


def labelled(model: nn.Module, ids: Tensor) -> Step:
    """A step of a model that computes its loss itself, as every script for PEFT lets it."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4)
    allocate = getattr(getattr(model, "base_model", None), "update_and_allocate", None)
    done = itertools.count(1)

    def step() -> None:
        with mixed():
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        if allocate:
            allocate(next(done))
        optimizer.zero_grad()

    return step


def dynlora(shape: Shape, *, left: float = 1.0, fuse: bool = True, recorded: bool = False) -> Step:
    """Ours, with the share `left` of its components, after a shrink as in training; `recorded` as CUDA graphs."""
    model, ids = llama(shape), batch_ids(shape)
    if fuse and not shape.compiled:
        lean_blocks(model)
    layers: dict[str, ComponentLinear] = {}
    for name, module in find_targets(model, "all-linear").items():
        assert min(linear_shape(module)) >= 2 * shape.rank
        layers[name] = ComponentLinear(module, 2.0)
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, layers[name])
    pool = Pool(layers, dict.fromkeys(layers, shape.rank), device=DEVICE)
    pool.cast_with(model)
    ending(model).fused = fuse
    for layer in layers.values():
        layer.fuse = fuse
    if shape.compiled:
        compile_blocks(model, pool)
    optimizer = make_optimizer("adamw", [{"params": [pool.values], "lr": 1e-4}], 0.0)
    labels = torch.full_like(ids, -100)
    labels[:, :-1] = ids[:, 1:]
    batch = Batch({"input_ids": ids}, labels, [], ids.numel(), int((labels != -100).sum()))
    gradients = GateGradients()
    if fuse and not shape.compiled:
        with torch.no_grad():
            share_inputs(layers, lambda: summed_loss(model, batch))

    def step() -> None:
        with mixed(cache_enabled=not recorded):
            loss = summed_loss(model, batch) / batch.supervised
        loss.backward()
        gradients.observe(pool, batch.supervised)
        assert pool.values.grad is not None
        norm = pool.values.grad.norm()
        pool.values.grad.mul_((1.0 / (norm + 1e-6)).clamp(max=1.0))
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)

    if left < 1:
        step()
        keep = torch.rand(pool.components, generator=torch.Generator().manual_seed(0)) < left
        shrink(pool, optimizer, keep.to(DEVICE))
        gradients.restart()
    if recorded:
        graphs = BlockGraphs(model, pool, print)
        graphs.passes_left = LEAST_PASSES
        for _ in range(SIGHTINGS + 1):
            step()
        assert graphs.recorded
    return step


def by_onednn(shape: Shape) -> bool:
    """Whether frozen products of this run go through oneDNN here, see kernels/frozen.py."""
    return DEVICE == "cpu" and torch.float32 == TYPE and not shape.compiled and frozen.mkl_is_slow()


def without_onednn(step: Step) -> Step:
    """The same step on a processor for which MKL would be chosen."""

    def plain() -> None:
        with mock.patch.object(frozen, "mkl_is_slow", return_value=False):
            step()

    return plain


def processor() -> str:
    """What Linux calls the processor, with family and model, which tell its generation; else the architecture."""
    lines = CPU_INFO.read_text().splitlines() if CPU_INFO.is_file() else []
    facts = {line.partition(":")[0].strip(): line.partition(":")[2].strip() for line in lines}
    name = "{model name}, family {cpu family} model {model}"
    return name.format_map(facts) if "model name" in facts else platform.machine()


def methods(shape: Shape) -> dict[str, Callable[[], Step]]:
    plain = {"r": shape.rank, "lora_alpha": 2 * shape.rank}
    ada = {"init_r": shape.rank, "target_r": shape.rank, "lora_alpha": 2 * shape.rank, "total_step": 100_000}
    return {
        "floor": lambda: floor(shape),
        **({} if shape.compiled else {"lean floor": lambda: floor(shape, lean=True)}),
        "dynlora": lambda: dynlora(shape),
        **({"dynlora, MKL alone": lambda: without_onednn(dynlora(shape))} if by_onednn(shape) else {}),
        "dynlora, half left": lambda: dynlora(shape, left=0.5),
        "dynlora, a quarter left": lambda: dynlora(shape, left=0.25),
        "dynlora, ordinary operations": lambda: dynlora(shape, fuse=False),
        **({"dynlora, recorded": lambda: dynlora(shape, recorded=True)} if DEVICE == "cuda" else {}),
        "PEFT LoRA": lambda: rival(shape, peft.LoraConfig, **plain),
        "PEFT DoRA": lambda: rival(shape, peft.LoraConfig, use_dora=True, **plain),
        "PEFT AdaLoRA": lambda: rival(shape, peft.AdaLoraConfig, tinit=10_000, tfinal=10_000, deltaT=10, **ada),
        **({"full fine-tuning": lambda: full(shape)} if shape.base != "nf4" and shape.model != "llama-3.1-8b" else {}),
    }


def measure(shape: Shape, rounds: int, chosen: list[str]) -> dict[str, Any]:
    """Seconds of a step of every method in every round, and bytes at the peak."""
    makers = {name: make for name, make in methods(shape).items() if not chosen or name in chosen}
    memory = {name: peak(shape, name) for name in makers}
    steps = {name: make() for name, make in makers.items()}
    for step in steps.values():
        step()
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    names = list(steps)
    for number in range(rounds):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            synchronise()
            started = time.perf_counter()
            steps[name]()
            synchronise()
            seconds[name].append(round(time.perf_counter() - started, 5))
    device = torch.cuda.get_device_name() if DEVICE == "cuda" else processor()
    facts = {"date": time.strftime("%Y-%m-%d"), "torch": torch.__version__, "peft": peft.__version__, "device": device}
    facts["threads"], facts["type"] = torch.get_num_threads(), str(TYPE).removeprefix("torch.")
    peaks = {"flops": flops(shape), "product_flops_per_second": product_peak(), "peak_bytes": memory}
    return {**asdict(shape), **facts, "seconds": seconds, **peaks}


def flops(shape: Shape) -> int:
    """Of the frozen model's step: forward and back to its inputs, causal attention included, softmax and the like not."""
    c, rows, length = config(shape), *batch_ids(shape).shape
    attention = c.hidden_size * (2 * c.num_attention_heads + 2 * c.num_key_value_heads) * c.head_dim
    numbers = c.num_hidden_layers * (attention + 3 * c.hidden_size * c.intermediate_size) + c.hidden_size * c.vocab_size
    # Scores and their sums are a product each forward, and two back.
    scores = c.num_hidden_layers * rows * length * length * c.num_attention_heads * c.head_dim
    return 4 * shape.tokens * numbers + 3 * 2 * scores


def product_peak() -> float:
    """FLOP/s of the best of products of large square matrices in the type that is trained in."""
    size = 8192 if DEVICE == "cuda" else 2048
    a, b = (torch.randn(size, size, device=DEVICE, dtype=TYPE) for _ in range(2))
    best = float("inf")
    for _ in range(8):
        synchronise()
        started = time.perf_counter()
        torch.mm(a, b)
        synchronise()
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best


def peak(shape: Shape, name: str) -> int:
    """Most bytes of three steps, the model included: of the GPU, or resident in a process of its own."""
    if DEVICE == "cpu":
        with get_context("spawn").Pool(1) as pool:
            return pool.apply(peak_here, (shape, name))
    unused = torch.cuda.memory_allocated() if name == "full fine-tuning" else 0  # the frozen base of the others
    torch.cuda.reset_peak_memory_stats()
    take_steps(shape, name)
    gc.collect()
    torch.cuda.empty_cache()
    return torch.cuda.max_memory_allocated() - unused


def peak_here(shape: Shape, name: str) -> int:
    before = resident()["VmRSS"]
    take_steps(shape, name)
    return resident()["VmHWM"] - before


def take_steps(shape: Shape, name: str) -> None:
    step = methods(shape)[name]()
    for _ in range(3):
        step()


def resident() -> dict[str, int]:
    """Bytes of this process in memory, now (VmRSS) and at most since its start (VmHWM); Linux only."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return {
        key: int(value.split()[0]) * 1024
        for key, value in (line.split(":", 1) for line in lines)
        if key in ("VmRSS", "VmHWM")
    }


def synchronise() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="256x8,512x8,1024x2", help="hidden size x layers, or a published shape")
    parser.add_argument("--ranks", default="4,16,64")
    parser.add_argument("--tokens", default="512,4096")
    parser.add_argument("--base", default="plain", help="the frozen weights: plain, nf4")
    parser.add_argument("--compile", action="store_true", help="compile the blocks of every method")
    parser.add_argument("--method", action="append", default=[], help="one of those to measure, floor among them; all")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--table", action="store_true", help="only write speed.md again")
    args = parser.parse_args()
    lists = (part.split(",") for part in (args.models, args.base, args.ranks, args.tokens))
    for model, base, rank, tokens in () if args.table else itertools.product(*lists):
        shape = Shape(model, int(rank), int(tokens), base, args.compile)
        record = measure(shape, args.rounds, args.method)
        with args.results.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        print(details(record), flush=True)
    records = [json.loads(line) for line in args.results.read_text(encoding="utf-8").splitlines()]
    args.results.with_suffix(".md").write_text(table(records), encoding="utf-8")


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32

if __name__ == "__main__":
    main()
