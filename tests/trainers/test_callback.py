"""Components that go while transformers' own Trainer trains: losses before the first event, numbers after it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from trainer_helpers import losses, trainer_of

FIRST = 3  # the step after which components are turned into their SVD basis; after step 5 the first ones go
SETTINGS: dict[str, dict[str, Any]] = {
    "adamw": {},
    "adamw, not fused": {"optim": "adamw_torch"},
    "adafactor": {"optim": "adafactor"},
    "momentum": {"optim": "sgd", "optim_args": "momentum=0.9"},
    "8 bits": {"optim": "adamw_bnb_8bit"},
    "accumulation": {"gradient_accumulation_steps": 2},
    "clipping": {"max_grad_norm": 0.1},
    "no clipping": {"max_grad_norm": 0.0},
    "bf16": {"bf16": True},
    "checkpointing": {"activation_checkpointing": True},
    "reentrant checkpointing": {
        "activation_checkpointing": True,
        "activation_checkpointing_kwargs": {"use_reentrant": True},
    },
}


def numbers_of(optimizer: torch.optim.Optimizer) -> int:
    """Numbers that the optimizer keeps in tensors with an axis."""
    tensors = [x for state in optimizer.state.values() for x in state.values() if torch.is_tensor(x) and x.ndim]
    return sum(tensor.numel() for tensor in tensors)


@pytest.mark.slow
@pytest.mark.parametrize("changed", SETTINGS.values(), ids=SETTINGS)
def test_the_same_losses_until_the_first_event_and_fewer_numbers_after_it(
    tmp_path: Path, changed: dict[str, Any]
) -> None:
    plain, _, _ = trainer_of(tmp_path, pruned=False, **changed)
    plain.train()
    trainer, attached, callback = trainer_of(tmp_path, **changed)
    before = attached.parameters
    trainer.train()
    assert losses(trainer)[:FIRST] == losses(plain)[:FIRST]
    assert losses(trainer)[FIRST:] != losses(plain)[FIRST:]

    assert attached.parameters <= attached.start.budget < before
    assert attached.parameters == sum(leaf.numel() for leaf in attached.pool.leaves)
    stepped = [parameter for group in trainer.optimizer.param_groups for parameter in group["params"]]
    assert sum(parameter.numel() for parameter in stepped) == attached.parameters
    assert {id(p) for p in stepped} == {id(p) for p in attached.model.parameters() if p.requires_grad}
    if "adafactor" in changed.values():  # a row's and a column's sums
        assert numbers_of(trainer.optimizer) < numbers_of(plain.optimizer)
    else:
        assert numbers_of(trainer.optimizer) * before <= numbers_of(plain.optimizer) * attached.parameters
    assert [(event["event"], event["step"]) for event in callback.rank_events] == [
        ("gauge", 3), ("prune", 5), ("prune", 7), ("prune", 9),
    ]  # fmt: skip
    assert callback.rank_events[-1]["ranks"] == attached.rank_map


def test_components_train_in_fp32_where_the_whole_model_was_cast(tmp_path: Path) -> None:
    trainer, attached, _ = trainer_of(tmp_path)
    attached.model.to(torch.bfloat16)
    trainer.train()
    assert {leaf.dtype for leaf in attached.pool.leaves} == {torch.float32}
    assert attached.model.lm_head.weight.dtype == torch.bfloat16
    moments = [x for state in trainer.optimizer.state.values() for x in state.values() if torch.is_tensor(x) and x.ndim]
    assert {moment.dtype for moment in moments} == {torch.float32}
