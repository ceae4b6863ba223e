#!/bin/bash
# Two hosts of eight GPUs. The same run.yaml and data must be visible on both.
#
#     sbatch examples/launchers/slurm.sh run.yaml
#
#SBATCH --job-name=halfbyte
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
# Ranks save when the time is nearly up, and the job begins again where they stopped.
#SBATCH --signal=TERM@300
#SBATCH --requeue

set -euo pipefail
first_host=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)

srun torchrun \
    --nnodes="$SLURM_NNODES" \
    --nproc-per-node=8 \
    --rdzv-id="$SLURM_JOB_ID" \
    --rdzv-backend=c10d \
    --rdzv-endpoint="$first_host:29500" \
    -m halfbyte train "$1"
