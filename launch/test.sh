#!/usr/bin/env bash
# Lint, format and the whole test suite. Further arguments go to pytest, e.g. -k relation.
EXTRAS=test${EXTRAS:+,$EXTRAS}
source "$(dirname "$0")/env.sh"
ruff check .
ruff format --check .
python -m pytest "$@"
