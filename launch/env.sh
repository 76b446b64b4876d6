# shellcheck shell=bash
# Sourced by the launch scripts, or run by itself: makes .venv (or $VENV) with this package, once, and activates it.
# PYTHON chooses the interpreter; EXTRAS what else to install, e.g. EXTRAS=cuda,torch.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
venv=${VENV:-.venv}
stamp="$venv/installed-$(cat setup.py <(echo "${EXTRAS:-}") | cksum | cut -d' ' -f1)"
if [[ ! -e $stamp ]]; then
  for python in "${PYTHON:-}" python3.12 python3.11 python3; do
    if [[ -n $python ]] && "$python" -c 'import ensurepip, sys, venv; sys.exit(sys.version_info[:2] not in [(3, 11), (3, 12)])' 2>/dev/null; then
      break
    fi
    python=
  done
  if [[ -z $python ]]; then
    echo "error: Python 3.11 or 3.12 with venv is needed; install one, or set PYTHON to it" >&2
    exit 2
  fi
  echo "installing into $venv with $("$python" --version) ..."
  "$python" -m venv "$venv"
  "$venv/bin/pip" install --quiet --disable-pip-version-check --editable ".${EXTRAS:+[$EXTRAS]}"
  touch "$stamp"
fi
source "$venv/bin/activate"
