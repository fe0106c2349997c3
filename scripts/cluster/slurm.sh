#!/bin/bash
# One run on several machines of a SLURM cluster:
#
#     sbatch scripts/cluster/slurm.sh recipe.yaml [options of dynlora train]
#
# Change the lines below as your cluster wants them. The folder in which you say `sbatch`, and the run's output folder,
# have to be on storage that all machines see.
#SBATCH --job-name=dynlora
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --signal=TERM@120
# --signal: two minutes before the end of the time the run saves and ends. `scontrol requeue` of the job, or SLURM itself
# when a machine fails, starts it again under the same number: it goes on from its last checkpoint.
set -euo pipefail

# Where `dynlora` is installed, on all machines.
if [ -f .venv/bin/activate ]; then source .venv/bin/activate; fi

first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 # or processes that are started again do not find each other

# `exec`: what SLURM signals reaches srun, and through it every process.
exec srun --kill-on-bad-exit=1 torchrun \
    --nnodes "$SLURM_JOB_NUM_NODES" --nproc-per-node "${SLURM_GPUS_ON_NODE:-1}" --max-restarts 3 \
    --rdzv-backend c10d --rdzv-endpoint "$first:${PORT:-29500}" --rdzv-id "$SLURM_JOB_ID" \
    -m dynlora_cli train "$@"
