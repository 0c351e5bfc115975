#!/bin/bash
# One experiment on this machine's devices:
#
#   launch/local.sh --config=configs/digits_hamu.py --workdir=runs/digits
#
# PROCESSES=N splits it over N processes that work together as the hosts of a cluster do, which takes
# --config.pairing=pmap; each has the devices that it finds. DRY_RUN=1 prints the commands instead.
set -euo pipefail
processes=${PROCESSES:-1}
port=${PORT:-12355}
command=(python -m hamu_jax.main "$@")

start() {
  if [[ -n ${DRY_RUN:-} ]]; then
    printf '%q ' "$@"
    echo
  else
    "$@"
  fi
}

if ((processes == 1)); then
  start "${command[@]}"
  exit
fi
distributed=(--config.distributed.coordinator="localhost:$port" --config.distributed.num_processes="$processes")
pids=()
trap 'kill "${pids[@]}" 2>/dev/null || true' EXIT TERM INT
for ((i = 0; i < processes; i++)); do
  start "${command[@]}" "${distributed[@]}" --config.distributed.process_id="$i" &
  pids+=($!)
done
status=0
for pid in "${pids[@]}"; do
  wait "$pid" || status=$?
done
exit "$status"
