#!/usr/bin/env bash
# From scratch on Flickr8k's 4,000 training pictures, tiny towers, CPU: not a published row, but a real-data check of the
# whole way. Expected: text-to-image R@10 on 500 test pictures >= 10 % (chance 2 %); what came out is in shell/README.md.
#
#   FLICKR8K=folder with captions.jsonl ({"image", "captions": [5], "split"}) and images/ [CIFAR10=folder of class folders]
#   [MODEL=RWKV-CLIP-Ti-16 | ViT-Ti-16] [OUTPUT=logs/flickr8k-MODEL] bash shell/train_Flickr8k_small.sh [--setting value ..]
set -euo pipefail
source "$(dirname "$0")/needs.sh"
need_file FLICKR8K "the folder that holds captions.jsonl"
[ -z "${CIFAR10:-}" ] || need_file CIFAR10 "the folder of CIFAR-10's class folders"
source shell/setup.sh
MODEL=${MODEL:-RWKV-CLIP-Ti-16}
OUTPUT=${OUTPUT:-logs/flickr8k-$MODEL}
python data2rec.py "$FLICKR8K/captions.jsonl" data/flickr8k/train --images "$FLICKR8K/images" --where split=train \
  --texts captions.0 captions.1 captions.2 --context 32
time python -m rwkv_clip.training.main --preset flickr8k-small --model "$MODEL" --train-data data/flickr8k/train \
  --val-data "$FLICKR8K/captions.jsonl" --val-split val --logs "$(dirname "$OUTPUT")" --name "$(basename "$OUTPUT")" --resume latest "$@"
CHECKPOINT=$OUTPUT DATA=$FLICKR8K/captions.jsonl SPLIT=test PREFIX= bash shell/test_zero_shot_retrieval.sh
if [ -n "${CIFAR10:-}" ]; then
  CHECKPOINT=$OUTPUT DATA_ROOT=$CIFAR10 DATASETS=cifar10 bash shell/test_zero_shot_classificaiton.sh
fi
