#!/usr/bin/env bash
# Starts one training run on every host of a Cloud TPU pod slice.
#   launch/tpu_pod.sh NAME ZONE --config=owt_teacher --workdir=/mnt/shared/runs/owt
# The checkout must lie in ~/dlm_jax on the hosts, installed with pip install -e ".[tpu]"; data and
# workdir on a file system that all hosts mount.
# Resume is the default: after a preemption, run the same command again.
# --print shows the command without running it. Not run by us on a TPU.
set -euo pipefail
print=0; [ "${1:-}" = "--print" ] && { print=1; shift; }
name=${1:?usage: tpu_pod.sh [--print] NAME ZONE FLAGS}; zone=${2:?zone is missing}; shift 2
command=(gcloud compute tpus tpu-vm ssh "$name" --zone="$zone" --worker=all
  --command="cd ~/dlm_jax && dlm-jax train --distributed $*")
if ((print)); then echo "${command[*]}"; else exec "${command[@]}"; fi
