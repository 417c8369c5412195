#!/usr/bin/env bash
# Batch evaluation on one box: the windows of every cell are shared by its GPUs, or by CPU processes, then compared.
#   bash scripts/eval_torchrun.sh PLAN OUT [PROCESSES [OPTION...]]
# PROCESSES is one a GPU (a core where there is none) unless you say. Options go to `ahriuwu eval plan`: --batch 128, or
# --share cells, which gives every process whole cells (faster where cells are many and small).
# Finished cells and parts in OUT are skipped: after a crash, run the same line again. `ahriuwu` must be installed.
set -euo pipefail
[ $# -ge 2 ] || { echo "usage: $0 PLAN OUT [PROCESSES [OPTION...]]" >&2; exit 2; }
plan=$1 out=$2 processes=${3:-auto}
shift $(($# < 3 ? $# : 3))
# One thread a process: torchrun's own choice too, but said here since two cores with two threads each are slower.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
torchrun --standalone --nproc-per-node "$processes" -m ahriuwu_cli eval plan "$plan" --out "$out" "$@"
ahriuwu eval merge "$out" # OUT/merged.csv, merged.txt, merged.md; exit 1 when a rollout was not finite
