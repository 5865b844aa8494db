#!/usr/bin/env bash
# Runs `gigatok demo` from nothing but Python: trains a tiny tokenizer and a small generator on
# drawings, and writes pictures of reconstructions and samples.
#   bash launch/demo.sh [WORKDIR]
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/environment.sh
gigatok demo --workdir="${1:-runs/demo}"
