#!/usr/bin/env bash
# A page to search pictures with, by text, by picture, or both: http://127.0.0.1:8000. Pictures are encoded once; the same command
# encodes what is new or changed, drops what is gone, and goes on after an interruption.
# Without settings: the newest demo run (one is trained in minutes where there is none) over the demo set's held-out scenes.
#
#   [IMAGES=folder|.rec|tar|JSONL|..] [CHECKPOINT=run, weights or open_clip:NAME:TAG] [FEATURES=folder of an index or of features]
#   [PORT=8000] bash shell/search.sh [--setting value ..]     (python -m rwkv_clip.search serve --help lists them)
set -euo pipefail
source "$(dirname "$0")/needs.sh"
[ -z "${IMAGES:-}" ] || need_file IMAGES "a folder of pictures, .rec, tar or JSONL"
[ -z "${FEATURES:-}" ] || need_file FEATURES "the folder of an index or of features"
[ -z "${CHECKPOINT:-}" ] || need_file CHECKPOINT "a run folder, a weights file or open_clip:NAME:TAG"
NEEDED=search
source shell/setup.sh
if [ -n "${FEATURES:-}" ]; then
  WHAT=(--features "$FEATURES")
else
  [ -n "${CHECKPOINT:-$(newest_demo)}" ] || bash shell/train_demo.sh
  CHECKPOINT=${CHECKPOINT:-$(newest_demo)}
  WHAT=(--images "${IMAGES:-$(EXTRAS=${EXTRAS-search} CHECKPOINT=${CHECKPOINT%/} bash shell/draw_demo.sh)}")
fi
exec python -m rwkv_clip.search serve "${WHAT[@]}" ${CHECKPOINT:+--checkpoint "${CHECKPOINT%/}"} --port "${PORT:-8000}" "$@"
