# shellcheck shell=bash
# Sourced by the other scripts: creates .venv if it is not there, installs into it, activates it.
# An accelerator's JAX comes with EXTRAS, for example EXTRAS=cuda bash launch/demo.sh.
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
extras="dev${EXTRAS:+,$EXTRAS}"
if [ ! -x "$root/.venv/bin/python" ]; then
  echo "installing into $root/.venv, which the launchers use" >&2
  "${PYTHON:-python3}" -m venv "$root/.venv"
fi
# shellcheck disable=SC1091
source "$root/.venv/bin/activate"
stamp="$root/.venv/installed-$(printf '%s' "$extras ${CI:-}" | cksum | cut -d' ' -f1)"
if [ ! -e "$stamp" ] || [ "$root/pyproject.toml" -nt "$stamp" ]; then
  constraints=()
  # What CI runs with; elsewhere the ranges of pyproject.toml decide.
  if [ -n "${CI:-}" ]; then constraints=(--constraint "$root/.ci/lock.txt"); fi
  python -m pip install --quiet --disable-pip-version-check "${constraints[@]}" \
    --editable "${root}[$extras]"
  touch "$stamp"
fi
