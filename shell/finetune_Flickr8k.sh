#!/usr/bin/env bash
# Four ways to fine-tune one checkpoint on Flickr8k: all weights, adapters (LoRA), the text tower alone (LiT), another picture size.
# Not a published row, but what each costs: seconds, memory, trained parameters, size of a checkpoint, recall. A tiny model that
# this recipe trains first on one half of the training pictures is the checkpoint; minutes on 2 CPU cores.
#
#   FLICKR8K=folder with captions.jsonl ({"image", "captions": [5], "split"}) and images/ [OUTPUT=logs/finetune]
#   bash shell/finetune_Flickr8k.sh [--base-epochs 20 --epochs 8 --repeats 1]
#
# Table and numbers: tests/bench/results/finetune-*.json. The same command resumes after an interruption.
set -euo pipefail
source "$(dirname "$0")/needs.sh"
need_file FLICKR8K "the folder that holds captions.jsonl"
NEEDED=lora
source shell/setup.sh
exec python tests/bench/finetune.py --data "$FLICKR8K/captions.jsonl" --work "${OUTPUT:-logs/finetune}" "$@"
