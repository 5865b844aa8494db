#!/usr/bin/env bash
# Runs `gigatok` commands on a TPU slice of Google Cloud (v4, v5e, v5p, v6e) of any size.
#   export NAME=gigatok ZONE=europe-west4-b PROJECT=my-project TYPE=v5p-32 NFS=10.0.0.2:/share
#   bash launch/tpu_pod.sh run train --config=configs/tokenizer.py:s_s --workdir=/shared/runs/s_s \
#     --config.data.path=/shared/tfds
#   bash launch/tpu_pod.sh run train --config=configs/generator.py:b --workdir=/shared/runs/b \
#     --config.tokenizer=/shared/runs/s_s --config.data.path=/shared/tfds
#   bash launch/tpu_pod.sh run probe --config=configs/probe.py --tokenizer=/shared/runs/s_s \
#     --workdir=/shared/runs/probe --config.data.path=/shared/tfds
#
#   create         requests the slice and waits for it
#   install        sends the repository's tracked files to all workers and installs them
#   run VERB ...   creates the slice if needed, installs, starts the command on all workers and
#                  follows the log of worker 0. The command outlives the connection. After a
#                  preemption the same command gets a new slice and resumes from the last checkpoint
#   tail [N|all]   follows the log of worker N (0) until its run ends; all: each worker's last line
#   stop           all workers save at the same step and exit
#   status         state of the slice and of each worker
#   delete         deletes the slice
#
# Settings, with their defaults in parentheses:
#   NAME, ZONE, PROJECT  of the slice
#   TYPE                 v4-32, v5litepod-16, v5p-32, v6e-16, ...
#   VERSION              the image (the one for TYPE)
#   SPOT=1               requests spot capacity
#   OPTIONS              of `gcloud compute tpus queued-resources create`: --network=..., --reserved
#   NFS                  the share that every worker mounts at SHARED
#   SHARED (/shared)     the folder for runs, codes and data of several workers. Without NFS, it
#                        must be mounted already
set -euo pipefail
cd "$(dirname "$0")/.."

fail() {
  echo "tpu_pod.sh: $1" >&2
  exit 2
}

need() {
  for variable in "$@"; do
    [ -n "${!variable:-}" ] || fail "$variable is not set; see the top of launch/tpu_pod.sh"
  done
}

where() { printf '%s\n' --zone="$ZONE" --project="$PROJECT"; }

image() { # https://cloud.google.com/tpu/docs/runtimes
  case "$TYPE" in
    v4-*) echo tpu-ubuntu2204-base ;;
    v5litepod-*) echo v2-alpha-tpuv5-lite ;;
    v5p-*) echo v2-alpha-tpuv5 ;;
    v6e-*) echo v2-alpha-tpuv6e ;;
    *) fail "TYPE=$TYPE: expected v4-N, v5litepod-N, v5p-N or v6e-N; for others set VERSION" ;;
  esac
}

queue() { gcloud compute tpus queued-resources "$1" "$NAME" "${place[@]}" "${@:2}"; }

state() { # prints nothing if the slice does not exist
  queue describe --format='value(state.state)' 2>/dev/null || true
}

worker() { # WORKER COMMAND [ARGUMENTS]: runs tpu_worker.sh there
  local settings
  settings="NAME=$(printf %q "$NAME") SHARED=$(printf %q "$SHARED") NFS=$(printf %q "${NFS:-}")"
  gcloud compute tpus tpu-vm ssh "$NAME" "${place[@]}" --worker="$1" \
    --command="$settings bash gigatok_jax/launch/tpu_worker.sh $(printf '%q ' "${@:2}")"
}

create() {
  need TYPE
  local version now
  version="${VERSION:-$(image)}"
  now="$(state)"
  case "$now" in
    SUSPENDED | SUSPENDING | FAILED) # preempted or never created; deleting it frees the name
      echo "tpu_pod.sh: $NAME is $now; requesting a new one" >&2
      queue delete --force --quiet
      now=
      ;;
  esac
  if [ -z "$now" ]; then
    local options=()
    read -r -a options <<<"${OPTIONS:-}"
    if [ -n "${SPOT:-}" ]; then options+=(--spot); fi
    queue create --node-id="$NAME" --accelerator-type="$TYPE" --runtime-version="$version" \
      "${options[@]}"
  fi
  while now="$(state)" && [ "$now" != ACTIVE ]; do
    case "$now" in
      FAILED | SUSPENDED) fail "$NAME became $now; for the reason: bash launch/tpu_pod.sh status" ;;
    esac
    echo "tpu_pod.sh: $NAME is ${now:-not listed yet}; waiting" >&2
    sleep "${POLL:-30}"
  done
}

install() {
  local archive
  archive="$(mktemp "${TMPDIR:-/tmp}/gigatok.XXXXXX")"
  # Includes uncommitted changes; new files only after git add.
  git archive --format=tar.gz --output="$archive" "$(git stash create | grep . || echo HEAD)"
  gcloud compute tpus tpu-vm scp "$archive" "$NAME:gigatok.tar.gz" "${place[@]}" --worker=all
  rm -f "$archive"
  # Never installs under a live run: after a lost connection the user wants `tail`, not `run`.
  gcloud compute tpus tpu-vm ssh "$NAME" "${place[@]}" --worker=all --command="
    if kill -0 \"\$(cat .gigatok/pid 2>/dev/null)\" 2>/dev/null; then
      echo 'a run is still active here: bash launch/tpu_pod.sh tail, or stop' >&2; exit 1
    fi
    mkdir -p gigatok_jax && tar -xzf gigatok.tar.gz -C gigatok_jax"
  worker all install
}

command="${1:-}"
case "$command" in
  create | install | run | tail | stop | status | delete) shift ;;
  *) fail "expected create, install, run VERB [FLAGS], tail [N|all], stop, status or delete" ;;
esac
command -v gcloud >/dev/null || fail "no gcloud: see https://cloud.google.com/sdk/docs/install"
need NAME ZONE PROJECT
mapfile -t place < <(where)
SHARED="${SHARED:-/shared}"

case "$command" in
  create) create ;;
  install) install ;;
  run)
    [ $# -gt 0 ] || fail "run: expected a command, such as run train --config=... --workdir=..."
    create
    install
    worker all start "$@"
    echo "tpu_pod.sh: started; Ctrl-C now only ends this view of worker 0" >&2
    worker 0 log
    ;;
  tail)
    if [ "${1:-0}" = all ]; then worker all status; else worker "${1:-0}" log; fi
    ;;
  stop) worker 0 stop ;;
  status)
    queue describe --format='yaml(name,state,tpu.nodeSpec[0].node.acceleratorType)'
    [ "$(state)" != ACTIVE ] || worker all status
    ;;
  delete) queue delete --force --quiet ;;
esac
