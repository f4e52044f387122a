#!/usr/bin/env bash
# Training on the virtual machines of a TPU slice, requested as a queued resource.
#
#   export NAME=virst ZONE=europe-west4-b TPU=v5litepod-16 RUNTIME=v2-alpha-tpuv5-lite
#   launch/queued_resource.sh create --spot     # further flags go to gcloud
#   launch/queued_resource.sh wait              # until the slice is there
#   launch/queued_resource.sh install virst_jax-0.1.0-py3-none-any.whl
#   launch/queued_resource.sh train --config=stage3 --workdir=/shared/runs/a
#   launch/queued_resource.sh stop              # all hosts write a checkpoint and end
#   launch/queued_resource.sh delete            # ends the costs
#
# /shared must be a file system that all hosts see (Filestore, mounted on every host); gs://BUCKET/runs/a does as well.
# `train` may be given again at any time: the run goes on where it stopped. A spot slice that was taken away is made
# again by `delete` and `create`.
set -euo pipefail
: "${NAME:?is not set: a name for the slice}" "${ZONE:?is not set: such as europe-west4-b}"

everywhere() {
  gcloud compute tpus tpu-vm ssh "$NAME" --zone "$ZONE" --worker=all --command "$1"
}

case "${1:-}" in
  create)
    shift
    : "${TPU:?is not set: such as v5litepod-16}" "${RUNTIME:?is not set: such as v2-alpha-tpuv5-lite}"
    gcloud compute tpus queued-resources create "$NAME" --node-id "$NAME" --zone "$ZONE" \
      --accelerator-type "$TPU" --runtime-version "$RUNTIME" "$@"
    ;;
  wait)
    while true; do
      state=$(gcloud compute tpus queued-resources describe "$NAME" --zone "$ZONE" --format 'value(state.state)')
      echo "$(date +%H:%M) $state"
      case "$state" in
        ACTIVE) break ;;
        FAILED | SUSPENDED | SUSPENDING)
          echo "launch/queued_resource.sh: the slice will not come; delete the request and create it again" >&2
          exit 1
          ;;
      esac
      sleep 60
    done
    ;;
  install)
    wheel=${2:?give the wheel that python -m build has made}
    gcloud compute tpus tpu-vm scp "$wheel" "$NAME:" --zone "$ZONE" --worker=all
    everywhere "python3 -m venv ~/virst && ~/virst/bin/pip install --quiet '$(basename "$wheel")[all,buckets,tpu]'"
    ;;
  train)
    shift
    printf -v arguments ' %q' "$@"
    everywhere "exec ~/virst/bin/virst train --config.distributed=True$arguments"
    ;;
  stop)
    everywhere "pkill -TERM -f virst/bin/virst || true"
    ;;
  delete)
    gcloud compute tpus queued-resources delete "$NAME" --zone "$ZONE" --force
    ;;
  *)
    echo "launch/queued_resource.sh: create, wait, install, train, stop or delete; see its first lines" >&2
    exit 2
    ;;
esac
