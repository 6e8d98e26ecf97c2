#!/usr/bin/env bash
# Stable Diffusion 3 under SLURM:  sbatch configs/cluster/sd3_slurm.sh
#
# SLURM starts one task a GPU; Lightning reads ranks and addresses from SLURM's variables, so there is no torchrun here,
# and trainer.num_nodes and trainer.devices are what was asked for. What is added is passed on:
#   sbatch --nodes 8 configs/cluster/sd3_slurm.sh --sampler.samples_per_condition 8
#SBATCH --job-name=sd3-tilt
#SBATCH --nodes=2
#SBATCH --gpus-per-node=8
#SBATCH --ntasks-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --signal=B:TERM@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%x-%j.out
set -euo pipefail

RUN="${RUN:-runs/sd3_cluster}"
CONFIG="${CONFIG:-configs/sd3/adjoint_matching.yaml}"
OVERLAY="${OVERLAY:-configs/cluster/fsdp2_sd3.yaml}"

export OMP_NUM_THREADS="${SLURM_CPUS_PER_TASK:-8}"
resume=()
# A job that was pre-empted, or ran out of time, goes on where it was.
if [[ -f "$RUN/checkpoints/last.ckpt" ]]; then resume=(--ckpt_path "$RUN/checkpoints/last.ckpt"); fi

# Five minutes before the time is up, SLURM sends TERM to this script: hand it on, let the run save, queue again.
again() {
    kill -TERM "$step"
    wait "$step" || true
    scontrol requeue "$SLURM_JOB_ID"
    exit 0
}
trap again TERM

srun --kill-on-bad-exit=1 lightning-tilt fit \
    --config "$CONFIG" --config "$OVERLAY" --config configs/cluster/slurm.yaml \
    --trainer.num_nodes "$SLURM_JOB_NUM_NODES" --trainer.devices "$SLURM_NTASKS_PER_NODE" \
    --trainer.default_root_dir "$RUN" \
    ${resume[@]+"${resume[@]}"} "$@" &
step=$!
wait "$step"
