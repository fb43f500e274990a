#!/usr/bin/env bash
# ViT and RWKV towers with BERT, and RWKV towers alone, on Flickr8k's Chinese sentences, and a fine-tuning on texts that repeat, with
# and without --positives mask: not a published row, but the whole way of Chinese-CLIP on real images. Three seeds each, 15 runs.
#
#   FLICKR8K=folder with captions.jsonl ({"image", "captions_zh": [5], "split"}) and images/ [OUTPUT=logs/chinese]
#   bash shell/compare_Chinese_Flickr8k.sh [--epochs 3 --repeats 3 --jobs 2]
#
# Table and numbers: tests/bench/results/chinese-*.json; picture: figure/flickr8k_chinese.png. The same command resumes after an
# interruption.
set -euo pipefail
source "$(dirname "$0")/needs.sh"
need_file FLICKR8K "the folder that holds captions.jsonl"
NEEDED=chinese source shell/setup.sh
exec python tests/bench/chinese.py --data "$FLICKR8K/captions.jsonl" --work "${OUTPUT:-logs/chinese}" "$@"
