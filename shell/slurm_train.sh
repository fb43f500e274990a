#!/usr/bin/env bash
# A training recipe on several nodes of a Slurm cluster. Submit from the repository's folder, on storage that all nodes share;
# sbatch's options override those below:
#
#   TRAIN_DATA=prefix-or-glob OUTPUT=logs/b32 [RECIPE=train_RWKV_CLIP_B32_YFCC15M.sh] sbatch --nodes 4 shell/slurm_train.sh [--setting value ..]
#
# One torchrun per node. A lost rank ends all ranks, and they start again, MAX_RESTARTS times. Two minutes before the time
# limit all ranks save, and the job goes back into the queue, where it resumes with the same bits.
#SBATCH --job-name=rwkv-clip --nodes=2 --ntasks-per-node=1 --gpus-per-node=8 --cpus-per-task=64
#SBATCH --time=24:00:00 --signal=B:USR1@120 --requeue --open-mode=append --output=%x-%j.log
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:?start me with sbatch}"
source shell/needs.sh
need_records TRAIN_DATA "records made by data2rec.py: prefix, folder or glob"
source shell/setup.sh # once, here: the tasks find it done
read -r MASTER_ADDR < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
export MASTER_ADDR MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000)) NNODES=$SLURM_NNODES MAX_RESTARTS=${MAX_RESTARTS:-2}
export RECIPE=${RECIPE:-train_RWKV_CLIP_B32_YFCC15M.sh}
STOPPED= # SIGTERM to the steps: torchrun hands it to its ranks; SIGUSR1 would only kill torchrun
trap 'STOPPED=1; scancel --signal=TERM "$SLURM_JOB_ID"' USR1
srun --kill-on-bad-exit=1 bash -c 'NODE_RANK=$SLURM_NODEID exec bash "shell/$RECIPE" "$@"' recipe "$@" &
CODE=0
wait $! || CODE=$?
[ -z "$STOPPED" ] || { wait $! || true; exec scontrol requeue "$SLURM_JOB_ID"; } # the trap cut the first wait short
exit $CODE
