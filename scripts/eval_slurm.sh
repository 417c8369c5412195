#!/usr/bin/env bash
# Batch evaluation on a SLURM cluster: an array whose tasks share the cells of a plan, one GPU each; then compare.
#   job=$(sbatch --parsable --array=0-7 scripts/eval_slurm.sh PLAN OUT)
#   sbatch --dependency=afterany:$job --wrap "ahriuwu eval merge OUT --plan PLAN"
# (the merge names cells of the plan that are missing and ends with 1: submit the array again, which does those alone)
# The array has no gaps (0-7, not 1,5); its size need not fit the number of cells. OUT lies where all nodes see it.
# Finished cells are skipped: after a time-out, submit the same line again. `ahriuwu` must be on PATH (activate below).
#SBATCH --job-name=ahriuwu-eval
#SBATCH --gres=gpu:1
#SBATCH --cpus-per-task=4
#SBATCH --mem=32G
#SBATCH --time=02:00:00
#SBATCH --output=ahriuwu-eval-%A-%a.log
set -euo pipefail
[ $# -ge 2 ] || { echo "usage: sbatch --array=0-7 $0 PLAN OUT [OPTION...]" >&2; exit 2; }
plan=$1 out=$2
shift 2
# source /path/to/.venv/bin/activate
export OMP_NUM_THREADS=${SLURM_CPUS_PER_TASK:-1}
# The share comes from SLURM_ARRAY_TASK_ID, _COUNT and _MIN; options go through, as in --batch 128.
# With several GPUs a task: torchrun --standalone --nproc-per-node gpu -m ahriuwu_cli eval plan ... shares windows too.
ahriuwu eval plan "$plan" --out "$out" "$@"
