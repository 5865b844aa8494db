#!/usr/bin/env bash
# Runs a command in N processes on this machine (CPU or GPUs), as on N machines of a cluster:
#   bash launch/local.sh 2 train --config=configs/tokenizer.py:s_s --workdir=runs/s_s
#   bash launch/local.sh 2 train --config=configs/generator.py:b --workdir=runs/b \
#     --config.tokenizer=runs/s_s
#   bash launch/local.sh 2 probe --config=configs/probe.py --tokenizer=runs/s_s --workdir=runs/probe
# The GPUs (or those in CUDA_VISIBLE_DEVICES) are divided evenly. On a CPU each process has one
# device; DEVICES=4 makes it four. Process 0 writes to the terminal, the others to the folder LOGS
# (by default a new one under /tmp). The script names a process that fails or is killed; the others
# then exit by themselves.
set -euo pipefail
cd "$(dirname "$0")/.."
if [[ ! "${1:-}" =~ ^[1-9][0-9]*$ ]] || [ $# -lt 2 ]; then
  echo "usage: bash launch/local.sh N VERB [FLAGS]" >&2
  exit 2
fi
source launch/environment.sh
count=$1
shift
logs="${LOGS:-$(mktemp -d /tmp/gigatok.XXXXXX)}"
mkdir -p "$logs"
port="${PORT:-$(python -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])')}"
kind=cpu gpus=()
if [ "${JAX_PLATFORMS:-}" != cpu ] && command -v nvidia-smi >/dev/null; then
  all="$(seq -s, 0 $(($(nvidia-smi --list-gpus | wc -l) - 1)))"
  IFS=, read -ra gpus <<<"${CUDA_VISIBLE_DEVICES-$all}"
fi
if ((${#gpus[@]} == 0)); then
  export XLA_FLAGS="${XLA_FLAGS:-} --xla_force_host_platform_device_count=${DEVICES:-1}"
elif ((${#gpus[@]} % count)); then
  echo "local.sh: $count processes cannot share ${#gpus[@]} GPUs evenly" >&2
  exit 2
else
  kind=cuda
fi

pids=()
for ((i = 0; i < count; i++)); do
  place=(--coordinator="localhost:$port" --processes="$count" --process="$i")
  if ((${#gpus[@]})); then
    each=$((${#gpus[@]} / count))
    CUDA_VISIBLE_DEVICES="$(
      IFS=,
      echo "${gpus[*]:i*each:each}"
    )"
    export CUDA_VISIBLE_DEVICES
  fi
  if ((i == 0)); then
    bash launch/accelerator.sh "$kind" python -m gigatok_jax "$@" "${place[@]}" &
  else
    bash launch/accelerator.sh "$kind" python -m gigatok_jax "$@" "${place[@]}" >"$logs/$i.log" 2>&1 &
  fi
  pids+=($!)
done
echo "local.sh: processes 0 to $((count - 1)) are ${pids[*]}; logs in $logs" >&2

# Passes SIGTERM and Ctrl-C on to the processes, because a shell shields background processes from
# Ctrl-C. A second one kills them.
notices=0
# shellcheck disable=SC2317,SC2329 # the traps call it
pass_on() {
  notices=$((notices + 1))
  if ((notices == 1)); then signal=TERM; else signal=KILL; fi
  kill "-$signal" "${pids[@]}" 2>/dev/null || true
}
trap pass_on TERM INT

code=0
while ((${#pids[@]})); do
  for i in "${!pids[@]}"; do
    # bash's `wait -n` can miss one of two processes that exit together.
    if kill -0 "${pids[i]}" 2>/dev/null; then
      if ((code)) && [[ "$(ps -o state= -p "${pids[i]}" 2>/dev/null)" == T ]]; then kill -KILL "${pids[i]}"; fi
      continue
    fi
    status=0
    wait "${pids[i]}" || status=$?
    unset "pids[i]"
    if ((status > 128)); then
      echo "local.sh: process $i was ended by signal $((status - 128))" >&2
    elif ((status)); then
      echo "local.sh: process $i ended with $status" >&2
      # If all processes fail alike, process 0 has already said why.
      if ((i && status != code)); then tail -n 3 "$logs/$i.log" >&2; fi
    fi
    if ((status && !code)); then code=$status; fi
  done
  sleep 0.2
done
exit "$code"
