"""`train.cuda_graphs`: what is recorded and when, with a stand-in for CUDA's recordings; test_gpu.py has the real ones."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from numeric import same_curve, same_loss
from tiny_architectures import CASES, CLASSES, some_fast, write_model
from tiny_run import assembled, make_recipe, train, write_rows
from torch import Tensor

from dynlora_cli.errors import DynloraError, MachineError, UsageError
from dynlora_cli.execution import block_trace, blocks
from dynlora_cli.execution.modes import compile as compiling
from dynlora_cli.execution.modes import cuda_graphs
from dynlora_cli.execution.modes.cuda_graphs import BlockGraphs
from dynlora_cli.lora.layer import ComponentLinear
from dynlora_cli.lora.pool import Pool
from dynlora_cli.lora.surgery import shrink
from dynlora_cli.training.run import Run
from dynlora_cli.training.step import step


def static_replays(
    functions: tuple[Callable, ...], samples: tuple[tuple[Tensor, ...], ...], *, allow_unused_input: bool, pool: Any
) -> tuple[Callable, ...]:
    """As torch.cuda.make_graphed_callables: tensors are copied into the memory of the samples, from which all is made.

    What it makes runs forward when played, so in-place effects of the backward pass come as often as it is run.
    """
    assert allow_unused_input
    for function, given in zip(functions, samples, strict=True):  # the warm-up, whose gradients are nobody's
        wanted = [tensor for tensor in given if tensor.requires_grad]
        outputs = [output for output in function(*given) if output.requires_grad]
        torch.autograd.grad(outputs, wanted, [torch.full_like(o, torch.nan) for o in outputs], allow_unused=True)
    return tuple(map(static_replay, functions, samples))


def static_replay(function: Any, given: tuple[Tensor, ...]) -> Callable:
    class Played(torch.autograd.Function):
        recording = function(*given)  # is kept, with its graph, as long as it can be played

        @staticmethod
        def forward(ctx: Any, *tensors: Tensor) -> tuple[Tensor, ...]:
            assert len(tensors) == len(given)
            for place, tensor in zip(given, tensors, strict=True):
                if place.data_ptr() != tensor.data_ptr():
                    assert not isinstance(place, torch.nn.Parameter), "the leaves are read where they are"
                    place.data.copy_(tensor)
            with torch.enable_grad():
                ctx.outputs = function.run(*given)
            return tuple(output.detach().clone() for output in ctx.outputs)

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
            pairs = [(o, g) for o, g in zip(ctx.outputs, grads, strict=True) if o.requires_grad]
            wanted = [tensor for tensor in given if tensor.requires_grad]
            outputs, grads = zip(*pairs, strict=True)
            found = iter(torch.autograd.grad(outputs, wanted, grads, allow_unused=True))
            return tuple(next(found) if tensor.requires_grad else None for tensor in given)

    return Played.apply


@pytest.fixture(autouse=True)
def soon(monkeypatch):
    monkeypatch.setattr(cuda_graphs, "LEAST_PASSES", 1)
    monkeypatch.setattr(cuda_graphs, "SIGHTINGS", 1)


def record(run: Run, tell: Callable[[str], None]) -> BlockGraphs:
    """Let a run record its blocks, and play what it has recorded."""
    mode = cuda_graphs.Mode(run.recipe.train, run.modes.patches)
    mode.graphs = BlockGraphs(run.model, run.trained, tell, static_replays)
    run.modes.modes.append(mode)
    return mode.graphs


def learn(recipe, *, recorded: bool, steps: int = 12, autocast: bool = False):
    """The losses of a run, and its recordings."""
    run = assembled(recipe)
    notes: list[str] = []
    if recipe.train.compile:
        compiling.compile_blocks(run.model, run.trained)
    run.graphs = record(run, notes.append) if recorded else None
    losses = []
    for number in range(steps):
        losses.append(step(run, run.batches.step(*divmod(number, run.batches.steps_per_epoch)))["loss"])
        run.progress.step += 1
    return losses, run, notes


@pytest.mark.slow
@pytest.mark.parametrize("kind", some_fast("llama", "gpt2", "bert", "t5", "mixtral"))
def test_every_architecture_learns_the_same(kind, tmp_path, monkeypatch):
    name, special, task, layers = CASES[kind]
    if kind in ("opt", "bart"):  # in transformers 5.20 they draw whether to leave out a block, once for each pass
        monkeypatch.setitem(CASES, kind, (name, {**special, "dropout": 0.0}, task, layers))
    if kind == "t5":  # from the second block on they are given a bias that they give back
        monkeypatch.setitem(CASES, kind, (name, {**special, "num_layers": 4}, task, layers))
    write_model(tmp_path / kind, kind)
    settings = [f"model.task={task}", "train.cuda_graphs=true", "dataset.train_on=all" * (task == "causal-lm")]
    if task == CLASSES:
        settings.append(f"dataset.train=[{write_rows(tmp_path / f'{kind}-rows.jsonl', labelled=True)}]")
    recipe = make_recipe(tmp_path, *filter(None, settings), "dataset.max_length=64", kind=kind)
    usual, _, _ = learn(recipe, recorded=False)
    played, run, notes = learn(recipe, recorded=True)
    assert played == same_curve(usual)
    assert notes == []
    assert run.graphs.recorded > 0
    assert run.graphs.played >= run.graphs.recorded


@pytest.mark.parametrize(
    "settings",
    [
        ["dataset.packing=true"],
        ["train.gradient_checkpointing=true"],
        ["model.dtype=bfloat16"],
        pytest.param(["model.dtype=bfloat16", "adapter.freeze_a=true"], marks=pytest.mark.slow),
        ["adapter.dropout=0.0", "train.fused=false"],
        pytest.param(["train.fused=false", "model.dtype=bfloat16"], marks=pytest.mark.slow),
        ["model.load_in_4bit=true"],
    ],
    ids=str,
)
def test_every_way_to_run_it_learns_the_same(settings, tmp_path):
    if "model.load_in_4bit=true" in settings:
        pytest.importorskip("bitsandbytes")
    recipe = make_recipe(tmp_path, "train.cuda_graphs=true", "dataset.max_length=64", *settings)
    usual, before, _ = learn(recipe, recorded=False)
    played, run, notes = learn(recipe, recorded=True)
    assert played == (pytest.approx(usual, rel=1e-3) if "bfloat16" in str(settings) else same_curve(usual))
    torch.testing.assert_close(run.trained.values, before.trained.values, rtol=1e-2, atol=2e-3)
    assert run.graphs.recorded > 0
    assert not notes


def test_a_stretch_ends_where_a_block_is_given_more_than_the_one_before_returned(tmp_path):
    """Every sixth block of Gemma 3 sees all tokens: here it has no mask, where the others have one."""
    import transformers

    sizes = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 64}
    config = transformers.Gemma3TextConfig(
        **sizes, intermediate_size=48, num_hidden_layers=8, sliding_window=4, use_cache=False
    )
    model = transformers.Gemma3ForCausalLM(config).train()
    listening = block_trace.Listening("key")
    for container, index, block in list(blocks.blocks_in_place(model)):
        container[index] = block_trace.StandIn(block, listening)
    model(input_ids=torch.randint(0, 64, (2, 12)))
    assert listening.strange is None
    assert [len(stretch.calls) for stretch in listening.stretches] == [5, 1, 2]
    assert (
        len(listening.outside) == 9
    )  # a mask, positions, cosines and sines of two kinds, what each stretch begins with
    assert [call.hands_on for stretch in listening.stretches for call in stretch.calls] == [True] * 8


@pytest.fixture
def run(tmp_path):
    run = assembled(make_recipe(tmp_path, "train.cuda_graphs=true", "dataset.packing=true", "dataset.max_length=64"))
    run.notes = []
    run.graphs = record(run, run.notes.append)
    return run


def take(run, count: int) -> None:
    for _ in range(count):
        step(run, run.batches.step(0, 0))
        run.progress.step = 0


@pytest.mark.slow
def test_an_event_ends_a_recording_and_the_next_one_holds_what_is_left(run):
    take(run, 4)
    before = run.graphs.recorded
    assert before > 0
    assert not run.trained.graphs, "no graph of the recording keeps components from going"
    shrink(run.trained, run.optimizer, torch.arange(run.trained.components) % 2 == 0)
    left = run.trained.values.detach().clone()
    assert run.graphs.recorded == before
    take(run, 4)
    assert run.graphs.recorded == 2 * before
    assert not torch.equal(run.trained.values, left)


def test_nothing_is_recorded_that_would_not_be_played_often_enough(run, monkeypatch):
    monkeypatch.setattr(cuda_graphs, "LEAST_PASSES", 10_000)
    take(run, 6)
    assert run.graphs.recorded == 0


def test_evaluation_and_a_graph_that_is_alive_are_as_without(run):
    from dynlora_cli.evaluation.held_out_loss import held_out
    from dynlora_cli.tasks.loss import summed_loss

    take(run, 4)
    batch = run.batches.step(0, 0)[0]
    before = held_out(run.model, [batch])["loss"]
    assert all(type(block).__name__ != "StandIn" for block in blocks.blocks(run.model))
    loss = summed_loss(run.model, batch)
    assert loss.item() / batch.supervised == same_loss(before)
    with pytest.raises(DynloraError, match="autograd graph"):
        shrink(run.trained, run.optimizer, torch.arange(run.trained.components) > 0)
    del loss
    shrink(run.trained, run.optimizer, torch.arange(run.trained.components) > 0)


def test_what_cuda_cannot_record_ends_the_run_with_a_way_on(run):
    def refuses(*_: Any, **__: Any) -> None:
        raise RuntimeError("CUDA error: operation not permitted when stream is capturing\nmore")

    run.graphs.make = refuses
    with pytest.raises(
        MachineError, match=r"record the blocks of LlamaForCausalLM: CUDA error: .* capturing$"
    ) as error:
        take(run, 4)
    assert "--resume" in error.value.hint
    assert all(type(block).__name__ != "StandIn" for block in blocks.blocks(run.model))


def test_what_no_recording_can_hold_is_said_and_training_goes_on(run, monkeypatch):
    monkeypatch.setattr(block_trace, "CONSTANTS", (bool,))
    usual = assembled(run.recipe)
    take(usual, 4)
    take(run, 4)
    assert torch.equal(run.trained.values, usual.trained.values)
    assert run.notes == [
        "train.cuda_graphs: LlamaForCausalLM cannot be recorded (its blocks are given or return a NoneType); "
        "it goes on as usual"
    ]


def test_blocks_that_are_left_out_are_not_recorded_or_end_the_run(run, monkeypatch):
    take(run, 4)
    last = run.model.model.layers[1]
    forward = type(run.model.model).forward

    def shorter(model, *args, **kwargs):
        model.config.num_hidden_layers = 1
        return forward(model, *args, **kwargs)

    monkeypatch.setattr(type(run.model.model), "forward", shorter)
    with pytest.raises(DynloraError, match="left out blocks"):
        take(run, 1)
    assert run.model.model.layers[1] is last
    run.graphs._forget()
    take(run, 3)
    assert run.notes == [
        "train.cuda_graphs: LlamaForCausalLM cannot be recorded (it does not run every block once, in their order); "
        "it goes on as usual"
    ]


def test_other_inputs_than_recorded_are_run_as_usual(run):
    take(run, 4)
    calls = []
    play = run.graphs._recordings[next(iter(run.graphs._recordings))][0][0]
    recorded, play.play = play.play, lambda *given: calls.append(1) or recorded(*given)
    take(run, 1)
    assert calls == [1] * 2, "both micro-batches"
    batch = run.batches.step(0, 0)[0]
    batch.inputs["attention_mask"] = torch.zeros(batch.inputs["attention_mask"].shape).masked_fill(
        ~batch.inputs["attention_mask"], torch.finfo(torch.float32).min
    )
    key = next(iter(run.graphs._recordings))
    run.graphs._recordings[cuda_graphs._key(batch.inputs)] = run.graphs._recordings[key]
    loss = run.model(**batch.inputs).logits.sum()
    assert calls == [1] * 2
    loss.backward()


def test_a_model_that_uses_more_than_the_last_output_of_its_blocks_is_found_out(run, monkeypatch):
    from transformers.modeling_outputs import BaseModelOutputWithPast

    def forward(model, input_ids, position_ids=None, attention_mask=None, **_):
        hidden = model.embed_tokens(input_ids)
        position_embeddings, first = model.rotary_emb(hidden, position_ids=position_ids), None
        for block in model.layers:
            hidden = block(hidden, attention_mask=attention_mask, position_embeddings=position_embeddings)
            first = hidden if first is None else first
        return BaseModelOutputWithPast(last_hidden_state=model.norm(hidden - 0.7 * first))

    monkeypatch.setattr(type(run.model.model), "forward", forward)
    take(run, 4)
    assert run.notes == [
        "train.cuda_graphs: LlamaForCausalLM cannot be recorded (it uses more than what the last of its blocks returns); "
        "it goes on as usual"
    ]
    assert run.graphs.recorded == 0


@pytest.mark.long  # a minute where nothing is compiled yet
def test_recompiling_is_not_needed_for_a_recording(tmp_path):
    pytest.importorskip("torch._inductor")
    settings = ["train.cuda_graphs=true", "dataset.packing=true", "model.dtype=bfloat16"]
    usual, _, _ = learn(make_recipe(tmp_path, *settings), recorded=False, steps=6)
    recipe = make_recipe(tmp_path, *settings, "train.compile=true")
    torch._dynamo.reset()
    before = compiling.graphs_made()
    learn(recipe, recorded=False, steps=6)
    alone = compiling.graphs_made() - before
    torch._dynamo.reset()
    before = compiling.graphs_made()
    played, run, _ = learn(recipe, recorded=True, steps=6)
    assert run.graphs.recorded > 0
    assert compiling.graphs_made() - before <= alone + 2, (
        "a first input that asks for a gradient, a pass to compare with"
    )
    assert played == pytest.approx(usual, rel=1e-2)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ("adapter.variant=dora", "adapter.variant"),
        ("adapter.target_modules=[all-linear, experts]", "adapter.target_modules"),
        ("train.gradient_checkpointing=offload", "train.gradient_checkpointing"),
        ("train.shard_base=true", "train.shard_base"),
        ("model.load_in_8bit=true", "model.load_in_8bit"),
        ("model.attn_implementation=flash_attention_2", "model.attn_implementation"),
    ],
)
def test_settings_that_do_not_go_with_it(settings, named, tmp_path):
    with pytest.raises(Exception, match=named):
        make_recipe(tmp_path, "train.cuda_graphs=true", settings)


def test_models_that_are_not_the_same_in_every_pass_are_refused():
    import transformers

    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 8}
    skips = transformers.OPTForCausalLM(
        transformers.OPTConfig(**small, ffn_dim=16, word_embed_proj_dim=16, layerdrop=0.1)
    )
    with pytest.raises(UsageError, match="skips blocks at random"):
        cuda_graphs.refuse_unsuitable(skips, checkpointing=False)
    drops = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=8))
    cuda_graphs.refuse_unsuitable(drops, checkpointing=False)
    with pytest.raises(UsageError, match="may draw random numbers"):
        cuda_graphs.refuse_unsuitable(drops, checkpointing=True)
    experts = transformers.MixtralConfig(**small, intermediate_size=16, num_key_value_heads=2, num_local_experts=2)
    with pytest.raises(UsageError, match="may draw random numbers"):
        cuda_graphs.refuse_unsuitable(transformers.MixtralForCausalLM(experts), checkpointing=True)


def test_recordings_of_what_has_gone_are_gone(run):
    take(run, 4)
    (stretches_, _), *_ = run.graphs._recordings.values()
    stretch = weakref.ref(stretches_[0])
    del stretches_
    shrink(run.trained, run.optimizer, torch.arange(run.trained.components) % 2 == 0)
    run.graphs._forget_gone()
    assert stretch() is None


def test_without_a_gpu_it_is_refused_before_anything_is_written(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(MachineError, match=r"train\.cuda_graphs: there is no GPU here"):
        train(make_recipe(tmp_path, "train.cuda_graphs=true"))
    assert not (tmp_path / "out").exists()


def test_copies_that_stay_give_the_same_gradient():
    layer = ComponentLinear(torch.nn.Linear(6, 4, dtype=torch.bfloat16).requires_grad_(False), 1.0)
    pool = Pool({"layer": layer}, {"layer": 2})
    pool.joined = True
    found, places = [], set()
    for stay in (False, True, True):
        pool.copies_stay = stay
        cast = pool._cast(pool.values, torch.bfloat16)
        places.add(cast.data_ptr()) if stay else None
        (cast.float() ** 2).sum().backward()
        found.append(pool.values.grad.clone())
        pool.values.grad.zero_()
        del cast
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[1], found[2])
    assert len(places) == 1
