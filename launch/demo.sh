#!/usr/bin/env bash
# The whole chain on scanned digits, on any machine. Stop it with Ctrl-C and run it again: it goes on.
# Further arguments go to `run`, e.g. --workdir=DIR.
source "$(dirname "$0")/env.sh"
python -m tinymim_jax run --config=configs/digits/chain.py "$@"
