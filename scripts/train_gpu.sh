#!/usr/bin/env bash
# Training on one GPU: a tokenizer for the dataset, then the dynamics; the same line again goes on where it stopped.
#   bash scripts/train_gpu.sh DATA OUT [OPTION...]
# Options go to `ahriuwu train dynamics`, after these defaults: --size small --batch 64 --precision bfloat16. A batch that
# does not fit is made of more micro-batches: --accumulate 4 (the step stays the same). `ahriuwu` must be installed.
set -euo pipefail
[ $# -ge 2 ] || { echo "usage: $0 DATA OUT [OPTION...]" >&2; exit 2; }
data=$1 out=$2
shift 2
[ -d "$out/tokenizer" ] || ahriuwu train tokenizer "$data" --out "$out/tokenizer"
length=(--steps "${STEPS:-100000}") # unless an option says how long
for option in "$@"; do case $option in --steps | --steps=* | --budget | --budget=*) length=() ;; esac; done
ahriuwu train dynamics "$data" --tokenizer "$out/tokenizer" --out "$out/world" --device cuda \
  --size small --batch 64 --precision bfloat16 "${length[@]}" --save-every 2000 --preview-every 10000 \
  "$@"
