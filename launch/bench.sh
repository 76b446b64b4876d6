#!/usr/bin/env bash
# What this machine's accelerator makes of each step, with PyTorch in turn where it is installed, and of the relation loss:
#
#   EXTRAS=cuda,torch bash launch/bench.sh results [--rounds=3]
#
# One JSON file a measurement; what is there already is not measured again, so that a machine taken away loses little.
# BATCHES chooses the batches (default: 64 128 256), STAGES the stages of configs/imagenet/chain.py.
source "$(dirname "$0")/env.sh"
out=${1:?a folder for the results}
shift
mkdir -p "$out"
config=configs/imagenet/chain.py

measure() {  # NAME, then the arguments of bench
  local file=$out/$1.json
  shift
  if [[ ! -s $file ]]; then
    echo "$file"
    python -m tinymim_jax bench "$@" > "$file.partial" && mv "$file.partial" "$file" || echo "$file: not measured" >&2
  fi
}

vs=()
python -c 'import torch' 2> /dev/null && vs=(--vs=torch)
for stage in ${STAGES:-distill_b distill_s distill_t mae_l finetune_b finetune_t}; do
  for batch in ${BATCHES:-64 128 256}; do
    for attention in xla cudnn; do
      at=("--config=$config" "--stage=$stage" "--batch_size=$batch")
      measure "step-$stage-$batch-$attention" step "${at[@]}" "${vs[@]}" "--config.stages.$stage.model.attention=$attention" "$@"
    done
  done
done
for kernel in xla pallas; do
  measure "relation-$kernel" relation "--config=$config" --stage=distill_b --batch_size=8 --tokens=197,1025,4097 \
    "--config.stages.distill_b.task.relation_kernel=$kernel" "$@"
done
