#!/usr/bin/env bash
# Zero-shot retrieval, image to text and text to image. Without settings: the newest demo run on the demo set.
#
#   CHECKPOINT=run-folder-or-file DATA=captions.json [SPLIT=test] [IMAGE_ROOT=dir] [PREFIX="a photo of "]
#   [MODEL=preset-or-json] [LOGS=where results go] [NPROC_PER_NODE=1] bash shell/test_zero_shot_retrieval.sh [--setting value ..]
#
# DATA        JSON list, JSONL, Karpathy JSON (COCO, Flickr30k), .rec shards, or Chinese-CLIP's X_texts.jsonl or LMDB folder of a split
# PREFIX      before every caption; "a photo of " in the published tables (default), none on the demo set and on Chinese-CLIP's data
# CHECKPOINT  run folder, checkpoint folder, .safetensors, released .pt (with MODEL), or open_clip:NAME:TAG
set -euo pipefail
source "$(dirname "$0")/needs.sh"
if [ -z "${DATA:-}" ]; then
  CHECKPOINT=${CHECKPOINT:-$(newest_demo)}
  [ -n "$CHECKPOINT" ] || { echo "error: no demo run yet; run shell/train_demo.sh, or set CHECKPOINT and DATA" >&2; exit 2; }
  DATA=$(demo_data)/retrieval.jsonl PREFIX=${PREFIX-}
fi
if [[ "$DATA" == *_texts.jsonl ]] || [ -d "$DATA/pairs" ]; then PREFIX=${PREFIX-}; fi
need_file CHECKPOINT "a run folder, weights file or open_clip:NAME:TAG"
need_records DATA "a JSON, JSONL or Karpathy file, or records"
source shell/setup.sh
LOGS=${LOGS:-$([ -d "$CHECKPOINT" ] && echo "${CHECKPOINT%/}" || echo logs)/eval}
LAUNCH=(python -m rwkv_clip.eval.main)
[ "${NPROC_PER_NODE:-1}" = 1 ] || LAUNCH=(torchrun --standalone --nproc_per_node "$NPROC_PER_NODE" -m rwkv_clip.eval.main --)
"${LAUNCH[@]}" retrieval --checkpoint "${CHECKPOINT%/}" --data "$DATA" ${SPLIT:+--split "$SPLIT"} \
  ${IMAGE_ROOT:+--image-root "$IMAGE_ROOT"} --prefix "${PREFIX-a photo of }" ${MODEL:+--model "$MODEL"} --logs "$LOGS" "$@"
