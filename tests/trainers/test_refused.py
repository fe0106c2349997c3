"""Ways of splitting a model over devices that do not go with components are refused in words."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from accelerate.utils import DistributedType

from dynlora_cli.errors import UsageError
from dynlora_cli.trainers import distributed


@pytest.mark.parametrize("how", [DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM])
def test_what_splits_the_parameters_is_refused(monkeypatch, how):
    monkeypatch.setattr(distributed, "AcceleratorState", lambda: SimpleNamespace(distributed_type=how))
    with pytest.raises(UsageError, match="dynamic rank does not work under") as caught:
        distributed.refuse(SimpleNamespace(n_gpu=1, fsdp=None, deepspeed=None))
    assert how.value.lower() in caught.value.message.lower()
    assert "DistributedDataParallel" in (caught.value.hint or "")


def test_copies_on_several_gpus_are_refused():
    with pytest.raises(UsageError, match="this process sees 2 GPUs"):
        distributed.refuse(SimpleNamespace(n_gpu=2))


@pytest.mark.parametrize("how", [DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU])
def test_ddp_is_not_refused(monkeypatch, how):
    monkeypatch.setattr(distributed, "AcceleratorState", lambda: SimpleNamespace(distributed_type=how))
    distributed.refuse(SimpleNamespace(n_gpu=1, fsdp=None, deepspeed=None))


@pytest.mark.parametrize(("asked", "name"), [({"fsdp": True}, "FSDP"), ({"deepspeed": "zero3.json"}, "DeepSpeed")])
def test_what_was_asked_for_is_refused_where_it_would_be_passed_over(monkeypatch, asked, name):
    alone = SimpleNamespace(distributed_type=DistributedType.NO)
    monkeypatch.setattr(distributed, "AcceleratorState", lambda: alone)
    with pytest.raises(UsageError, match=f"does not work under {name}"):
        distributed.refuse(SimpleNamespace(**({"n_gpu": 1, "fsdp": None, "deepspeed": None} | asked)))
