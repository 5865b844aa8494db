#!/usr/bin/env bash
# The main job on the embedded drawings, from nothing but Python: trains a tiny tokenizer and
# writes pictures of what it reconstructs. About ten minutes on two cores.
#   bash launch/demo.sh [WORKDIR]
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/environment.sh
gigatok demo --workdir="${1:-runs/demo}"
