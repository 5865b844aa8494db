#!/usr/bin/env bash
# A TPU slice of Google Cloud, of one host or hundreds: v4, v5e, v5p, v6e.
#   export NAME=gigatok ZONE=europe-west4-b PROJECT=my-project TYPE=v5p-32 NFS=10.0.0.2:/share
#   bash launch/tpu_pod.sh run train --config=configs/tokenizer.py:s_s --workdir=/shared/runs/s_s \
#     --config.data.path=/shared/tfds
#   bash launch/tpu_pod.sh run train --config=configs/generator.py:b --workdir=/shared/runs/b \
#     --config.tokenizer=/shared/runs/s_s --config.data.path=/shared/tfds
#   bash launch/tpu_pod.sh run probe --config=configs/probe.py --tokenizer=/shared/runs/s_s \
#     --workdir=/shared/runs/probe --config.data.path=/shared/tfds
#
#   create         asks for the slice and waits for it
#   install        sends the repository's tracked files to all workers and installs them
#   run VERB ...   creates what is missing, installs, starts the command on all workers, where it
#                  outlives this connection, and shows worker 0's log. After a preemption the same
#                  command gets a new slice and goes on from the last checkpoint
#   tail [N|all]   the log of worker N (0), until its run ends; or the last lines of all workers
#   stop           all workers save at one step and end
#   status         of the slice and of each worker
#   delete         gives the slice back
#
# NAME, ZONE, TYPE (v4-32, v5litepod-16, v5p-32, v6e-16, ...) and PROJECT say which; VERSION is the
# image (by default the one for the type), SPOT=1 asks for spot capacity, OPTIONS are further
# options of `gcloud compute tpus queued-resources create` (--network=..., --reserved). NFS is the
# share that every worker mounts at SHARED (/shared): with more than one worker, runs, codes and
# data must be there. Without NFS, SHARED is to be a file system that is mounted there anyhow.
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

state() { # nothing where there is no such slice
  queue describe --format='value(state.state)' 2>/dev/null || true
}

worker() { # WORKER COMMAND [ARGUMENTS]: tpu_worker.sh there
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
    SUSPENDED | SUSPENDING | FAILED) # preempted, or never there: the name is free only afterwards
      echo "tpu_pod.sh: $NAME is $now; asking for a new one" >&2
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
      FAILED | SUSPENDED) fail "$NAME became $now; bash launch/tpu_pod.sh status says why" ;;
    esac
    echo "tpu_pod.sh: $NAME is ${now:-not known yet}; waiting" >&2
    sleep "${POLL:-30}"
  done
}

install() {
  local archive
  archive="$(mktemp "${TMPDIR:-/tmp}/gigatok.XXXXXX")"
  # With what is changed and not committed; new files only after git add.
  git archive --format=tar.gz --output="$archive" "$(git stash create | grep . || echo HEAD)"
  gcloud compute tpus tpu-vm scp "$archive" "$NAME:gigatok.tar.gz" "${place[@]}" --worker=all
  rm -f "$archive"
  # Not under a run that goes on; then the same command is to fail, and `tail` what is wanted.
  gcloud compute tpus tpu-vm ssh "$NAME" "${place[@]}" --worker=all --command="
    if kill -0 \"\$(cat .gigatok/pid 2>/dev/null)\" 2>/dev/null; then
      echo 'a run is going on here: bash launch/tpu_pod.sh tail, or stop' >&2; exit 1
    fi
    mkdir -p gigatok_jax && tar -xzf gigatok.tar.gz -C gigatok_jax"
  worker all install
}

command="${1:-}"
case "$command" in
  create | install | run | tail | stop | status | delete) shift ;;
  *) fail "expected create, install, run VERB [FLAGS], tail [N|all], stop, status or delete" ;;
esac
command -v gcloud >/dev/null || fail "gcloud: https://cloud.google.com/sdk/docs/install says how"
need NAME ZONE PROJECT
mapfile -t place < <(where)
SHARED="${SHARED:-/shared}"

case "$command" in
  create) create ;;
  install) install ;;
  run)
    [ $# -gt 0 ] || fail "run: which command? for example: run train --config=... --workdir=..."
    create
    install
    worker all start "$@"
    echo "tpu_pod.sh: started; from here on interrupting only ends this view of worker 0" >&2
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
