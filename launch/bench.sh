#!/usr/bin/env bash
# What this machine's accelerator makes of each step, with PyTorch in turn where it is installed, and of the relation loss. Each
# step is measured with XLA's attention and, on an Nvidia GPU, with cuDNN's, a distillation also with our kernel for its loss
# (pallas), a small model also with ten steps in one dispatch (scanned); the first of them three times:
#
#   EXTRAS=cuda,torch bash launch/bench.sh results [--rounds=3]
#   READY=1 bash launch/bench.sh results            # with the python on PATH as it is; nothing is installed
#
# One JSON file a measurement, what tells most first; what is there already is not measured again, so that a machine taken away
# loses little. A measurement may take LIMIT seconds (default: 600). STAGES chooses the stages of configs/imagenet/chain.py,
# BATCHES the batches (default: 128 256 64). The whole set takes hours, one stage at one batch some minutes. What could not be
# measured is named, and the exit status is then 1.
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
backend=$(python -c 'import jax; print(jax.default_backend())') || backend=cpu
if [[ $backend == cpu ]]; then
  echo "error: jax sees no accelerator here; install it with EXTRAS=cuda or EXTRAS=tpu, or unset JAX_PLATFORMS" >&2
  exit 2
fi
vs=()
python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2> /dev/null && vs=(--vs=torch)
fused=xla
[[ $backend == gpu ]] && fused=cudnn
config=configs/imagenet/chain.py
read -ra stages <<< "${STAGES:-distill_b distill_t mae_l finetune_b distill_s finetune_t}"
read -ra batches <<< "${BATCHES:-128 256 64}"

status=0
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
      status=1
    fi
  fi
}

steps() {  # STAGE BATCH, then more arguments of bench step: every way of computing it
  local stage=$1 batch=$2 fields="--config.stages.$1"
  shift 2
  local call=(step "--config=$config" "--stage=$stage" "--batch_size=$batch" "${vs[@]}")
  for attention in $(printf '%s\n' "$fused" xla | uniq); do
    measure "step-$stage-$batch-$attention" "${call[@]}" "$fields.model.attention=$attention" "$@"
  done
  if [[ $stage == distill_* ]]; then
    measure "step-$stage-$batch-pallas" "${call[@]}" "$fields.model.attention=$fused" \
      "$fields.task.relation_kernel=pallas" "$@"
  fi
  if [[ $stage == *_t ]]; then
    measure "step-$stage-$batch-scanned" "${call[@]}" "$fields.model.attention=$fused" \
      "$fields.run.steps_per_call=10" "$@"
  fi
}

for batch in "${batches[@]}"; do
  for stage in "${stages[@]}"; do
    steps "$stage" "$batch" "$@"
  done
  if [[ $batch == "${batches[0]}" ]]; then
    for kernel in xla pallas; do
      measure "relation-$kernel" relation "--config=$config" --stage=distill_b --batch_size=4 --tokens=197,1025,4097 \
        "--config.stages.distill_b.task.relation_kernel=$kernel" "$@"
    done
    for again in 2 3; do
      measure "step-${stages[0]}-$batch-$fused-$again" step "--config=$config" "--stage=${stages[0]}" "--batch_size=$batch" \
        "${vs[@]}" "--config.stages.${stages[0]}.model.attention=$fused" "$@"
    done
  fi
done
exit $status
