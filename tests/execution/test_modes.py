"""The modes of a run: which are on, in which order, and that nothing of them is left when the run is over."""

from __future__ import annotations

from tiny_run import make_recipe

from dynlora_cli.execution.mode import plan, without_long_runs


def names(*settings: str, folder, short: bool = False) -> list[str]:
    modes = plan(make_recipe(folder, *settings).train)
    return [type(mode).__module__.rpartition(".")[2] for mode in (modes.for_short_runs() if short else modes)]


def test_modes_take_turns_in_a_fixed_order(tmp_path):
    settings = ["train.cuda_graphs=true", "train.compile=true", "train.gradient_checkpointing=true"]
    assert names(folder=tmp_path) == ["fused"]
    assert names("train.fused=false", folder=tmp_path) == ["fused"], "somebody must tell the layers"
    assert names(*settings, folder=tmp_path) == ["checkpointing", "fused", "compile", "cuda_graphs"]
    assert names("train.gradient_checkpointing=offload", "train.shard_base=true", folder=tmp_path) == [
        "checkpointing",
        "fused",
        "shard",
    ]


def test_runs_of_few_steps_leave_out_what_does_not_pay(tmp_path):
    settings = ["train.cuda_graphs=true", "train.compile=true", "train.gradient_checkpointing=true"]
    assert names(*settings, folder=tmp_path, short=True) == ["checkpointing", "fused"]
    train = make_recipe(tmp_path, *settings).train
    assert without_long_runs(train) == {"compile": False, "cuda_graphs": False}
