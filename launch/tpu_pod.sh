#!/usr/bin/env bash
# A chain on a Cloud TPU pod slice, from this machine, with gcloud:
#
#   NAME=mim ZONE=us-central2-b bash launch/tpu_pod.sh create v4-64      # a (preemptible) slice
#   NAME=mim ZONE=us-central2-b bash launch/tpu_pod.sh install           # this checkout and its packages, on all workers
#   NAME=mim ZONE=us-central2-b bash launch/tpu_pod.sh run --config=configs/imagenet/chain.py:data=DIR --workdir=DIR
#   NAME=mim ZONE=us-central2-b bash launch/tpu_pod.sh log | delete
#
# `run` again goes on where it was, also on a slice that was taken away, created and installed again. Data and workdir must
# be seen by all workers (a mounted bucket or NFS). `run` starts in the background on each worker and writes ~/run.log there.
set -euo pipefail
: "${NAME:?the name of the slice}" "${ZONE:?its zone}"
verb=${1:?create, install, run, log or delete}
shift
tpu=(gcloud compute tpus tpu-vm)
at=("$NAME" "--zone=$ZONE")
everywhere=("${tpu[@]}" ssh "${at[@]}" --worker=all)

case $verb in
  create)
    "${tpu[@]}" create "${at[@]}" --accelerator-type="${1:?e.g. v4-64}" --version="${RUNTIME:-tpu-ubuntu2204-base}" ${SPOT:+--spot}
    ;;
  install)
    tar --exclude=./runs --exclude=./.venv --exclude=./.git -czf /tmp/tinymim_jax.tar.gz .
    "${tpu[@]}" scp /tmp/tinymim_jax.tar.gz "$NAME:" --zone="$ZONE" --worker=all
    "${everywhere[@]}" --command="mkdir -p tinymim && tar xzf tinymim_jax.tar.gz -C tinymim && cd tinymim && EXTRAS=tpu bash launch/env.sh"
    ;;
  run)
    # 75 says: stopped by SIGTERM, run me again.
    command="cd tinymim && source launch/env.sh && until python -m tinymim_jax run $(printf '%q ' "$@"); do [[ \$? == 75 ]] || break; done"
    "${everywhere[@]}" --command="EXTRAS=tpu nohup bash -c $(printf '%q' "$command") > run.log 2>&1 < /dev/null &"
    ;;
  log)
    "${tpu[@]}" ssh "${at[@]}" --worker=0 --command="tail -n 50 -f run.log"
    ;;
  delete)
    "${tpu[@]}" delete "${at[@]}"
    ;;
  *)
    echo "error: $verb: choose create, install, run, log or delete" >&2
    exit 2
    ;;
esac
