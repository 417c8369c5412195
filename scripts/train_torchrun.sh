#!/usr/bin/env bash
# Training on all GPUs of one box (or on CPU processes); the same line again goes on where it stopped.
#   bash scripts/train_torchrun.sh DATA OUT [PROCESSES [OPTION...]]
# PROCESSES is one a GPU (a core where there is none) unless you say. Options go to `ahriuwu train dynamics`, after these
# defaults: --size medium --batch 256 --precision bfloat16. The batch is that of all processes and must divide by their
# number; a model that does not fit one GPU is shared out by --parallel fsdp. PROCESSES and --parallel may be others when
# a run goes on: the steps stay the same. Ctrl-C or SIGTERM saves once and ends all; torchrun itself then exits with 1.
set -euo pipefail
[ $# -ge 2 ] || { echo "usage: $0 DATA OUT [PROCESSES [OPTION...]]" >&2; exit 2; }
data=$1 out=$2 processes=${3:-auto}
shift $(($# < 3 ? $# : 3))
[ -d "$out/tokenizer" ] || ahriuwu train tokenizer "$data" --out "$out/tokenizer"
length=(--steps "${STEPS:-100000}") # unless an option says how long
for option in "$@"; do case $option in --steps | --steps=* | --budget | --budget=*) length=() ;; esac; done
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
# torchrun passes SIGUSR1 on only when told to; and a large state takes longer to write than the 30 s that it would wait.
torchrun --standalone --nproc-per-node "$processes" \
  --signals-to-handle SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 --shutdown-timeout 600 \
  -m ahriuwu_cli train dynamics "$data" --tokenizer "$out/tokenizer" --out "$out/world" \
  --size medium --batch 256 --precision bfloat16 "${length[@]}" --save-every 2000 --preview-every 10000 \
  "$@"
