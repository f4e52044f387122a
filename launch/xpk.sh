#!/usr/bin/env bash
# Training on TPU slices of a GKE cluster that xpk has made.
#
#   CLUSTER=mine TPU=v5litepod-16 IMAGE=REGION-docker.pkg.dev/PROJECT/REPOSITORY/virst:tpu \
#     launch/xpk.sh NAME --config=stage3 --workdir=/shared/runs/a
#
# NAME is the workload's. /shared must be a file system that all hosts see (`xpk storage attach`). The image is built
# from the Dockerfile with EXTRAS=all,tpu. SLICES (1) is the number of slices. PROJECT and ZONE are those
# of gcloud where they are not set.
set -euo pipefail
if [ $# -lt 2 ]; then
  echo "launch/xpk.sh: give a name for the workload, and the arguments of virst train" >&2
  exit 2
fi
for variable in CLUSTER TPU IMAGE; do
  if [ -z "${!variable:-}" ]; then
    echo "launch/xpk.sh: $variable is not set; the first lines of this file say what it is" >&2
    exit 2
  fi
done
name=$1
shift
printf -v arguments ' %q' "$@"
place=()
if [ -n "${PROJECT:-}" ]; then place+=(--project "$PROJECT"); fi
if [ -n "${ZONE:-}" ]; then place+=(--zone "$ZONE"); fi
xpk workload create --workload "$name" --cluster "$CLUSTER" --tpu-type "$TPU" --num-slices "${SLICES:-1}" \
  --docker-image "$IMAGE" --max-restarts 100 "${place[@]}" \
  --command "virst train --config.distributed=True$arguments"
