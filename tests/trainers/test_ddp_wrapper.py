"""DDP goes on averaging the gradients of the components after an event. Two gloo processes."""

from __future__ import annotations

import json

import pytest
from processes_helper import two

pytestmark = pytest.mark.slow

SCRIPT = """
import json, sys
import torch
from torch import distributed
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from toy import fill, make
from dynlora_cli.errors import DynloraError
from dynlora_cli.lora.surgery import shrink
from dynlora_cli.trainers.distributed import Processes

distributed.init_process_group("gloo")
rank, how = distributed.get_rank(), sys.argv[1]
net, pool = make()
fill(pool)
optimizer = torch.optim.SGD([pool.values], 0.1)
processes = Processes(net)
wrapper = net if how == "unwrapped" else DistributedDataParallel(net, find_unused_parameters=how == "unused")

def gradient():
    x, y = (torch.randn(8, width, generator=torch.Generator().manual_seed(1 + rank)) for width in (12, 8))
    for leaf in pool.leaves:
        leaf.grad = None
    F.mse_loss(wrapper(x), y).backward()
    own = torch.cat([(leaf if leaf.grad is None else leaf.grad).flatten() for leaf in pool.leaves if leaf.numel()])
    both = [torch.empty_like(own) for _ in range(2)]
    distributed.all_gather(both, own)
    return (both[0] - both[1]).abs().max().item()

apart = [gradient(), gradient()]
keep_K = torch.tensor([1, 0, 1, 1, 0, 0, 0, 1, 1], dtype=torch.bool)  # none is left in the second layer
if how == "differently" and rank:
    keep_K = keep_K.flip(0)
shrink(pool, optimizer, keep_K)
old = wrapper.reducer if how != "unwrapped" else None
try:
    if how != "forgotten":
        processes.after_event(pool)
    apart += [gradient(), gradient(), gradient()]
    said = None
except (DynloraError, RuntimeError) as error:
    said = str(error)
if rank == 0:
    print(json.dumps({"apart": apart, "said": said, "ranks": list(pool.counts.values())}))
distributed.destroy_process_group()
"""


def run(folder, how):
    return json.loads(two(SCRIPT, how, folder=folder))


@pytest.mark.parametrize("how", ["used", "unused"])
def test_gradients_are_averaged_after_an_event(tmp_path, how):
    """With and without the search for parameters that a pass did not reach."""
    found = run(tmp_path, how)
    assert found == {"apart": [0.0] * 5, "said": None, "ranks": [3, 0, 2]}


def test_without_it_each_process_would_train_on_its_own(tmp_path):
    found = run(tmp_path, "forgotten")
    assert found["said"] or found["apart"][-1] > 1e-3


def test_processes_that_pruned_differently_stop(tmp_path):
    assert run(tmp_path, "differently")["said"].startswith("the processes pruned different components")


def test_processes_without_a_wrapper_stop(tmp_path):
    assert "the model was not called through DistributedDataParallel" in run(tmp_path, "unwrapped")["said"]
