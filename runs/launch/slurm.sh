#!/bin/bash
# A run on several nodes of GPUs through Slurm; not yet tried on a cluster. From the repository, on a
# disk that all nodes share:  sbatch --nodes 2 runs/launch/slurm.sh speedrun --mirror DIR
# Slurm's own options stand before the script, nanolib's after it. The same command goes on.
#SBATCH --job-name=nanolib
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --time=08:00:00
#SBATCH --signal=TERM@180
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=nanolib-%j.txt
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:?submit this with sbatch}"
uv sync # once: the nodes share it

first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export NANOLIB_RENDEZVOUS="$first:$((20000 + SLURM_JOB_ID % 10000))"
export NODES="$SLURM_JOB_NUM_NODES"
# TERM comes three minutes before the end: the step is saved, and the job may be queued again.
srun --kill-on-bad-exit=1 bash -c '
    export NANOLIB_NODE="$SLURM_NODEID"
    exec uv run --no-sync nanolib run "$@" --machine.nodes "$NODES"
' nanolib "$@"
