#!/usr/bin/env bash
# The third text for pictures that have a noisy raw text: raw text + caption + tags -> a composer -> OUTPUT/texts.parquet, which
# data2rec.py makes into records with three texts, and OUTPUT/report.html to look at. The same command goes on where it stopped.
# Without settings: 200 pictures of the embedded demo set and the rules composer; no model, no server, no network.
#
#   DATA=rows.jsonl|.csv|.parquet|folder|'shards/{000..331}.tar' [IMAGES=folder]
#   [OUTPUT=logs/describe]   one folder per input and composer (without DATA: logs/describe_demo)
#   [BASE_URL=http://host:8000/v1 MODEL=name]   any OpenAI-compatible server (vllm serve, llama-server, SGLang, ..); else by rules
#   bash shell/describe.sh [--setting value ..]     (--shard 3/16: one of 16 such commands; --executor ray; --help lists all)
set -euo pipefail
source "$(dirname "$0")/needs.sh"
[ -z "${IMAGES:-}" ] || need_file IMAGES "the folder of the pictures"
[ -z "${BASE_URL:-}" ] || need MODEL "the name of the server's model"
NEEDED=describe
source shell/setup.sh
if [ -z "${DATA:-}" ]; then
  OUTPUT=${OUTPUT:-logs/describe_demo}
  DATA=data/describe-demo/rows.jsonl IMAGES=data/describe-demo/images
  [ -e "$DATA" ] || python -m rwkv_clip.describe demo --output data/describe-demo
fi
python -m rwkv_clip.describe run --input "$DATA" --output "${OUTPUT:-logs/describe}" ${IMAGES:+--images "$IMAGES"} \
  ${BASE_URL:+--composer openai --base-url "$BASE_URL" --model "$MODEL"} "$@"
