#!/bin/bash
# Runs one experiment on this machine's devices:
#
#   launch/local.sh --config=configs/digits_hamu.py --workdir=runs/digits
#
# PROCESSES=N splits it over N processes that communicate like the hosts of a cluster, which needs
# --config.pairing=pmap. Each process uses the devices that it finds. DRY_RUN=1 prints the commands instead.
set -euo pipefail
processes=${PROCESSES:-1}
coordinator=localhost:${PORT:-12355}

run() {
  if [[ -n ${DRY_RUN:-} ]]; then
    # Each command is printed at once, because several processes print at the same time.
    local command
    command=$(printf '%q ' python -m hamu_jax.main "$@")
    echo "$command"
  else
    exec python -m hamu_jax.main "$@"
  fi
}

if ((processes == 1)); then
  run "$@"
  exit
fi
distributed=(--config.distributed.coordinator="$coordinator" --config.distributed.num_processes="$processes")
trap 'jobs -p | xargs -r kill 2>/dev/null || true' EXIT TERM INT
for ((i = 0; i < processes; i++)); do
  run "$@" "${distributed[@]}" --config.distributed.process_id="$i" &
done
status=0
for ((i = 0; i < processes; i++)); do
  # If one of them fails, the others would wait forever.
  wait -n || { status=$?; break; }
done
if ((status)); then
  jobs -p | xargs -r kill 2>/dev/null || true
  wait
fi
exit "$status"
