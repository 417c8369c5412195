#!/usr/bin/env bash
# Makes the environment, then lint and tests, files shared out to the cores, and the shipped worlds' numbers.
# Arguments go to pytest, and then that is all: bash scripts/test.sh -m "not slow"
AHRIUWU_EXTRAS=doom,atari,dev
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
ruff check .
ruff format --check .
python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile "$@"
[ $# -gt 0 ] || python scripts/expected.py --short
