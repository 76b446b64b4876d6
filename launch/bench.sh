#!/usr/bin/env bash
# What this machine's accelerator makes of each step, with PyTorch in turn where it is installed, and of the relation loss. Each
# step is measured with XLA's attention and, on an Nvidia GPU, with cuDNN's, a distillation also with our kernel for its loss
# (pallas), a small model also with ten steps in one dispatch (scanned). The first two stages are measured three times, with
# cuDNN's attention, a small model scanned:
#
#   EXTRAS=cuda,torch bash launch/bench.sh results [--rounds=5]
#   READY=1 bash launch/bench.sh results            # with the python on PATH as it is; nothing is installed
#   bash launch/bench.sh --quick results            # within BUDGET seconds (default: 600) what tells most, and a table
#   CONFIG=configs/digits/chain.py BATCHES="8 16" bash launch/bench.sh --quick results    # rehearsed with small models, on a CPU too
#   EXTRAS=torch bash launch/bench.sh --cpu docs/benchmarks/NAME     # without an accelerator: what docs/BENCHMARKS.md has
#
# One JSON file a measurement, what tells most first; what is there already is not measured again, so that a machine taken away
# loses little. A measurement may take LIMIT seconds (default: 600). STAGES chooses the stages of configs/imagenet/chain.py,
# BATCHES the batches (default: 128 256 64). The whole set takes hours, one stage at one batch some minutes. One GPU is used:
# the first, or that of CUDA_VISIBLE_DEVICES. What could not be measured is named, and the exit status is then 1.
#
# --cpu measures in float32, three rounds unless told otherwise; STAGES are pairs such as distill_b:8 (a stage and its batch),
# DATA is an ImageFolder tree for the loader (without it, that is left out; it stands in the files as it is written here),
# STUDY, TOKENS and SEGMENT choose smaller things to rehearse with, LIMIT is 1800. python docs/generate.py then puts the tables
# of docs/benchmarks/NAME where docs/BENCHMARKS.md names that folder.
quick='' cpu=''
case ${1:-} in
  --quick) quick=1 && shift ;;
  --cpu)
    cpu=1 && shift
    export JAX_PLATFORMS=cpu CUDA_VISIBLE_DEVICES=''
    unset JAX_COMPILATION_CACHE_DIR  # the time to the first step is measured, too
    ;;
esac
if [[ $# == 0 || $1 == -* || (-e $1 && ! -d $1) ]]; then
  echo "error: name a folder for the results first: bash launch/bench.sh results [--rounds=N]" >&2
  exit 2
fi
out=$(realpath -m "$1")
shift
if [[ -n ${READY:-} ]]; then
  set -euo pipefail
  cd "$(dirname "${BASH_SOURCE[0]}")/.."
else
  source "$(dirname "$0")/env.sh"
fi
[[ -n $cpu ]] || export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-${TMPDIR:-/tmp}/tinymim_jax_bench}
export CUDA_VISIBLE_DEVICES=${CUDA_VISIBLE_DEVICES-0}
backend=$(python -c 'import jax; print(jax.default_backend())') || backend=cpu
if [[ $backend == cpu && -z ${CONFIG:-}$cpu ]]; then
  echo "error: jax sees no accelerator here; install it with EXTRAS=cuda or EXTRAS=tpu, unset JAX_PLATFORMS, or say --cpu" >&2
  exit 2
fi
mkdir -p "$out"
vs=()
python -c 'import sys, torch; sys.exit(not (sys.argv[1:] or torch.cuda.is_available()))' ${cpu:+1} 2> /dev/null && vs=(--vs=torch)
fused=xla
[[ $backend == gpu ]] && fused=cudnn
config=${CONFIG:-configs/imagenet/chain.py}
read -ra stages <<< "${STAGES:-distill_b distill_t mae_l finetune_b distill_s finetune_t}"
read -ra batches <<< "${BATCHES:-128 256 64}"

status=0
limit=${LIMIT:-$((cpu ? 1800 : 600))}
begin=$(date +%s)
measure() {  # NAME, then the arguments of bench, or a module of tests and its own
  local file=$out/$1.json call=(tinymim_jax bench "${@:2}") failed=0 limit=$limit left
  [[ $2 != tests.* ]] || call=("${@:2}")
  [[ -s $file ]] && return
  if [[ -n $quick ]]; then
    left=$((begin + ${BUDGET:-600} - $(date +%s)))
    if ((left < 30)); then
      echo "$file: not measured, the time is over; the same command measures it" >&2
      status=1
      return
    fi
    limit=$((left < limit ? left : limit))
  fi
  echo "$file"
  timeout "$limit" python -m "${call[@]}" > "$file.partial" || failed=$?
  if ((failed == 0)); then
    mv "$file.partial" "$file"
    return
  fi
  rm "$file.partial"
  status=1
  if ((failed == 124)); then
    echo "$file: not measured within $limit seconds; set LIMIT to more" >&2
  else
    echo "$file: not measured" >&2
  fi
}

step() {  # NAME STAGE BATCH ATTENTION, then more arguments of bench step
  local name=$1 fields="--config.stages.$2"
  local call=(step "--config=$config" "--stage=$2" "--batch_size=$3" "${vs[@]}" "$fields.model.attention=$4")
  shift 4
  measure "step-$name" "${call[@]}" "$@"
}

steps() {  # STAGE BATCH, then more arguments of bench step: every way of computing it
  local stage=$1 batch=$2 fields="--config.stages.$1"
  shift 2
  for attention in $(printf '%s\n' "$fused" xla | uniq); do
    step "$stage-$batch-$attention" "$stage" "$batch" "$attention" "$@"
  done
  if [[ $stage == distill_* ]]; then
    step "$stage-$batch-pallas" "$stage" "$batch" "$fused" "$fields.task.targets.relation.kernel=pallas" "$@"
  fi
  if [[ $stage == *_t ]]; then
    step "$stage-$batch-scanned" "$stage" "$batch" "$fused" "$fields.run.steps_per_call=10" "$@"
  fi
}

if [[ -n $quick ]]; then
  set -- --rounds=3 "$@"
  plain=("${vs[@]}")
  for batch in "${batches[@]:0:2}"; do
    vs=("${plain[@]}")
    step "distill_b-$batch-$fused" distill_b "$batch" "$fused" "$@"
    vs=()
    [[ $fused != xla ]] && step "distill_b-$batch-xla" distill_b "$batch" xla "$@"
    step "distill_b-$batch-pallas" distill_b "$batch" "$fused" \
      --config.stages.distill_b.task.targets.relation.kernel=pallas "$@"
  done
  vs=("${plain[@]}")
  step "distill_t-${batches[0]}-$fused" distill_t "${batches[0]}" "$fused" "$@"
  step "mae_l-${batches[0]}-$fused" mae_l "${batches[0]}" "$fused" "$@"
  for kernel in xla pallas; do
    measure "relation-$kernel" relation "--config=$config" --stage=distill_b --batch_size=4 --tokens=197,1025 \
      "--config.stages.distill_b.task.targets.relation.kernel=$kernel" "$@"
  done
  python -m tinymim_jax bench table "$out"
  exit $status
fi

if [[ -n $cpu ]]; then
  set -- --rounds=3 "$@"
  study=${STUDY:-configs/imagenet/study.py:table}
  float32() {  # STAGE
    echo "--config.stages.$1.model.dtype=float32"
  }
  read -ra pairs <<< "${STAGES:-distill_b:8 distill_s:8 distill_t:32 mae_l:8 finetune_b:8 finetune_s:16 finetune_t:32}"
  for pair in "${pairs[@]}"; do
    step "${pair/:/-}" "${pair%:*}" "${pair#*:}" xla "$(float32 "${pair%:*}")" "$@"
  done
  vs=()
  if [[ ! -s $out/step-distill_b-8-cached.json ]]; then  # its programs are compiled, and kept, by one that is not noted
    cache=$(mktemp -d)
    export JAX_COMPILATION_CACHE_DIR=$cache
    out=$cache step distill_b-8 distill_b 8 xla "$(float32 distill_b)" "$@"
    step distill_b-8-cached distill_b 8 xla "$(float32 distill_b)" "$@"
    unset JAX_COMPILATION_CACHE_DIR
    rm -r "$cache"
  fi
  measure step-digits-distill_t step --config=configs/digits/chain.py --stage=distill_t "$@" --rounds=5
  for stage in relation_b relation_masked_b; do
    measure "step-$stage-8" step "--config=$study=12" "--stage=$stage" --batch_size=8 "$(float32 "$stage")" "$@"
  done
  measure beside-relation_b-8 beside "--config=$study=7" --stage=relation_b --batch_size=8 "$(float32 relation_b)" "$@"
  measure relation-distill_b-2 relation "--config=$config" --stage=distill_b --batch_size=2 \
    "--tokens=${TOKENS:-197,1025,4097}" "$(float32 distill_b)" "$@"
  read -ra small <<< "${SEGMENT:-}"
  measure segment-base-2 tests.profile_segment "${small[@]}" "$@"
  for stage in ${DATA:+finetune_t mae_l}; do
    measure "loader-$stage" loader "--config=configs/imagenet/$stage.py:data=$DATA" "--stage=$stage" \
      "--config.stages.$stage.data.num_examples=none" "$@"
  done
  python -m tinymim_jax bench table "$out"
  exit $status
fi

for batch in "${batches[@]}"; do
  for stage in "${stages[@]}"; do
    steps "$stage" "$batch" "$@"
  done
  if [[ $batch == "${batches[0]}" ]]; then
    for kernel in xla pallas; do
      measure "relation-$kernel" relation "--config=$config" --stage=distill_b --batch_size=4 --tokens=197,1025,4097 \
        "--config.stages.distill_b.task.targets.relation.kernel=$kernel" "$@"
    done
    for rows in 64 256 1025; do
      measure "relation-rows-$rows" relation "--config=$config" --stage=distill_b --batch_size=4 --tokens=197,1025 \
        "--rows=$rows" "$@"
    done
    for again in 2 3; do
      for stage in "${stages[@]:0:2}"; do
        scanned=()
        [[ $stage == *_t ]] && scanned=("--config.stages.$stage.run.steps_per_call=10")
        step "$stage-$batch-again-$again" "$stage" "$batch" "$fused" "${scanned[@]}" "$@"
      done
    done
  fi
done
exit $status
