#!/usr/bin/env bash
# RWKV-CLIP B/32 on YFCC15M (published: COCO R@1 50.3 / 34.0, zero-shot mean over eleven sets 44.4; 8 GPUs x 512 pairs, 32 epochs).
# Records hold three texts: raw, synthetic, generated. One of them is drawn for each picture and step.
# Without settings: trains the small demo model on the embedded demo set (3 minutes on 2 CPU cores).
#
#   TRAIN_DATA=prefix-or-glob [OUTPUT=logs/RWKV_CLIP_B32_YFCC15M] [VAL_DATA=file.jsonl] [NPROC_PER_NODE=gpus here]
#   bash shell/train_RWKV_CLIP_B32_YFCC15M.sh [--setting value ..]     (launch.sh says the rest: several nodes, restarts)
set -euo pipefail
PRESET=rwkv-clip-b32-yfcc15m
DEMO=(--model RWKV-CLIP-Ti-8)
source "$(dirname "$0")/launch.sh"
