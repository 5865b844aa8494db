#!/usr/bin/env bash
# Runs the tests in two processes. Arguments go to pytest: bash launch/test.sh -k quantizer
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/environment.sh
python -m pytest -n 2 --dist loadfile "$@"
