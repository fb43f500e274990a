#!/usr/bin/env bash
# A page to search pictures with, by text, by picture, or both: http://127.0.0.1:8000. Pictures are encoded once; the same command
# encodes what is new or changed, drops what is gone, and goes on after an interruption.
# Without settings: the newest demo run (a tiny one is trained in minutes where there is none) over the demo set's pictures.
#
#   [IMAGES=folder|.rec|tar|JSONL|..] [FEATURES=folder of an index or of features] [CHECKPOINT=run, weights or open_clip:NAME:TAG]
#   [INDEX=logs/search] [PORT=8000] bash shell/search.sh [--setting value ..]     (python -m rwkv_clip.search serve --help)
set -euo pipefail
source "$(dirname "$0")/needs.sh"
[ -z "${IMAGES:-}" ] || need_file IMAGES "a folder of pictures, .rec, tar or JSONL"
[ -z "${FEATURES:-}" ] || need_file FEATURES "the folder of an index or of features"
[ -z "${CHECKPOINT:-}" ] || need_file CHECKPOINT "a run folder, a weights file or open_clip:NAME:TAG"
NEEDED=search
source shell/setup.sh
if [ -n "${FEATURES:-}" ]; then
  exec python -m rwkv_clip.search serve --features "$FEATURES" ${CHECKPOINT:+--checkpoint "$CHECKPOINT"} --port "${PORT:-8000}" "$@"
fi
newest_demo() { ls -td logs/demo-rwkv-clip-*/ 2>/dev/null | head -n 1; }
if [ -z "${CHECKPOINT:-}" ]; then
  [ -n "$(newest_demo)" ] || bash shell/train_demo.sh
  CHECKPOINT=$(newest_demo) && CHECKPOINT=${CHECKPOINT%/}
fi
INDEX=${INDEX:-logs/search}
[ -n "${IMAGES:-}" ] || { IMAGES=data/demo/images INDEX=logs/search_demo; }
python -m rwkv_clip.search index --images "$IMAGES" --checkpoint "$CHECKPOINT" --output "$INDEX"
exec python -m rwkv_clip.search serve --features "$INDEX" --port "${PORT:-8000}" "$@"
