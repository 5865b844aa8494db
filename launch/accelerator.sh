#!/usr/bin/env bash
# Runs a command with the environment that one kind of accelerator needs. All launchers call it.
#   bash launch/accelerator.sh cuda gigatok train --config=configs/tokenizer.py:s_s \
#     --workdir=runs/s_s
#   bash launch/accelerator.sh tpu gigatok train --config=configs/generator.py:b --workdir=runs/b \
#     --config.tokenizer=runs/s_s
#   bash launch/accelerator.sh cuda gigatok probe --config=configs/probe.py --tokenizer=runs/s_s \
#     --workdir=runs/probe
# Variables that are already set keep their values. SHARED is a folder that all machines mount: if
# set, weights and compiled programs are cached there.
set -euo pipefail
kind="${1:-}"
if [[ ! "$kind" =~ ^(cuda|tpu|cpu)$ ]] || [ $# -lt 2 ]; then
  echo "usage: bash launch/accelerator.sh cuda|tpu|cpu COMMAND" >&2
  exit 2
fi
shift

# Weights are fetched once for all machines, and a run that resumes elsewhere need not recompile.
if [ -n "${SHARED:-}" ]; then export GIGATOK_CACHE="${GIGATOK_CACHE:-$SHARED/cache}"; fi

case "$kind" in
  cuda)
    # Makes a missing accelerator an error; JAX would fall back to the CPU, at a day per step.
    export JAX_PLATFORMS="${JAX_PLATFORMS:-cuda,cpu}"
    # Each process has its GPU to itself, but JAX's default leaves a quarter of the memory unused.
    # The remaining tenth is for NCCL, cuDNN and CUDA.
    if [ -z "${XLA_PYTHON_CLIENT_MEM_FRACTION:-}" ]; then # the old name; JAX rejects both together
      export XLA_CLIENT_MEM_FRACTION="${XLA_CLIENT_MEM_FRACTION:-0.9}"
    fi
    # Overlaps the reduction of gradients with computing the next ones; off by default in JAX 0.10
    # to 0.12. Do not add the flags for asynchronous collectives of older guides: these are always
    # on now, and XLA aborts on unknown flags.
    XLA_FLAGS="--xla_gpu_enable_latency_hiding_scheduler=true ${XLA_FLAGS:-}"
    # XLA would compute query, key and value in one product, and then copy each out of its result:
    # 3.7 of the 55 GB that a step of generator B moves.
    export XLA_FLAGS="--xla_gpu_dot_merger_threshold_mb=0 $XLA_FLAGS"
    # Logs why a collective fails. If NCCL chooses the wrong network, set NCCL_SOCKET_IFNAME and
    # NCCL_IB_HCA as in the cluster's manual.
    export NCCL_DEBUG="${NCCL_DEBUG:-WARN}"
    ;;
  tpu)
    export JAX_PLATFORMS="${JAX_PLATFORMS:-tpu,cpu}"
    # No LIBTPU_INIT_ARGS: on v5e, v5p and v6e the latency-hiding flags of older guides do not change
    # the compiled step, and those for asynchronous collectives do not change its collectives.
    ;;
  cpu) export JAX_PLATFORMS=cpu ;;
esac
exec "$@"
