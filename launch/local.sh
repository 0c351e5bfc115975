#!/bin/bash
# One experiment on this machine's devices:
#
#   launch/local.sh --config=configs/digits_hamu.py --workdir=runs/digits
#
# PROCESSES=N splits it over N processes that work together as the hosts of a cluster do, which takes
# --config.pairing=pmap; each has the devices that it finds. DRY_RUN=1 prints the commands instead.
set -euo pipefail
processes=${PROCESSES:-1}
coordinator=localhost:${PORT:-12355}

run() {
  if [[ -n ${DRY_RUN:-} ]]; then
    # In one piece, because several do this at once.
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
  # Without one of them, the others would wait forever.
  wait -n || { status=$?; break; }
done
if ((status)); then
  jobs -p | xargs -r kill 2>/dev/null || true
  wait
fi
exit "$status"
