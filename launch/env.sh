# shellcheck shell=bash
# Sourced by the launch scripts, or run by itself: makes .venv (or $VENV) with this package, once, and activates it.
# A new one gets the newest Python with which the package can be installed; PYTHON chooses another. EXTRAS says what else to
# install, e.g. EXTRAS=cuda,torch.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
venv=${VENV:-.venv}
stamp="$venv/installed-$(cat setup.py <(echo "${EXTRAS:-}") | cksum | cut -d' ' -f1)"

is_supported() {  # PYTHON; pyenv has shims for all its versions, of which only the selected ones run
  "$1" -c 'import ensurepip, sys, venv; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 14))' 2> /dev/null
}

minor_version() {  # PYTHON
  "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2> /dev/null
}

install() {  # PYTHON
  local is_new=
  [[ -e $venv ]] || is_new=1
  echo "installing into $venv with $("$1" --version) ..."
  "$1" -m venv "$venv" &&
    "$venv/bin/pip" install --quiet --disable-pip-version-check --prefer-binary --editable ".${EXTRAS:+[$EXTRAS]}" &&
    touch "$stamp" && return
  [[ -z $is_new ]] || rm -rf "$venv"
  return 1
}

if [[ -n ${PYTHON:-} && -e $venv/bin/python && $(minor_version "$venv/bin/python") != $(minor_version "$PYTHON") ]]; then
  echo "error: $venv is not of the version of PYTHON=$PYTHON; delete it, or set VENV to another folder" >&2
  exit 2
fi
if [[ ! -e $stamp ]]; then
  pythons=(python3.14 python3.13 python3.12 python3.11 python3)
  [[ ! -e $venv/bin/python ]] || pythons=("$venv/bin/python")
  [[ -z ${PYTHON:-} ]] || pythons=("$PYTHON")
  found=
  for python in "${pythons[@]}"; do
    is_supported "$python" || continue
    found=1
    ! install "$python" || break
  done
  if [[ -z $found ]]; then
    echo "error: none of these is a Python from 3.11 to 3.14 with venv: ${pythons[*]}; install one (apt install python3" \
      "python3-venv, or uv python install 3.13), or set PYTHON to its path" >&2
    exit 2
  elif [[ ! -e $stamp ]]; then
    echo "error: $venv could not be made; what pip says is above" >&2
    exit 2
  fi
fi
source "$venv/bin/activate"
# XLA asks for a step's memory anew each time: an allocator that keeps it spares the page faults (docs/BENCHMARKS.md).
# TCMALLOC=FILE names another one, TCMALLOC=none none.
if [[ -z ${LD_PRELOAD:-} ]]; then
  libraries=(/usr/lib/*-linux-gnu/libtcmalloc{_minimal,}.so.4 /usr/lib64/libtcmalloc{_minimal,}.so.4)
  [[ -z ${TCMALLOC:-} ]] || libraries=("$TCMALLOC")
  for library in "${libraries[@]}"; do
    [[ ! -e $library ]] || { export LD_PRELOAD=$library TCMALLOC_RELEASE_RATE=0; break; }
  done
fi
