#!/usr/bin/env bash
# Runs a command with the settings that matter on one kind of accelerator, the one place for them:
#   bash launch/accelerator.sh cuda gigatok train --config=configs/tokenizer.py:s_s \
#     --workdir=runs/s_s
#   bash launch/accelerator.sh tpu gigatok train --config=configs/generator.py:b --workdir=runs/b \
#     --config.tokenizer=runs/s_s
#   bash launch/accelerator.sh cuda gigatok probe --config=configs/probe.py --tokenizer=runs/s_s \
#     --workdir=runs/probe
# The launchers of this folder call it. What the environment sets already is left as it is. SHARED
# is the folder that all machines mount; weights and compilations are then kept there.
set -euo pipefail
kind="${1:-}"
if [[ ! "$kind" =~ ^(cuda|tpu|cpu)$ ]] || [ $# -lt 2 ]; then
  echo "usage: bash launch/accelerator.sh cuda|tpu|cpu COMMAND" >&2
  exit 2
fi
shift

# Fetched once, found by all; and a run that resumes on other machines need not compile again.
if [ -n "${SHARED:-}" ]; then export GIGATOK_CACHE="${GIGATOK_CACHE:-$SHARED/cache}"; fi

case "$kind" in
  cuda)
    # An accelerator that does not come up is an error; JAX would go on with the CPU, a day a step.
    export JAX_PLATFORMS="${JAX_PLATFORMS:-cuda,cpu}"
    # One process has a GPU to itself; the default leaves a quarter of its memory unused. The rest
    # is for NCCL, cuDNN and CUDA's own.
    if [ -z "${XLA_PYTHON_CLIENT_MEM_FRACTION:-}" ]; then # its old name; JAX refuses both together
      export XLA_CLIENT_MEM_FRACTION="${XLA_CLIENT_MEM_FRACTION:-0.9}"
    fi
    # Gradients are reduced while others are computed; still off by default in JAX 0.10 to 0.12.
    # The only flag: the asynchronous collectives that older guides list are always on, and their
    # flags gone; one that XLA does not know ends the program.
    export XLA_FLAGS="--xla_gpu_enable_latency_hiding_scheduler=true ${XLA_FLAGS:-}"
    # A collective that fails says why. Which network NCCL takes it finds out; where it errs, set
    # NCCL_SOCKET_IFNAME and NCCL_IB_HCA to what the cluster's manual says.
    export NCCL_DEBUG="${NCCL_DEBUG:-WARN}"
    ;;
  tpu)
    export JAX_PLATFORMS="${JAX_PLATFORMS:-tpu,cpu}"
    # No LIBTPU_INIT_ARGS: with the flags for latency hiding that older guides list, a sharded step
    # compiles to the same program for v5e, v5p and v6e, and with those for asynchronous collectives
    # to one with the same collectives.
    ;;
  cpu) export JAX_PLATFORMS=cpu ;;
esac
exec "$@"
