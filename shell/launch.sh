# Sourced by the recipes train_*.sh and finetune_*.sh, which set PRESET and the settings of their demo, DEMO=(..).
#
#   TRAIN_DATA=prefix-or-glob [OUTPUT=logs/name] [VAL_DATA=file.jsonl] [NPROC_PER_NODE=gpus here] [NNODES=1] [NODE_RANK=0]
#   [MASTER_ADDR=127.0.0.1] [MASTER_PORT=29500] [MAX_RESTARTS=0] [EXTRAS=..] bash shell/train_NAME.sh [--setting value ..]
#
# TRAIN_DATA  .rec shards made by data2rec.py (or released ones): prefix, folder or glob. Without it: the demo
# OUTPUT      run folder, logs/NAME by default; the same command continues where the run stopped. Several nodes: the same command on
#             each, but for NODE_RANK, and OUTPUT on storage that all share. MAX_RESTARTS: how often torchrun starts failed ranks again
# CHECKPOINT  of finetune_*.sh, which set WARM: the weights to start from, such as clip_cn_vit-b-16.pt
# Arguments override the recipe, e.g. `--batch-size 256 --precision fp16`; all: `python -m rwkv_clip.training.main --help`.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/needs.sh"
[ -z "${TRAIN_DATA:-}" ] || need_records TRAIN_DATA "records made by data2rec.py: prefix, folder or glob; or an LMDB folder of Chinese-CLIP's"
[ -z "${VAL_DATA:-}" ] || need_records VAL_DATA "a retrieval set: JSON, JSONL or Karpathy file, or records"
[ -z "${TRAIN_DATA:-}" ] || [ -z "${WARM:-}" ] || need_file CHECKPOINT "the weights to start from, such as clip_cn_vit-b-16.pt"
source shell/setup.sh
if [ -z "${TRAIN_DATA:-}" ]; then
  echo "TRAIN_DATA is not set: training the demo model on the embedded demo set. The header of $0 says how to train the real one."
  export OUTPUT=${OUTPUT:-logs/demo-${PRESET%-b[0-9]*-*}-$(date +%Y%m%d-%H%M%S)}
  exec bash shell/train_demo.sh "${DEMO[@]}" "$@"
fi
NAME=$(basename "$0" .sh)
OUTPUT=${OUTPUT:-logs/${NAME#*_}}
GPUS=$( (nvidia-smi --list-gpus 2>/dev/null || true) | wc -l)
exec torchrun --max-restarts "${MAX_RESTARTS:-0}" --nproc_per_node "${NPROC_PER_NODE:-$((GPUS > 0 ? GPUS : 1))}" --nnodes "${NNODES:-1}" --node_rank "${NODE_RANK:-0}" \
  --master_addr "${MASTER_ADDR:-127.0.0.1}" --master_port "${MASTER_PORT:-29500}" -m rwkv_clip.training.main \
  -- --preset "$PRESET" --train-data "$TRAIN_DATA" ${VAL_DATA:+--val-data "$VAL_DATA"} ${WARM:+--pretrained "$CHECKPOINT"} \
  --logs "$(dirname "$OUTPUT")" --name "$(basename "$OUTPUT")" --resume latest "$@"
