#!/usr/bin/env bash
# Called by tpu_pod.sh on each worker of a TPU slice, not by hand.
#   install             mounts the shared disk, installs Python and the package
#   start VERB [FLAGS]  starts a run in the background, with its log in $SHARED/logs/$NAME
#   stop | log | status
set -euo pipefail
cd "$(dirname "$0")/.."
name="${NAME:-gigatok}"
export SHARED="${SHARED:-/shared}" EXTRAS="${EXTRAS:-tpu}"
logs="$SHARED/logs/$name"
log="$logs/worker-${HOSTNAME##*-w-}.log" # hosts are named t1v-n-...-w-N, N the worker's number
state="$HOME/.gigatok"
mkdir -p "$state"

running() { [ -e "$state/pid" ] && kill -0 "$(cat "$state/pid")" 2>/dev/null; }

mount_shared() {
  # Before each run, because a restarted host has lost the mount.
  if [ -n "${NFS:-}" ] && ! mountpoint -q "$SHARED"; then
    if ! command -v mount.nfs >/dev/null; then
      sudo apt-get -qq update
      sudo apt-get -qq install -y nfs-common
    fi
    sudo mkdir -p "$SHARED"
    sudo mount -t nfs -o nconnect=4 "$NFS" "$SHARED"
  fi
  if [ ! -d "$SHARED" ]; then
    sudo mkdir -p "$SHARED"
    sudo chown "$(id -u)" "$SHARED"
  fi
  mkdir -p "$logs"
}

python_at_least_311() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }

case "${1:-}" in
  install)
    mount_shared
    PYTHON=python3
    if ! python_at_least_311 "$PYTHON"; then # TPU images come with 3.10
      python3 -m pip install --quiet --user uv
      "$HOME/.local/bin/uv" python install --quiet 3.12
      PYTHON="$("$HOME/.local/bin/uv" python find 3.12)"
    fi
    export PYTHON
    source launch/environment.sh
    ;;
  start)
    shift
    mount_shared
    # Large pages save minutes when the TPU runtime starts. A restarted host has lost the setting.
    sudo sh -c 'echo always > /sys/kernel/mm/transparent_hugepage/enabled' || true
    # In a session of its own, so that it outlives this connection.
    setsid nohup bash "$0" attached "$@" >>"$log" 2>&1 </dev/null &
    echo "$!" >"$state/pid"
    ;;
  attached)
    shift
    source launch/environment.sh
    trap : TERM # when the host shuts down, wait for gigatok, which gets the signal too and saves
    echo "== $(date '+%F %T') gigatok $*"
    bash launch/accelerator.sh tpu gigatok "$@" &
    echo "$!" >"$state/program"
    code=0
    wait "$!" || code=$?
    while kill -0 "$(cat "$state/program")" 2>/dev/null; do
      code=0
      wait "$(cat "$state/program")" || code=$?
    done
    rm -f "$state/pid" "$state/program"
    echo "== $(date '+%F %T') ended with $code"
    exit "$code"
    ;;
  stop)
    if running && [ -e "$state/program" ]; then kill -TERM "$(cat "$state/program")"; fi
    ;;
  log)
    follow=()
    if running; then follow=(--follow=name --retry --pid="$(cat "$state/pid")"); fi # to its end
    tail --lines=20 "${follow[@]}" "$log"
    ;;
  status)
    if running; then what=running; else what="not running"; fi
    echo "$HOSTNAME: $what: $(tail --lines=1 "$log" 2>/dev/null || echo 'no log yet')"
    ;;
  *)
    echo "tpu_worker.sh: unknown command: ${1:-}" >&2
    exit 2
    ;;
esac
