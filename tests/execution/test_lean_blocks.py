"""What stands between the linear layers of a block: which modules are recognised, and that they learn the same."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from numeric import assert_close_to_truth, in_double, rounding
from tiny_architectures import CASES, CLASSES, GROUPED, LANGUAGE, SEQ2SEQ
from tiny_run import assembled, make_recipe
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaConfig, LlamaMLP, LlamaRMSNorm

from dynlora_cli.adapters import attach
from dynlora_cli.execution.lean_blocks import lean_blocks
from dynlora_cli.kernels.lean import ACTIVATIONS, FACTORS, Gated, RMSNorm, Rotary

MORE = {  # a norm in fp32 throughout; positions by neighbouring pairs, and layer norms; positions for half of a head
    "olmo2": ("Olmo2", GROUPED, LANGUAGE, 14),
    "cohere": ("Cohere", {**GROUPED, "pad_token_id": 1}, LANGUAGE, 14),
    "glm": ("Glm", {**GROUPED, "head_dim": 8, "pad_token_id": 1}, LANGUAGE, 12),
}
# Of two blocks: norms, gated feed-forward parts, attentions. What is not here has none that is recognised.
RECOGNISED = {
    "llama": (5, 2, 2), "mistral": (5, 2, 2), "qwen2": (5, 2, 2), "qwen3": (9, 2, 2), "gemma2": (9, 2, 2),
    "gemma3": (13, 2, 2), "phi": (0, 0, 2), "phi3": (5, 2, 2), "mixtral": (5, 0, 2), "qwen2_moe": (5, 2, 2),
    "gpt_neox": (0, 0, 2),  # no pass: a quarter of each head is turned
    "qwen3_moe": (9, 0, 2), "olmoe": (9, 0, 2), "t5": (12, 0, 0), "olmo2": (9, 2, 2), "cohere": (0, 2, 0), "glm": (5, 2, 0),
}  # fmt: skip
AUTO = {
    LANGUAGE: transformers.AutoModelForCausalLM,
    CLASSES: transformers.AutoModelForSequenceClassification,
    SEQ2SEQ: transformers.AutoModelForSeq2SeqLM,
}


def frozen_model(kind: str) -> nn.Module:
    """Norms multiply by something else than 1."""
    name, settings, task, _ = (CASES | MORE)[kind]
    config = getattr(transformers, f"{name}Config")(**{"vocab_size": 64, "pad_token_id": 1} | settings)
    torch.manual_seed(0)
    model = AUTO[task].from_config(config).train().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.add_(torch.rand_like(parameter) * 0.5)
    return model


def learn(model: nn.Module) -> list[torch.Tensor]:
    """Logits, and the gradient of the embeddings."""
    torch.manual_seed(0)  # of dropout
    ids = torch.arange(18, device=model.device).view(2, 9) % 7 + 2
    embedded = model.get_input_embeddings()(ids).detach().requires_grad_(True)
    more = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    logits = model(inputs_embeds=embedded, **more).logits
    if not torch.is_grad_enabled():
        return [logits]
    weights = torch.linspace(-1, 1, logits.numel(), dtype=torch.float64).sin().view(logits.shape)
    (logits.float() * weights.float().to(logits.device)).sum().backward()
    return [logits.detach().float(), embedded.grad.float()]


def distance(one: torch.Tensor, other: torch.Tensor) -> float:
    return ((one.double() - other.double()).norm() / other.double().norm()).item()


# Of a norm of many numbers, whose roundings are not all one way: about the root of those on the way to one of them,
# which is through sums over up to 32 and 64 numbers in each of two blocks (of two stacks), and back.
ROUNDING = rounding(torch.float32, round((2 * 4 * (32 + 64)) ** 0.5))


@pytest.mark.slow
@pytest.mark.parametrize("kind", [*CASES, *MORE])
def test_every_architecture_learns_the_same(kind):
    model = frozen_model(kind)
    usual = learn(in_double(model))
    with torch.no_grad():
        (told,) = learn(model)
    names = lean_blocks(model)
    kinds = [type(model.get_submodule(name)).__name__.lower() for name in names]
    found = tuple(sum(kind.endswith(end) for kind in kinds) for end in ("norm", "mlp", "attention"))
    assert found == RECOGNISED.get(kind, (0, 0, 0))
    assert sum(found) == len(names)
    for ours, theirs in zip(learn(model), usual, strict=True):
        assert distance(ours, theirs) < ROUNDING
    with torch.no_grad():
        (again,) = learn(model)
    assert torch.equal(told, again), "without gradients the model runs its own code"


NEEDS_GPU = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU; where there is one: scripts/test gpu"),
]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=NEEDS_GPU)])
@pytest.mark.parametrize("kind", ["llama", "gemma3", "olmo2", "phi3", "phi"])
def test_in_bf16_nothing_is_lost(kind, device):
    model = frozen_model(kind).to(device, torch.bfloat16)
    exact = learn(copy.deepcopy(model).float())
    with torch.autocast(device, torch.bfloat16):
        usual = learn(model)
        assert lean_blocks(model) == lean_blocks(frozen_model(kind))
        lean = learn(model)
    for ours, theirs, truth in zip(lean, usual, exact, strict=True):
        assert 0 < distance(ours, truth) < 1.2 * distance(theirs, truth)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", range(len(FACTORS)))
def test_norm_is_its_formula(form, dtype):
    x = (torch.randn(3, 5, 12) * torch.tensor([1e-3, 1.0, 200.0])[:, None, None]).to(dtype).transpose(0, 1)
    weight, grad = torch.rand(12).to(dtype), torch.randn(5, 3, 12).to(dtype)
    outcomes = []
    for wide in (False, True):
        z = (x.double() if wide else x).detach().requires_grad_(True)
        if wide:
            factor = FACTORS[form](weight).double()
            y = factor * z / (z.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        else:
            y = RMSNorm.apply(z, weight, FACTORS[form], 1e-6)
            assert y.dtype == dtype
        y.backward(grad.to(y.dtype))
        outcomes.append((y.detach().double(), z.grad.double()))
    for ours, exact in zip(*outcomes, strict=True):
        for row in range(3):
            assert distance(ours[:, row], exact[:, row]) < max(1e-5, torch.finfo(dtype).eps)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gate_is_its_formula(activation):
    inputs = [torch.randn(2, 3, 5, dtype=torch.double, requires_grad=True) for _ in range(2)]
    assert torch.autograd.gradcheck(lambda gate, up: Gated.apply(gate, up, activation), inputs)


def test_turning_is_its_formula():
    queries, keys = (torch.randn(2, heads, 3, 8, dtype=torch.double, requires_grad=True) for heads in (4, 2))
    angles = torch.randn(2, 3, 8, dtype=torch.double)
    assert torch.autograd.gradcheck(lambda q, k: Rotary.apply(q, k, angles.cos(), angles.sin()), (queries, keys))


class Centred(LlamaRMSNorm):
    def forward(self, hidden_states):
        return super().forward(hidden_states - hidden_states.mean(-1, keepdim=True))


class Outside(LlamaRMSNorm):
    def forward(self, hidden_states):
        length = hidden_states.pow(2).mean(-1, keepdim=True).sqrt()
        return self.weight * hidden_states / (length + self.variance_epsilon)


class WithAGate(LlamaRMSNorm):
    """As in Mamba 2."""

    def forward(self, hidden_states, gate=None):
        return super().forward(hidden_states if gate is None else hidden_states * F.silu(gate))


class WithAChild(LlamaRMSNorm):
    def __init__(self, size):
        super().__init__(size)
        self.dropout = nn.Dropout(0.3).eval()

    def forward(self, hidden_states):
        return self.dropout(super().forward(hidden_states))


class Doubled(LlamaMLP):
    def forward(self, x):
        return 2 * super().forward(x)


class Clamped(LlamaMLP):
    limit = 10

    def forward(self, x):
        gate = self.act_fn(self.gate_proj(x)).clamp(max=self.limit)
        return self.down_proj(gate * self.up_proj(x).clamp(-self.limit, self.limit))


class ClampedFarOut(Clamped):
    limit = 500


class Dropped(LlamaMLP):
    def forward(self, x):
        return self.down_proj(F.dropout(self.act_fn(self.gate_proj(x)), 0.3, self.training) * self.up_proj(x))


class Careful(LlamaMLP):
    """Rounds once."""

    def forward(self, x):
        gate, up = self.gate_proj(x).float(), self.up_proj(x).float()
        return self.down_proj((self.act_fn(gate) * up).to(x.dtype))


class WantsThreeDimensions(LlamaMLP):
    def forward(self, x):
        assert x.ndim == 3
        return super().forward(x)


class AttributeOfTheName(LlamaAttention):
    def forward(self, x, positions):
        return self.apply_rotary_pos_emb(x, positions)


SMALL = LlamaConfig(hidden_size=8, intermediate_size=16, num_attention_heads=2)


def mlp(activation, kind=LlamaMLP) -> nn.Module:
    module = kind(SMALL)
    module.act_fn = activation
    return module


@pytest.mark.parametrize(
    "module",
    [
        Centred(8),
        Outside(8),
        WithAGate(8),
        WithAChild(8),
        nn.LayerNorm(8, bias=False),
        nn.RMSNorm(8),  # whose epsilon is that of the type
        nn.PReLU(8),
        *(kind(SMALL) for kind in (Doubled, Clamped, ClampedFarOut, Dropped, WantsThreeDimensions, Careful)),
        *(mlp(act) for act in (nn.ReLU(), nn.PReLU(), nn.PReLU(16), nn.Sequential(nn.SiLU(), nn.Dropout(0.3)).eval())),
        AttributeOfTheName(SMALL, 0),
    ],
    ids=lambda module: type(module).__name__,
)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_what_looks_alike_is_left_alone(module, device):
    module = copy.deepcopy(module).to(device).requires_grad_(False)
    assert "" not in lean_blocks(module)


def test_a_norm_of_torch_is_one_too():
    assert lean_blocks(nn.RMSNorm(8, eps=1e-5)) == [""]


def test_a_module_that_somebody_else_has_changed_is_left_alone():
    norm = LlamaRMSNorm(8)
    norm.forward = changed = lambda x: x
    assert lean_blocks(norm) == []
    assert norm.forward is changed


def test_a_norm_that_trains_gets_its_gradient():
    norm = LlamaRMSNorm(8)
    lean_blocks(norm)
    norm(torch.randn(2, 8, requires_grad=True)).sum().backward()
    assert norm.weight.grad is not None


def exact_norm(norm, x):
    """Llama's formula in fp64."""
    x = x.double()
    return norm.weight.double() * x / (x.square().mean(-1, keepdim=True) + norm.variance_epsilon).sqrt()


def test_a_norm_may_be_called_by_name():
    norm = LlamaRMSNorm(8).requires_grad_(False)
    x = torch.randn(2, 8, requires_grad=True)
    lean_blocks(norm)
    assert_close_to_truth(norm(hidden_states=x), exact_norm(norm, x), terms=8 + 3)
    assert_close_to_truth(norm(hidden_states=x.detach()), exact_norm(norm, x), terms=8 + 3)


ATTENTION = LlamaAttention(SMALL, 0).requires_grad_(False)


@pytest.mark.parametrize(
    ("change", "lean"),
    [
        ({}, True),
        ({"queries": torch.randn(1, 2, 3, 6)}, False),  # wider than cos: left to the model's own function, which raises
        ({"cos": torch.randn(1, 3, 4).double()}, False),
        ({"cos": torch.randn(1, 3, 4, requires_grad=True)}, False),
        ({"unsqueeze_dim": 1}, False),
        ({"queries": torch.randn(1, 2, 3, 4)}, True),  # none that train; the keys do
        ({"queries": torch.randn(1, 2, 3, 4), "keys": torch.randn(1, 1, 3, 4)}, False),
    ],
)
def test_only_what_was_tried_is_turned_this_way(change, lean, monkeypatch):
    attention, turned = copy.deepcopy(ATTENTION), []
    lean_blocks(attention)
    turn = attention.forward.__func__.__globals__["apply_rotary_pos_emb"]
    usual = LlamaAttention.forward.__globals__["apply_rotary_pos_emb"]
    monkeypatch.setattr(Rotary, "apply", lambda *args, run=Rotary.apply: turned.append(1) or run(*args))
    inputs = {
        "queries": torch.randn(1, 2, 3, 4, requires_grad=True),
        "keys": torch.randn(1, 1, 3, 4, requires_grad=True),
        "cos": torch.randn(1, 3, 4),
        "sin": torch.randn(1, 3, 4),
    }
    queries, keys, cos, sin, *_ = (inputs | change).values()
    more = {key: value for key, value in change.items() if key not in inputs}
    if cos.shape[-1] != queries.shape[-1]:
        with pytest.raises(RuntimeError, match="size"):  # of the model's own function
            turn(queries, keys, cos, sin, **more)
    else:
        ours = turn(queries, keys, cos, sin, **more)
        truth = usual(queries.double(), keys.double(), cos.double(), sin.double(), **more)
        for y, z, x in zip(ours, truth, (queries, keys), strict=True):
            assert_close_to_truth(y, z, terms=3, dtype=torch.float32)
            assert y.requires_grad == (x.requires_grad or cos.requires_grad)
    assert bool(turned) == lean


def test_a_copy_computes_with_its_own_weights():
    first = LlamaRMSNorm(8).requires_grad_(False)
    lean_blocks(first)
    second = copy.deepcopy(first)
    second.weight.fill_(3.0)
    x = torch.randn(2, 8, requires_grad=True)
    assert_close_to_truth(first(x), exact_norm(first, x), terms=8 + 3)
    assert_close_to_truth(second(x), 3 * exact_norm(first, x), terms=8 + 3)


def test_an_adapter_that_brings_a_norm_of_its_own_is_computed_with():
    norm = LlamaRMSNorm(8).requires_grad_(False)
    lean_blocks(norm)
    other = attach._with_parameter(norm, "weight", torch.full((8,), 3.0))
    x = torch.randn(2, 8, requires_grad=True)
    assert_close_to_truth(other(x), 3 * exact_norm(norm, x), terms=8 + 3)
    with torch.no_grad():
        assert_close_to_truth(other(x), 3 * exact_norm(norm, x), terms=8 + 3)


def test_nothing_of_the_library_is_changed():
    model = frozen_model("llama")
    before = LlamaAttention.forward, LlamaAttention.forward.__globals__["apply_rotary_pos_emb"]
    lean_blocks(model)
    assert (LlamaAttention.forward, LlamaAttention.forward.__globals__["apply_rotary_pos_emb"]) == before


def test_recognising_draws_no_random_numbers():
    model, state = nn.ModuleList([frozen_model("llama"), Dropped(SMALL)]), torch.random.get_rng_state()
    lean_blocks(model)
    assert torch.equal(torch.random.get_rng_state(), state)


def saved_bytes(run) -> int:
    """What the graph of a pass keeps, each storage once, without what is there anyway."""
    sizes = {}

    def keep(tensor):
        sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = run()
    assert result.requires_grad
    return sum(sizes.values())


def test_a_pass_keeps_less():
    """In bf16 a norm keeps two bytes a number for four, and a gated part two tensors of its width for three."""
    x = torch.randn(4, 64, dtype=torch.bfloat16, requires_grad=True)
    norm = LlamaRMSNorm(64).to(torch.bfloat16).requires_grad_(False)
    config = LlamaConfig(hidden_size=64, intermediate_size=256)
    part = LlamaMLP(config).to(torch.bfloat16).requires_grad_(False)
    before = [saved_bytes(lambda module=module: module(x)) for module in (norm, part)]
    for module in (norm, part):
        assert lean_blocks(module) == [""]
    after = [saved_bytes(lambda module=module: module(x)) for module in (norm, part)]
    assert before[0] - after[0] == 4 * 64 * (4 - 2)
    assert before[1] - after[1] == 4 * 256 * 2


def test_checkpointed_blocks_learn_the_same():
    model = frozen_model("llama")
    lean_blocks(model)
    usual = learn(model)
    for block in model.model.layers:
        block.forward = lambda *args, run=block.forward, **kw: checkpoint(run, *args, use_reentrant=False, **kw)
    for ours, theirs in zip(learn(model), usual, strict=True):
        assert distance(ours, theirs) < 1e-6


@pytest.mark.parametrize(
    ("setting", "lean"), [("train.fused=true", True), ("train.fused=false", False), ("train.compile=true", False)]
)
def test_a_run_trains_this_way_unless_told_otherwise(setting, lean, tmp_path):
    run = assembled(make_recipe(tmp_path, setting))
    changed = [name for name, module in run.model.named_modules() if "forward" in vars(module)]
    assert bool(changed) == lean
