#!/usr/bin/env bash
# What this machine's accelerator makes of each step, with PyTorch in turn where it is installed, and of the relation loss:
#
#   EXTRAS=cuda,torch bash launch/bench.sh results [--rounds=3]
#   READY=1 bash launch/bench.sh results            # with the python on PATH as it is; nothing is installed
#
# One JSON file a measurement, what tells most first; what is there already is not measured again, so that a machine taken away
# loses little. A measurement may take LIMIT seconds (default: 600). STAGES chooses the stages of configs/imagenet/chain.py,
# BATCHES the batches (default: 128 256 64). The whole set takes hours, one stage at one batch some minutes.
: "${1:?a folder for the results}"
out=$(realpath -m "$1")
shift
if [[ -n ${READY:-} ]]; then
  set -euo pipefail
  cd "$(dirname "${BASH_SOURCE[0]}")/.."
else
  source "$(dirname "$0")/env.sh"
fi
mkdir -p "$out"
export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-${TMPDIR:-/tmp}/tinymim_jax_bench}
if ! python -c 'import jax, sys; sys.exit(jax.default_backend() == "cpu")'; then
  echo "error: jax sees no accelerator here; install it with EXTRAS=cuda or EXTRAS=tpu, or unset JAX_PLATFORMS" >&2
  exit 2
fi
vs=()
python -c 'import torch' 2> /dev/null && vs=(--vs=torch)
config=configs/imagenet/chain.py
read -ra stages <<< "${STAGES:-distill_b distill_t mae_l finetune_b distill_s finetune_t}"
read -ra batches <<< "${BATCHES:-128 256 64}"

measure() {  # NAME, then the arguments of bench
  local file=$out/$1.json
  shift
  if [[ ! -s $file ]]; then
    echo "$file"
    if timeout "${LIMIT:-600}" python -m tinymim_jax bench "$@" > "$file.partial"; then
      mv "$file.partial" "$file"
    else
      rm "$file.partial"
      echo "$file: not measured" >&2
    fi
  fi
}

steps() {  # STAGE BATCH ATTENTION, then more arguments of bench step
  measure "step-$1-$2-$3" step "--config=$config" "--stage=$1" "--batch_size=$2" "--config.stages.$1.model.attention=$3" "${@:4}"
}

for batch in "${batches[@]}"; do
  for stage in "${stages[@]}"; do
    steps "$stage" "$batch" xla "${vs[@]}" "$@"
    steps "$stage" "$batch" cudnn "$@"
  done
  if [[ $batch == "${batches[0]}" ]]; then
    for kernel in xla pallas; do
      measure "relation-$kernel" relation "--config=$config" --stage=distill_b --batch_size=4 --tokens=197,1025,4097 \
        "--config.stages.distill_b.task.relation_kernel=$kernel" "$@"
    done
  fi
done
