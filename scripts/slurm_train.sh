#!/bin/sh
#SBATCH --job-name=side4video
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#
# sbatch [--nodes=2 ...] scripts/slurm_train.sh CONFIG --output DIR [key=value ...]
#
# Trains on all GPUs of all nodes of the job, from the root of the repository. Five minutes before the time is over, or
# when the job is pre-empted, the run is saved and the job queued again; it goes on with resume=auto. --output is needed,
# because the job that goes on must find the folder.
set -eu
case " $* " in *" --output"*) ;; *) echo "error: scripts/slurm_train.sh needs --output DIR" >&2; exit 2 ;; esac

MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_PORT=$((20000 + SLURM_JOB_ID % 10000))
NNODES=$SLURM_JOB_NUM_NODES
export MASTER_ADDR MASTER_PORT NNODES

requeue() {
    kill -TERM "$step" 2>/dev/null || :
    wait "$step" || :
    scontrol requeue "$SLURM_JOB_ID"
    exit 0
}
trap requeue USR1 TERM

# shellcheck disable=SC2016 # NODE_RANK is known in the step only
srun --kill-on-bad-exit=1 sh -c 'NODE_RANK=$SLURM_NODEID exec sh scripts/run_train_vision.sh "$@"' sh "$@" resume=auto &
step=$!
status=0
wait "$step" || status=$?
exit "$status"
