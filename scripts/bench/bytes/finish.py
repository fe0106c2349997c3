"""Does it help to train on through the rounding? A first look, printed: scripts/bench/NOTES.md has what it said.

python scripts/bench/bytes/finish.py --runs e2e:lora:1 chat:lora:2      # adapters that by_bytes.py keeps
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from by_bytes import RESULTS
from bytes_runs import folder_of, rate_of
from quality_methods import Ground, Job, lay_ground
from torch import Tensor

from dynlora_cli.adapters.adapter import Adapter
from dynlora_cli.adapters.attach import attached
from dynlora_cli.adapters.packed.archive import in_svd_form
from dynlora_cli.adapters.read import read_adapter
from dynlora_cli.evaluation.held_out_loss import row_sums
from dynlora_cli.lora.pool import Pool
from dynlora_cli.rounding.bits import through
from dynlora_cli.tasks.loss import summed_loss

STEPS = 40
# Bits (0: none), the share of the run's rate at the start (0: no training), and whether rounding is in the loop.
WAYS = [
    (0, 0.0, False),
    (3, 0.0, False),
    (3, 0.05, True),
    (3, 0.2, True),
    (3, 0.2, False),
    (2, 0.0, False),
    (2, 0.2, True),
]


def put(pool: Pool, values_P: Tensor, bits: int) -> None:
    """Give the pool's leaves some values, rounded to so many bits."""
    pool.values.data.copy_(values_P.detach())
    if bits:
        for a_CI, b_OC in pool.views(pool.values.detach()):
            if a_CI.numel():
                a_CI.copy_(through(a_CI, bits))
                b_OC.copy_(through(b_OC.T.contiguous(), bits).T)


def held_out(ground: Ground) -> float:
    batches = ground.val
    rows = (batch for index in range(batches.steps_per_epoch) for batch in batches.step(0, index))
    return float(row_sums(ground.base.model, rows).loss)


def finish(ground: Ground, adapter: Adapter, rate: float, bits: int, through_rounding: bool) -> tuple[float, float]:
    """The held-out loss after the steps, as it is and rounded."""
    with attached(ground.base.model, adapter) as pool:
        values_P = pool.values.detach().clone().requires_grad_()
        optimizer = torch.optim.AdamW([values_P], lr=rate, weight_decay=0.0)
        for done in range(STEPS if rate else 0):
            put(pool, values_P, bits if through_rounding else 0)
            epoch, index = divmod(200 - STEPS + done, ground.train.steps_per_epoch)
            (batch,) = ground.train.step(epoch, index)
            assert pool.values.grad is not None
            pool.values.grad.zero_()
            with torch.enable_grad():
                (summed_loss(ground.base.model, batch) / batch.supervised).backward()
            values_P.grad = pool.values.grad.clone()
            torch.nn.utils.clip_grad_norm_([values_P], 1.0)
            for group in optimizer.param_groups:
                group["lr"] = rate * (1 - done / STEPS)
            optimizer.step()
        put(pool, values_P, 0)
        whole = held_out(ground)
        put(pool, values_P, bits)
        return whole, held_out(ground)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", nargs="+", required=True)
    parser.add_argument("--work", type=Path, default=Path("out/bytes"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    work = options.work.resolve()
    for run in options.runs:
        task, method, rank = run.split(":")
        job = Job(task, method, int(rank), rate_of(task, method, int(rank), RESULTS), 0)
        ground, adapter = lay_ground(job, work, []), in_svd_form(read_adapter(folder_of(job, work)))
        for bits, share, inside in WAYS:
            whole, rounded = finish(ground, adapter, share * job.rate, bits, inside)
            print(
                f"{run}  {bits} bits  rate x{share}  in the loop {inside}  {whole:.4f}  rounded {rounded:.4f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
