#!/usr/bin/env bash
# ALIP ViT-B/32 on YFCC15M (published: R@1 of COCO 46.8 / 29.3, of Flickr30k 70.5 / 48.9, zero-shot mean over eleven sets 41.7;
# 8 GPUs x 512 pairs, 32 epochs). Records hold two texts or more: raw, synthetic; both are compared, gates weight them.
# The loss rises at first: the gates' running means begin at 1, so that all weights begin near 0.
# Without settings: trains the small demo model on the embedded demo set (3 minutes on 2 CPU cores).
#
#   TRAIN_DATA=prefix-or-glob [OUTPUT=logs/ALIP_B32_YFCC15M] [VAL_DATA=file.jsonl] [NPROC_PER_NODE=gpus here]
#   bash shell/train_ALIP_B32_YFCC15M.sh [--setting value ..]     (launch.sh says the rest: several nodes, restarts)
set -euo pipefail
PRESET=alip-b32-yfcc15m
DEMO=(--model ViT-Ti-8 --objective alip --text-choice all --texts 2)
source "$(dirname "$0")/launch.sh"
