"""The loss from hidden states against the loss from logits: values, gradients, memory, and which models may."""

from __future__ import annotations

import pytest
import torch
from numeric import assert_close_to_truth, in_double, same_loss
from torch import nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, Gemma2Config, GPT2Config, GraniteConfig, LlamaConfig, OPTConfig

from dynlora_cli.data.batches import Batch
from dynlora_cli.evaluation.held_out_loss import held_out, row_sums
from dynlora_cli.kernels import linear_cross_entropy as linear_loss
from dynlora_cli.kernels.linear_cross_entropy import Ending, linear_cross_entropy, loss_and_gradient, run_to_head
from dynlora_cli.tasks.loss import IGNORE, summed_loss, target_losses

SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 67}
CONFIGS = {
    "llama": LlamaConfig(**SMALL),
    "llama, tied": LlamaConfig(**SMALL, tie_word_embeddings=True),
    "gpt2": GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=67),
    "opt": OPTConfig(
        hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=2, vocab_size=67, word_embed_proj_dim=16
    ),
    "gemma2": Gemma2Config(**SMALL, num_key_value_heads=2, head_dim=16),
    "granite": GraniteConfig(**SMALL, logits_scaling=3.0),
}
# Roundings on the way to a logit and back: sums over up to 32 and 48 numbers in each of two blocks, then 67 logits and
# 27 tokens.
TERMS = 2 * 2 * (32 + 48) + 67 + 27
LAST = ("llama", "llama, tied", "gpt2", "opt")


def build(kind):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(CONFIGS[kind]).eval().requires_grad_(False)


def batch(targets=True):
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(3, 60, (3, 9), generator=generator)
    labels = ids.roll(-1, 1)
    labels[:, -1] = IGNORE
    labels[0, :5] = labels[1] = IGNORE
    if not targets:
        labels[:] = IGNORE
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return Batch(inputs, labels, [0, 1, 2], ids.numel(), int((labels != IGNORE).sum()))


@pytest.mark.parametrize("kind", CONFIGS)
def test_only_a_head_that_ends_the_model_steps_aside(kind):
    model, rows = build(kind), batch()
    for _ in range(2):  # what the first pass finds, the later ones use
        head, states = run_to_head(model, rows.inputs)
        assert (head is not None) == (kind in LAST)
        hidden = 16 if kind == "opt" else 32
        assert states.shape == (3, 9, hidden if head else 67)
    head = model.get_output_embeddings()
    assert "forward" not in vars(head), "the head is back"
    head.requires_grad_(True)
    assert run_to_head(model, rows.inputs)[0] is None, "a head that trains needs its own gradient"


def test_the_first_pass_and_later_ones_give_the_same_bytes():
    """Resumed runs do."""
    model, rows = build("llama"), batch()
    assert torch.equal(summed_loss(model, rows), summed_loss(model, rows))


@pytest.mark.parametrize("targets", [True, False])
@pytest.mark.parametrize("kind", CONFIGS)
def test_loss_and_gradient_are_those_of_the_logits(kind, targets, monkeypatch):
    model, rows = build(kind), batch(targets)
    weight = next(p for name, p in model.named_parameters() if ".0." in name and p.ndim == 2).requires_grad_(True)
    exact = in_double(model)
    logits = exact(**rows.inputs).logits.flatten(0, 1)
    true_loss = F.cross_entropy(logits, rows.labels.flatten(), reduction="sum", ignore_index=IGNORE)
    true_loss.backward()
    true_gradient = next(p.grad for p in exact.parameters() if p.requires_grad)
    for use in (True, True, False):
        monkeypatch.setattr(Ending, "fused", use)
        weight.grad = None
        loss = summed_loss(model, rows)
        loss.backward()
        assert loss.dtype == torch.float32
        assert_close_to_truth(loss, true_loss, terms=TERMS)
        assert_close_to_truth(weight.grad, true_gradient, terms=TERMS)


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_evaluation_is_the_same_with_and_without_logits(kind, monkeypatch):
    model, rows = build(kind), batch()
    with_head = held_out(model, [rows]), row_sums(model, [rows])
    monkeypatch.setattr(Ending, "fused", False)
    logits = held_out(model, [rows]), row_sums(model, [rows])
    assert with_head[0] == same_loss(logits[0])
    assert with_head[1].loss_R == same_loss(logits[1].loss_R)
    assert (with_head[1].correct_R == logits[1].correct_R).all()
    assert with_head[1].targets_R.tolist() == logits[1].targets_R.tolist() == [3, 0, 8]


def test_chunks_add_up(monkeypatch):
    head, hidden = nn.Linear(8, 40), torch.randn(30, 8, requires_grad=True)
    targets = torch.randint(0, 40, (30,))
    head.requires_grad_(False)
    logits = F.linear(hidden.double(), head.weight.double(), head.bias.double())
    (wanted,) = torch.autograd.grad(F.cross_entropy(logits, targets, reduction="sum"), hidden)
    monkeypatch.setattr(linear_loss, "CHUNK", 1)
    monkeypatch.setattr(linear_loss, "LEAST_ROWS", 7)
    loss = linear_cross_entropy(hidden, targets, head)
    (loss * 0.5).backward()
    assert_close_to_truth(hidden.grad, 0.5 * wanted.double(), terms=8 + 40 + 40)


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_each_target_may_have_a_weight_of_its_own(kind, monkeypatch):
    """In fp64 throughout, in several chunks; the loss of a line is put together by an objective as it likes."""
    monkeypatch.setattr(linear_loss, "CHUNK", 1)
    monkeypatch.setattr(linear_loss, "LEAST_ROWS", 3)
    model, rows = in_double(build(kind)), batch()
    weight = next(p for name, p in model.named_parameters() if ".0." in name and p.ndim == 2).requires_grad_(True)
    weights_N = torch.linspace(-1, 2, rows.supervised, dtype=torch.float64)
    logits = model(**rows.inputs).logits.flatten(0, 1)
    true_N = F.cross_entropy(logits, rows.labels.flatten(), reduction="none")[rows.labels.flatten() != IGNORE]
    (truth,) = torch.autograd.grad((weights_N * true_N).sum(), weight)
    losses_N, line_N = target_losses(model, rows)
    (found,) = torch.autograd.grad((weights_N * losses_N).sum(), weight)
    assert losses_N.dtype == torch.float64
    assert line_N.tolist() == [0] * 3 + [2] * 8
    torch.testing.assert_close(losses_N, true_N, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found, truth, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("asked", [True, False])
def test_targets_that_are_all_but_impossible(dtype, asked, monkeypatch):
    """Their probability is no number of fp32, their loss is; and one that is impossible has none."""
    logits = torch.tensor([[0.0, 200.0, 7.0], [3.0, 1.0, 2.0], [0.0, 90.0, 90.0]], dtype=dtype)
    targets = torch.tensor([0, 2, 0])
    wanted = F.cross_entropy(logits.double(), targets, reduction="none")
    if not asked:  # as on a GPU
        monkeypatch.setattr(torch.Tensor, "any", lambda tensor: torch.tensor(True))
    loss_n, gradient = loss_and_gradient(logits, targets, torch.float32)
    torch.testing.assert_close(loss_n.double(), wanted, rtol=1e-6, atol=0)
    exact = logits.double().softmax(-1) - F.one_hot(targets, 3)
    torch.testing.assert_close(gradient.double(), exact, rtol=1e-6, atol=1e-7)
    logits[0, 0] = -torch.inf
    assert loss_and_gradient(logits, targets, torch.float32)[0][0] == torch.inf


def test_small_gradients_survive_in_fp16():
    """The loss scale comes with the backward pass, after the logits are gone."""
    torch.manual_seed(0)
    head = nn.Linear(16, 4000, bias=False).requires_grad_(False)
    hidden = torch.randn(3, 16)
    targets = torch.tensor([5, 6, 7])
    head.weight[:] += 0.5  # many small probabilities that pull the same way
    others = (hidden @ head.weight.T).mean(1, keepdim=True)
    head.weight[targets] = (18 + others) * hidden / hidden.square().sum(1, keepdim=True)  # the rest have p = e^-18
    exact, half = hidden.clone().requires_grad_(True), hidden.half().requires_grad_(True)
    linear_cross_entropy(exact, targets, head).backward()
    (linear_cross_entropy(half, targets, head.half()) * 65536).backward()
    torch.testing.assert_close(half.grad.float() / 65536, exact.grad, rtol=0.1, atol=2e-6)


def test_under_autocast():
    model, rows = build("llama"), batch()
    exact = summed_loss(model, rows)
    with torch.autocast("cpu", torch.bfloat16):
        loss = summed_loss(model, rows)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(exact.item(), rel=0.01)


def test_no_tensor_of_the_logits_size_is_kept():
    model, rows = build("llama"), batch()
    next(p for name, p in model.named_parameters() if "q_proj" in name).requires_grad_(True)
    summed_loss(model, rows)  # the first pass of a model looks at its logits
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.shape[-1]) or t, lambda t: t):
        summed_loss(model, rows)
    assert CONFIGS["llama"].vocab_size not in sizes
