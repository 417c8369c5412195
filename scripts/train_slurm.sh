#!/usr/bin/env bash
# Training on several nodes of a SLURM cluster: one torchrun a node, one process a GPU. Before its time is up the job
# saves, goes back into the queue and goes on from there, with as many nodes as it then gets.
#   sbatch --nodes 4 scripts/train_slurm.sh DATA OUT [OPTION...]
# DATA and OUT lie where all nodes see them. Options go to `ahriuwu train dynamics`, after these defaults: --size large
# --batch 512 --precision bfloat16 --parallel fsdp. The batch is that of all GPUs and must divide by their number.
#SBATCH --job-name=ahriuwu-train
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@900
#SBATCH --output=ahriuwu-train-%j.log
set -euo pipefail
[ $# -ge 2 ] || { echo "usage: sbatch --nodes 4 $0 DATA OUT [OPTION...]" >&2; exit 2; }
data=$1 out=$2
shift 2
# source /path/to/.venv/bin/activate
# Nodes with several networks: export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-4}
gpus=${SLURM_GPUS_ON_NODE:-8}
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)
port=$((20000 + SLURM_JOB_ID % 20000))
[ -d "$out/tokenizer" ] || srun --nodes 1 --ntasks 1 ahriuwu train tokenizer "$data" --out "$out/tokenizer"
length=(--steps "${STEPS:-500000}") # unless an option says how long
options=()
for option in "$@"; do
  case $option in --steps | --steps=* | --budget | --budget=*) length=() ;; esac
  # back from the queue it goes on with what it began: only the first start may take an older run's place
  [ "$option" = --overwrite ] && [ "${SLURM_RESTART_COUNT:-0}" != 0 ] || options+=("$option")
done

# SLURM tells this shell 15 minutes before the end (USR1), or when the job is preempted or cancelled (TERM). torchrun
# passes the signal on to its processes, which save once and end.
asked=
trap 'asked=USR1; kill -USR1 "$step" 2> /dev/null || true' USR1
trap 'asked=TERM; kill -TERM "$step" 2> /dev/null || true' TERM
srun --kill-on-bad-exit=1 --cpus-per-task "${SLURM_CPUS_PER_TASK:-1}" torchrun --nnodes "$SLURM_NNODES" --nproc-per-node "$gpus" \
  --rdzv-id "$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}" --rdzv-backend c10d --rdzv-endpoint "$head:$port" \
  --signals-to-handle SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 --shutdown-timeout 600 \
  -m ahriuwu_cli train dynamics "$data" --tokenizer "$out/tokenizer" --out "$out/world" \
  --size large --batch 512 --precision bfloat16 --parallel fsdp \
  "${length[@]}" --save-every 2000 --preview-every 10000 "${options[@]}" &
step=$!
code=0
wait "$step" || code=$?
while kill -0 "$step" 2> /dev/null; do # the trap ended the first wait
  code=0
  wait "$step" || code=$?
done
if [ "$asked" = USR1 ] && [ "$code" != 0 ]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
