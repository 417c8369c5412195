#!/usr/bin/env bash
# The whole toolkit on real game video, on two CPU cores in under ten minutes:
# record ViZDoom, fit a tokenizer, train the dynamics, imagine, evaluate, sweep tau_ctx, verify.
# BUDGET sets the training time (default 330s); results go to runs/demo (OUT), those of an earlier demo there are replaced.
set -euo pipefail
began=$(date +%s)
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
budget=${BUDGET:-330s} out=${OUT:-$root/runs/demo}
case $out in /*) ;; *) out=$PWD/$out ;; esac
[[ $budget =~ ^([0-9]{1,7}(\.[0-9]{1,6})?s?|[0-9]{1,4}(\.[0-9]{1,6})?[mh])$ && $budget =~ [1-9] ]] || { echo "error: BUDGET '$budget' is not a time: write 90s, 4m or 2h" >&2; exit 2; }
if [ -e "$out" ] && [ ! -f "$out/stages.tsv" ] && [ -n "$(ls -A -- "$out")" ]; then
  echo "error: $out holds something else than a demo's results: choose another OUT" >&2
  exit 2
fi
source "$root/scripts/environment.sh"
out=${out#"$PWD/"}
rm -rf -- "$out"
mkdir -p -- "$out"
timings=$out/stages.tsv
printf 'environment\t%s\n' "$(($(date +%s) - began))" > "$timings"

stage() { # stage NAME COMMAND...: run, and note the seconds
  local name=$1 from
  shift
  from=$(date +%s)
  echo "== $name: $*" >&2
  "$@"
  printf '%s\t%s\n' "$name" "$(($(date +%s) - from))" >> "$timings"
}

stage record    ahriuwu record doom:defend_the_center --out "$out/data" --episodes 220 --size 64 --splits 0.7,0.08,0.22 --seed 0
stage tokenizer ahriuwu train tokenizer "$out/data" --out "$out/tokenizer" --patch 64x8 --latent-dim 128
stage train     ahriuwu train dynamics "$out/data" --tokenizer "$out/tokenizer" --out "$out/world" --ramp flat --bootstrap-share 0 --lr 5e-3 --budget "$budget"
stage rollout   ahriuwu rollout "$out/world" "$out/data" --out "$out/rollout" --length 32
stage turns     ahriuwu rollout "$out/world" "$out/data" --out "$out/turns" --length 8 --pick busiest \
  --actions repeat:TURN_LEFT --actions repeat:TURN_RIGHT --actions data
stage eval      ahriuwu eval "$out/world" "$out/data" --out "$out/eval" --windows 96 --looks consistency,spread,levels --report
stage sweep     ahriuwu sweep-tau "$out/world" "$out/data" --out "$out/sweep"
stage verify    ahriuwu verify "$out/world" --dataset "$out/data"
python scripts/demo_summary.py "$out" "$(($(date +%s) - began))"
