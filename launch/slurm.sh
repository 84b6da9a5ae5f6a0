#!/usr/bin/env bash
# One task per node of a GPU cluster; JAX reads the addresses from Slurm.
#   sbatch --nodes=2 --gpus-per-node=8 launch/slurm.sh --config=owt_teacher --workdir=/shared/runs/owt
# Preemption: Slurm's SIGTERM makes the run save; --requeue continues it from there.
# --print shows the command without running it. Not run by us on a cluster.
#SBATCH --ntasks-per-node=1
#SBATCH --requeue
#SBATCH --signal=TERM@120
set -euo pipefail
print=0; [ "${1:-}" = "--print" ] && { print=1; shift; }
command=(srun --kill-on-bad-exit=1 dlm-jax train --distributed "$@")
if ((print)); then echo "${command[*]}"; else exec "${command[@]}"; fi
