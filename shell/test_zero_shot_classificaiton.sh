#!/usr/bin/env bash
# Zero-shot classification: top-1, top-5, mean per class. Without settings: the newest demo run on the demo's two class sets.
#
#   CHECKPOINT=run-folder-or-file DATA_ROOT=dir [DATASETS="cifar10 cifar100 food101 .."] [MODEL=preset-or-json]
#   [NPROC_PER_NODE=1] [LOGS=where results go] bash shell/test_zero_shot_classificaiton.sh [--setting value ..]
#
# DATASETS   benchmarks below DATA_ROOT (`all`: the eleven; a missing one is named and passed over), or `imagefolder`
#            (default): a folder per class, and names.json with names and templates if you like
# NPROC_PER_NODE  ranks that share the work, one a GPU. (The file's spelling is the released one: scripts depend on it.)
set -euo pipefail
source "$(dirname "$0")/needs.sh"
SETS=("${DATA_ROOT:-}")
if [ -z "${DATA_ROOT:-}" ]; then
  CHECKPOINT=${CHECKPOINT:-$(newest_demo)}
  [ -n "$CHECKPOINT" ] || { echo "error: no demo run yet; run shell/train_demo.sh, or set CHECKPOINT and DATA_ROOT" >&2; exit 2; }
  SETS=("$(demo_data)"/classification/*)
fi
need_file CHECKPOINT "a run folder, weights file or open_clip:NAME:TAG"
[ -z "${DATA_ROOT:-}" ] || need_file DATA_ROOT "the folder of the data sets"
source shell/setup.sh
LOGS=${LOGS:-$([ -d "$CHECKPOINT" ] && echo "${CHECKPOINT%/}" || echo logs)/eval}
LAUNCH=(python -m rwkv_clip.eval.main)
[ "${NPROC_PER_NODE:-1}" = 1 ] || LAUNCH=(torchrun --standalone --nproc_per_node "$NPROC_PER_NODE" -m rwkv_clip.eval.main --)
for set in "${SETS[@]}"; do
  "${LAUNCH[@]}" classification --checkpoint "${CHECKPOINT%/}" --dataset ${DATASETS:-imagefolder} --data "$set" \
    ${MODEL:+--model "$MODEL"} --logs "$LOGS" "$@"
done
