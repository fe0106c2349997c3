"""Layers that read the same input: who finds whom, and the same numbers as when each computes alone."""

from __future__ import annotations

import weakref

import pytest
import torch
from numeric import assert_close_to_truth, same_curve
from tiny_architectures import CASES, CLASSES, write_model
from tiny_run import assembled, make_recipe, write_rows
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

from dynlora_cli import plugins
from dynlora_cli.kernels.fused_lora import Part, fused_together
from dynlora_cli.lora.layer import ComponentLinear
from dynlora_cli.lora.pool import Pool
from dynlora_cli.lora.shared_inputs import share_inputs
from dynlora_cli.lora.surgery import shrink
from dynlora_cli.models.linear import weight_OI
from dynlora_cli.training.step import step


class Block(nn.Module):
    """q, k and v of one input, and a layer after them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        for name, base in {"q": nn.Linear(12, 20), "k": Conv1D(8, 12), "v": nn.Linear(12, 8, bias=False)}.items():
            setattr(self, name, ComponentLinear(base.requires_grad_(False), 1.7))
        self.o = ComponentLinear(nn.Linear(20, 12).requires_grad_(False), 1.7)
        self.called = ["q", "k", "v"]

    def forward(self, x):
        q, *others = (getattr(self, name)(x) for name in self.called)
        return self.o(q + sum(other.sum(-1, keepdim=True) for other in others)) + x


def block(*, shared: bool, counts=(4, 3, 5, 2), **changed) -> tuple[Block, Pool]:
    model = Block().train()
    model.__dict__.update(changed)
    layers = {name: getattr(model, name) for name in ("q", "k", "v", "o")}
    pool = Pool(layers, dict(zip(layers, counts, strict=True)))
    values = torch.randn(pool.parameters, generator=torch.Generator().manual_seed(1))
    pool.adopt(values, pool.counts)
    pool.cast_with(model)
    if shared:
        listen(model, pool)
    return model, pool


def listen(model: Block, pool: Pool) -> None:
    with torch.no_grad():
        pool.sharing = share_inputs(pool.layers, lambda: model(torch.randn(3, 12)))


# Two layers one after the other, up to 20 numbers in a sum, sums over three outputs, over up to 14 tokens, and back.
TERMS = 2 * (12 + 20 + 5) + 20 + 14


def learn(model: nn.Module, pool: Pool, x: torch.Tensor, *, how=None) -> list[torch.Tensor]:
    """Output, and the gradients of x and of the pool."""
    pool.values.grad.zero_()
    x = x.clone().requires_grad_(True)
    y = model(x) if how is None else how(model, x)
    (y.float() * torch.linspace(-1, 1, y.numel()).view(y.shape)).sum().backward()
    return [y.detach(), x.grad, pool.values.grad.clone()]


def truth(model: Block, x: torch.Tensor) -> list[torch.Tensor]:
    """The same by dense weights in fp64."""
    x = x.detach().double().requires_grad_(True)
    layers = {name: getattr(model, name) for name in ("q", "k", "v", "o")}
    a = {name: layer.a_CI.detach().double().requires_grad_(True) for name, layer in layers.items()}
    b = {name: layer.b_OC.detach().double().requires_grad_(True) for name, layer in layers.items()}

    def dense(name, x):
        base, weight = layers[name].base, layers[name].scale * b[name] @ a[name]
        return F.linear(x, weight_OI(base).double() + weight, base.bias if base.bias is None else base.bias.double())

    q, *others = (dense(name, x) for name in model.called)
    y = dense("o", q + sum(other.sum(-1, keepdim=True) for other in others)) + x
    (y * torch.linspace(-1, 1, y.numel()).double().view(y.shape)).sum().backward()
    grads = [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in (*a.values(), *b.values())]
    return [y.detach(), x.grad, torch.cat([grad.flatten() for grad in grads])]


def together(layer: ComponentLinear) -> list[ComponentLinear] | None:
    return layer.shared and layer.shared.layers


def in_bf16(model, x):
    with torch.autocast("cpu", torch.bfloat16):
        return model(x)


def checkpointed(model, x):
    return checkpoint(model, x, use_reentrant=False)


@pytest.mark.parametrize("counts", [(4, 3, 5, 2), (1, 1, 1, 1), (4, 0, 5, 2), (0, 0, 5, 2), (0, 3, 5, 0)])
@pytest.mark.parametrize("how", [None, in_bf16, checkpointed])
def test_it_is_the_same_as_alone(how, counts):
    (alone, pool_alone), (shared, pool) = block(shared=False, counts=counts), block(shared=True, counts=counts)
    x = torch.randn(2, 7, 12)
    # In bf16 each of the two layers rounds x, W, a, b, the product with a, the update and the sum.
    rounded = {"terms": 14, "dtype": torch.bfloat16} if how is in_bf16 else {"terms": TERMS}
    for _ in range(3):
        results = learn(shared, pool, x, how=how), learn(alone, pool_alone, x, how=how), truth(alone, x)
        for ours, theirs, exact in zip(*results, strict=True):
            assert ours.dtype == theirs.dtype
            for found in (ours, theirs):
                assert_close_to_truth(found, exact, **rounded)
    assert together(shared.q) == [shared.q, shared.k, shared.v]


def test_gradients_against_finite_differences():
    torch.manual_seed(0)
    bases = [nn.Linear(5, outputs).double().requires_grad_(False) for outputs in (4, 3)]
    leaves = [torch.randn(*shape, dtype=torch.float64) for shape in ((2, 5), (4, 2), (3, 5), (3, 3))]
    leaves = [leaf.requires_grad_(True) for leaf in leaves]
    x = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)

    def both(x, *leaves):
        return fused_together(x, [Part(bases[0], leaves[:2]), Part(bases[1], leaves[2:])], 0.7)

    assert torch.autograd.gradcheck(both, (x, *leaves))


@pytest.mark.parametrize(
    ("counts", "functions"), [((4, 3, 5, 2), 1), ((0, 3, 5, 2), 1), ((4, 0, 0, 2), 1), ((0, 0, 0, 2), 0)]
)
def test_one_function_runs_for_all_that_have_components(counts, functions):
    model, pool = block(shared=True, counts=counts)
    assert not model.q._forward_pre_hooks
    assert together(model.q) == together(model.k) == together(model.v) == [model.q, model.k, model.v]
    assert model.o.shared is None
    nodes = set()
    for layer in (model.q, model.k, model.v):
        layer.register_forward_hook(lambda module, args, y: nodes.add(y.grad_fn))
    learn(model, pool, torch.randn(3, 12))
    assert len([node for node in nodes if node.name() == "FusedLinearBackward"]) == functions


def test_components_of_all_can_go():
    model, pool = block(shared=True)
    x = torch.randn(3, 12)
    learn(model, pool, x)
    keep = torch.tensor([True, False, True, False] + [False] * 3 + [True] * 5 + [True, False])
    shrink(pool, torch.optim.AdamW([pool.values]), keep)
    alone, pool_alone = block(shared=False, counts=(2, 0, 5, 1))
    pool_alone.adopt(pool.values.detach().clone(), pool.counts)
    for ours, theirs, exact in zip(learn(model, pool, x), learn(alone, pool_alone, x), truth(alone, x), strict=True):
        assert_close_to_truth(ours, exact, terms=TERMS)
        assert_close_to_truth(theirs, exact, terms=TERMS)


def test_another_input_is_another_input():
    """What the model changes in place between two layers is not what the first of them read."""
    model, _ = block(shared=True)
    x = torch.randn(3, 12)

    def forward(x):
        q = model.q(x)
        x += 1
        return model.o(q + model.k(x).sum(-1, keepdim=True) + model.v(x).sum(-1, keepdim=True))

    def dense(name, x):
        layer = getattr(model, name)
        bias = 0 if layer.base.bias is None else layer.base.bias.double()
        return x @ (weight_OI(layer.base).double() + layer.delta_OI().double()).T + bias

    later = x.double() + 1
    others = dense("k", later).sum(-1, keepdim=True) + dense("v", later).sum(-1, keepdim=True)
    assert_close_to_truth(forward(x.clone()), dense("o", dense("q", x.double()) + others), terms=TERMS)


@pytest.mark.parametrize("how", [None, checkpointed])
def test_layers_that_stop_going_together_are_left_alone(how):
    model, pool = block(shared=True)
    alone, pool_alone = block(shared=False)
    x = torch.randn(3, 12)
    for calls in (["q", "k"], ["q", "k"], ["q", "k", "v"]):
        model.called = alone.called = calls
        results = learn(model, pool, x, how=how), learn(alone, pool_alone, x, how=how), truth(alone, x)
        for ours, theirs, exact in zip(*results, strict=True):
            assert_close_to_truth(ours, exact, terms=TERMS)
            assert_close_to_truth(theirs, exact, terms=TERMS)
        pool.after_update(0.0)
        assert model.q.shared is model.k.shared is model.v.shared is None
        pool.refuse_live_graphs()


def test_inputs_are_not_kept_while_a_pass_is_listened_to():
    """Of a large model they would not fit."""
    layers = {f"{index}": ComponentLinear(nn.Linear(8, 8).requires_grad_(False), 1.0) for index in range(9)}
    seen, most = [], [0]

    def run() -> None:
        x = torch.randn(2, 8)
        for layer in layers.values():
            x = layer(x)
            seen.append(weakref.ref(x))
            most[0] = max(most[0], sum(one() is not None for one in seen))

    with torch.no_grad():
        assert share_inputs(layers, run) == []
    assert most[0] <= 2


def test_blocks_that_read_the_same_stay_apart(tmp_path):
    """In T5 every block of the decoder reads what the encoder returned; each is computed again by itself."""
    write_model(tmp_path / "t5", "t5")
    targets = "adapter.target_modules=[EncDecAttention.k,EncDecAttention.v]"
    settings = ["model.task=seq2seq-lm", targets, "train.gradient_checkpointing=true", "dataset.max_length=64"]
    run = assembled(make_recipe(tmp_path, *settings, kind="t5"))
    assert [len(group.layers) for group in run.trained.sharing] == [2, 2]
    step(run, run.batches.step(0, 0))


def test_a_layer_that_is_called_twice_computes_alone():
    model, _ = block(shared=True, called=["q", "k", "v", "v"])
    assert model.q.shared is model.v.shared is None


def test_other_scales_do_not_go_together():
    model, pool = block(shared=False)
    model.v.scale = 2.0
    listen(model, pool)
    assert model.q.shared is None


FOUND = {  # how many layers compute together in the first block of each architecture
    "llama": [3, 2], "mistral": [3, 2], "qwen2": [3, 2], "qwen3": [3, 2], "gemma2": [3, 2], "gemma3": [3, 2],
    "phi": [3], "phi3": [], "gpt2": [], "gpt_neox": [], "opt": [3], "bert": [3], "roberta": [3], "deberta-v2": [3],
    "mixtral": [3], "qwen2_moe": [3, 2], "qwen3_moe": [3], "olmoe": [3], "t5": [3], "bart": [3], "modernbert": [],
}  # fmt: skip


@pytest.mark.parametrize("checkpointing", ["false", pytest.param("true", marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", CASES)
def test_every_architecture_learns_the_same(kind, checkpointing, tmp_path, monkeypatch):
    """Through the loop, with its events."""
    task = CASES[kind][2]
    write_model(tmp_path / kind, kind)
    settings = [f"model.task={task}", "dataset.train_on=all" if task == "causal-lm" else ""]
    settings.append(f"train.gradient_checkpointing={checkpointing}")
    if task == CLASSES:
        settings.append(f"dataset.train=[{write_rows(tmp_path / f'{kind}-rows.jsonl', labelled=True)}]")
    recipe = make_recipe(tmp_path, *filter(None, settings), "dataset.max_length=64", kind=kind)
    losses: list[list[float]] = [[], []]
    for found, shared in zip(losses, (False, True), strict=True):
        run = assembled(recipe)
        sizes = [len(group.layers) for group in run.trained.sharing]
        for layer in run.trained.layers.values() if not shared else ():
            layer.shared = None
        for number in range(6):
            found.append(step(run, run.batches.step(*divmod(number, run.batches.steps_per_epoch)))["loss"])
            run.progress.step += 1
    assert losses[1] == same_curve(losses[0])
    assert sizes[: len(FOUND[kind])] == FOUND[kind]
    assert bool(sizes) == bool(FOUND[kind])


@pytest.mark.parametrize("setting", ["train.fused=false", "train.compile=true", "adapter.dropout=0.1"])
def test_where_nothing_is_fused_nobody_listens(setting, tmp_path, monkeypatch):
    monkeypatch.setattr(plugins.load("modes", "fused"), "share_inputs", None)
    run = assembled(make_recipe(tmp_path, setting))
    assert run.trained.sharing == []
