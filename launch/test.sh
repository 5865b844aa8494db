#!/usr/bin/env bash
# Runs the tests in two processes. Arguments go to pytest: bash launch/test.sh -k quantizer
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/environment.sh
# A worker that is killed, for memory perhaps, fails the run; after a restart xdist may hang.
python -m pytest -n 2 --dist loadfile --max-worker-restart=0 "$@"
