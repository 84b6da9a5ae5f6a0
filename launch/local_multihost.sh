#!/usr/bin/env bash
# Several processes on this machine act as the hosts of a cluster: a rehearsal without a cluster.
#   launch/local_multihost.sh 2 train --config=novels_teacher --workdir=runs/rehearsal
# --print shows the commands without running them.
set -euo pipefail
print=0; [ "${1:-}" = "--print" ] && { print=1; shift; }
hosts=${1:?usage: local_multihost.sh [--print] HOSTS VERB [FLAGS]}; shift
port=${PORT:-12321}; pids=()
for ((host = 0; host < hosts; host++)); do
  command=(env "JAX_COORDINATOR_ADDRESS=127.0.0.1:$port" "JAX_NUM_PROCESSES=$hosts" \
    "JAX_PROCESS_ID=$host" dlm-jax "$@" --distributed)
  if ((print)); then echo "${command[*]}"; else "${command[@]}" & pids+=($!); fi
done
for pid in "${pids[@]}"; do wait "$pid"; done
