#!/usr/bin/env bash
# Does the third text help? RWKV towers on Flickr8k with raw texts damaged as those of the web are, terse synthetic captions and
# noisy tags; the rules composer writes the third text. Raw only, raw + synthetic, all three, generated only; three seeds.
#
#   FLICKR8K=folder with captions.jsonl ({"image", "captions": [5], "split"}) and images/ [CIFAR10=folder of class folders]
#   [OUTPUT=logs/third-text] bash shell/compare_third_text_Flickr8k.sh [--epochs 16 --repeats 3 --jobs 2]
#
# Table and numbers: tests/bench/results/third_text-*.json; picture: figure/third_text.png. The same command resumes.
set -euo pipefail
source "$(dirname "$0")/needs.sh"
need_file FLICKR8K "the folder that holds captions.jsonl"
[ -z "${CIFAR10:-}" ] || need_file CIFAR10 "the folder of CIFAR-10's class folders"
NEEDED=describe
source shell/setup.sh
exec python tests/bench/third_text.py --data "$FLICKR8K/captions.jsonl" ${CIFAR10:+--cifar10 "$CIFAR10"} \
  --work "${OUTPUT:-logs/third-text}" "$@"
