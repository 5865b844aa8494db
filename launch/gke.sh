#!/usr/bin/env bash
# Runs a `gigatok` command on Kubernetes: on TPU slices of GKE, or on GPU nodes of any cluster.
#   export IMAGE=europe-docker.pkg.dev/my-project/images/gigatok:tpu NAME=s-s
#   docker build -f launch/gke/Dockerfile --build-arg EXTRAS=tpu -t "$IMAGE" .
#   docker push "$IMAGE"
#   kubectl apply -f launch/gke/shared.yaml                 # once: /shared, which all pods mount
#   export ACCELERATOR=tpu-v6e-slice TOPOLOGY=4x4
#   bash launch/gke.sh tpu train --config=configs/tokenizer.py:s_s --workdir=/shared/runs/s_s \
#     --config.data.path=/shared/tfds
#   bash launch/gke.sh tpu train --config=configs/generator.py:b --workdir=/shared/runs/b \
#     --config.tokenizer=/shared/runs/s_s --config.data.path=/shared/tfds
#   bash launch/gke.sh tpu probe --config=configs/probe.py --tokenizer=/shared/runs/s_s \
#     --workdir=/shared/runs/probe --config.data.path=/shared/tfds
#   ACCELERATOR=nvidia-h100-80gb NODES=2 bash launch/gke.sh gpu train ...  # EXTRAS=cuda in IMAGE
#
# Settings, with their defaults in parentheses:
#   NAME (gigatok)  of the job. An existing job of this name saves and ends; the new one resumes.
#   DRY=1           only prints the manifest.
#   tpu: ACCELERATOR is tpu-v4-podslice, tpu-v5-lite-podslice (v5e), tpu-v5p-slice or
#     tpu-v6e-slice; TOPOLOGY is the slice's shape in chips; CHIPS (4) per host; SLICES (1).
#     The cluster needs JobSet: https://jobset.sigs.k8s.io/docs/installation
#   gpu: ACCELERATOR is the value of the nodes' label; NODES (1); GPUS (8) per node.
set -euo pipefail
cd "$(dirname "$0")/gke"

fail() {
  echo "gke.sh: $1" >&2
  exit 2
}

kind="${1:-}"
if [[ ! "$kind" =~ ^(tpu|gpu)$ ]] || [ $# -lt 2 ]; then
  fail "usage: bash launch/gke.sh tpu|gpu VERB [FLAGS]"
fi
shift
for variable in IMAGE ACCELERATOR; do
  [ -n "${!variable:-}" ] || fail "$variable is not set; see the top of launch/gke.sh"
done
export IMAGE ACCELERATOR NAME="${NAME:-gigatok}"
if [ "$kind" = tpu ]; then
  [[ "${TOPOLOGY:-}" =~ ^[0-9]+x[0-9]+(x[0-9]+)?$ ]] ||
    fail "TOPOLOGY='${TOPOLOGY:-}': expected, for example, 4x4 or 2x2x4"
  chips=$((${TOPOLOGY//x/*}))
  CHIPS="${CHIPS:-$((chips < 4 ? chips : 4))}"
  ((chips % CHIPS == 0)) ||
    fail "TOPOLOGY=$TOPOLOGY has $chips chips, not a multiple of CHIPS=$CHIPS"
  export TOPOLOGY CHIPS SLICES="${SLICES:-1}" HOSTS=$((chips / CHIPS))
  pods="jobset.sigs.k8s.io/jobset-name=$NAME,jobset.sigs.k8s.io/job-index=0" made="jobset/$NAME"
else
  export NODES="${NODES:-1}" GPUS="${GPUS:-8}"
  pods="batch.kubernetes.io/job-name=$NAME" made="job/$NAME service/$NAME"
fi
pods+=",batch.kubernetes.io/job-completion-index=0"

# Quotes the command's words as JSON, so that they may contain any character.
manifest="$(python3 - "$kind.yaml" "$@" <<'EOF'
import json, os, pathlib, string, sys

words = ", ".join(map(json.dumps, sys.argv[2:]))
template = string.Template(pathlib.Path(sys.argv[1]).read_text())
print(template.substitute(os.environ, COMMAND=words))
EOF
)"
if [ -n "${DRY:-}" ]; then
  echo "$manifest"
  exit
fi
command -v kubectl >/dev/null || fail "no kubectl: see https://kubernetes.io/docs/tasks/tools"
kubectl delete --ignore-not-found --wait -f - <<<"$manifest"
kubectl create -f - <<<"$manifest"
echo "gke.sh: follow the log: kubectl logs --follow --tail=20 -l $pods"
echo "gke.sh: stop the job: kubectl delete $made"
