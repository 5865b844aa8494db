# shellcheck shell=bash
# Sourced by the other scripts: creates .venv if needed, installs the package and activates it.
# EXTRAS adds an accelerator's JAX, for example EXTRAS=cuda bash launch/demo.sh. VENV is another
# environment than .venv, made with PYTHON.
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
venv="$root/${VENV:-.venv}"
extras="dev${EXTRAS:+,$EXTRAS}"
if [ ! -x "$venv/bin/python" ]; then
  echo "installing into $venv, which the launchers use" >&2
  "${PYTHON:-python3}" -m venv "$venv"
fi
# shellcheck disable=SC1091
source "$venv/bin/activate"
stamp="$venv/installed-$(printf '%s' "$extras ${CI:-}" | cksum | cut -d' ' -f1)"
if [ ! -e "$stamp" ] || [ "$root/pyproject.toml" -nt "$stamp" ]; then
  constraints=()
  # CI pins its versions; elsewhere the ranges of pyproject.toml apply.
  if [ -n "${CI:-}" ]; then constraints=(--constraint "$root/${LOCK:-.ci/lock.txt}"); fi
  python -m pip install --quiet --disable-pip-version-check "${constraints[@]}" \
    --editable "${root}[$extras]"
  touch "$stamp"
fi
