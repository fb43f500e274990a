#!/usr/bin/env bash
# CLIP ViT-B/32 on YFCC15M, the baseline of the tables: InfoNCE on each picture's first text, the raw one (8 GPUs x 512 pairs,
# 32 epochs; settings otherwise as ALIP's). Records hold one text or more.
# Without settings: trains the small demo model on the embedded demo set (3 minutes on 2 CPU cores).
#
#   TRAIN_DATA=prefix-or-glob [OUTPUT=logs/CLIP_B32_YFCC15M] [VAL_DATA=file.jsonl] [NPROC_PER_NODE=gpus here]
#   bash shell/train_CLIP_B32_YFCC15M.sh [--setting value ..]     (launch.sh says the rest: several nodes, restarts)
set -euo pipefail
PRESET=clip-b32-yfcc15m
DEMO=(--model ViT-Ti-8 --text-choice first)
source "$(dirname "$0")/launch.sh"
