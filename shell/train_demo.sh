#!/usr/bin/env bash
# The whole way in three minutes on 2 CPU cores: make the demo set, train a tiny RWKV-CLIP on it, evaluate it twice.
# Needs no settings and no download. [DEMO_LANGUAGE=en|zh] [DEMO_DATA=data/demo] [OUTPUT=logs/demo-rwkv-clip-TIME] bash shell/train_demo.sh [--setting value ..]
set -euo pipefail
source "$(dirname "$0")/setup.sh"
LANGUAGE=${DEMO_LANGUAGE:-en}
export DEMO_DATA=${DEMO_DATA:-data/demo${DEMO_LANGUAGE:+-$DEMO_LANGUAGE}}
OUTPUT=${OUTPUT:-logs/demo-rwkv-clip-$(date +%Y%m%d-%H%M%S)}
python -m rwkv_clip.demo --output "$DEMO_DATA" --language "$LANGUAGE"
python -m rwkv_clip.training.main --preset demo --train-data "$DEMO_DATA/train" --val-data "$DEMO_DATA/retrieval.jsonl" \
  --logs "$(dirname "$OUTPUT")" --name "$(basename "$OUTPUT")" --resume latest "$@"
export CHECKPOINT=$OUTPUT
bash shell/test_zero_shot_retrieval.sh
cp "$(ls "$OUTPUT"/eval/*retrieval*/retrieval.png | tail -n 1)" "$OUTPUT"/
bash shell/test_zero_shot_classificaiton.sh
cat <<END

Run folder: $OUTPUT
  training.png   loss, learning rate, logit scale and retrieval while training
  retrieval.png  held-out descriptions with the five pictures that the model finds for each
To train the real thing: make shards of your images and captions with data2rec.py, then
  TRAIN_DATA=path/to/shards bash shell/train_RWKV_CLIP_B32_YFCC15M.sh    # or train_ALIP_.., train_CLIP_..
END
