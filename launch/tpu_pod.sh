#!/bin/bash
# Runs one experiment on all hosts of a TPU pod slice. This project must be in the same folder on each host, and
# the run directory on a file system that they share:
#
#   launch/tpu_pod.sh NAME ZONE FOLDER --config=configs/tofu_llama2_hamu.py --workdir=/mnt/runs/tofu
#
# NAME and ZONE identify the slice; FOLDER is the project's folder on its hosts. DRY_RUN=1 prints the command
# instead.
set -euo pipefail
if (($# < 4)); then
  echo "usage: $0 NAME ZONE FOLDER --config=FILE --workdir=DIR [--config.FIELD=VALUE ...]" >&2
  exit 2
fi
name=$1 zone=$2 folder=$3
shift 3
remote=$(printf '%q ' cd "$folder")'&& '$(printf '%q ' python3 -m hamu_jax.main "$@" --config.distributed.coordinator=auto)
command=(gcloud compute tpus tpu-vm ssh "$name" --zone="$zone" --worker=all --command="${remote% }")
if [[ -n ${DRY_RUN:-} ]]; then
  printf '%q ' "${command[@]}"
  echo
else
  exec "${command[@]}"
fi
