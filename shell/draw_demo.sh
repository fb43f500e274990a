#!/usr/bin/env bash
# Draw 1,000 held-out scenes of the demo set that a run was trained on, at 224 pixels, for people (models see them at their own size),
# and print the name of their retrieval set. search.sh and make_figures.sh show these.
#
#   CHECKPOINT=demo run bash shell/draw_demo.sh
set -euo pipefail
source "$(dirname "$0")/needs.sh"
need_file CHECKPOINT "a demo run (shell/train_demo.sh makes one)"
source shell/setup.sh >&2
DRAWN=$(demo_data)-224
LANGUAGE_OF_SET=$(sed -n 's|^ *"language": "\(.*\)",*$|\1|p' "$(demo_data)/demo.json" 2>/dev/null || true)
python -m rwkv_clip.demo --output "$DRAWN" --size 224 --test 1000 --train 1 --per-class 1 --language "${LANGUAGE_OF_SET:-en}" >&2
echo "$DRAWN/retrieval.jsonl"
