#!/usr/bin/env bash
# Stable Diffusion 1.5 by torchrun: the same command on every node.
#
#   one node, its GPUs        bash configs/cluster/sd15_torchrun.sh
#   four nodes, on each       NODES=4 HEAD=node0:29500 bash configs/cluster/sd15_torchrun.sh
#
# What is added is passed on:  bash configs/cluster/sd15_torchrun.sh --data.batch_size 4 --trainer.max_steps 2000
set -euo pipefail

NODES="${NODES:-1}"
GPUS="${GPUS:-$(nvidia-smi --list-gpus | wc -l)}"
HEAD="${HEAD:-localhost:0}"
RUN="${RUN:-runs/sd15_cluster}"
CONFIG="${CONFIG:-configs/sd15/adjoint_matching.yaml}"
OVERLAY="${OVERLAY:-configs/cluster/ddp.yaml}"

export OMP_NUM_THREADS="${OMP_NUM_THREADS:-4}"
resume=()
# What was stopped goes on where it was.
if [[ -f "$RUN/checkpoints/last.ckpt" ]]; then resume=(--ckpt_path "$RUN/checkpoints/last.ckpt"); fi

exec torchrun --nnodes "$NODES" --nproc-per-node "$GPUS" --rdzv-backend c10d --rdzv-endpoint "$HEAD" \
    --rdzv-id "${RUN//\//_}" --module lightning_tilt fit \
    --config "$CONFIG" --config "$OVERLAY" \
    --trainer.num_nodes "$NODES" --trainer.devices "$GPUS" --trainer.default_root_dir "$RUN" \
    ${resume[@]+"${resume[@]}"} "$@"
