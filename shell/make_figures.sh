#!/usr/bin/env bash
# Make the pictures of figure/ again, every one of them from what is there:
#   [RUN=demo run folder, the newest logs/demo-rwkv-clip-*] bash shell/make_figures.sh
#
# demo_set.png              drawn by the demo set itself
# demo_training.png, demo_retrieval.png  copied from RUN; left as they are where there is no demo run (shell/train_demo.sh);
# demo_retrieval_chinese.png  from the newest logs/demo-cn-clip-* (shell/finetune_CN_CLIP_B16_MUGE.sh), if there is one
# search.png                the search page over RUN, where Playwright and Chromium are (pip install playwright; apt install chromium)
# flickr8k.png              recalls of logs/flickr8k-* (shell/train_Flickr8k_small.sh), or those in figure/flickr8k.json
# architecture.png, resolution.png, flickr8k_noise.png, alip_weights.png, flickr8k_chinese.png, third_text.png, open_clip_run.png,
# bench.png                 from tests/bench/results
set -euo pipefail
source "$(dirname "$0")/needs.sh"
NEEDED=search source shell/setup.sh
python -m rwkv_clip.demo --output "${DEMO_DATA:-data/demo}" --contact-sheet figure/demo_set.png
RUN=${RUN:-$(ls -d logs/demo-rwkv-clip-*/ 2>/dev/null | tail -n 1 || true)}
if [ -n "$RUN" ]; then
  for what in training retrieval; do cp "$RUN/$what.png" "figure/demo_$what.png"; done
  export PYTHONPATH="tests${PYTHONPATH:+:$PYTHONPATH}" CHECKPOINT=${RUN%/} EXTRAS
  ! python -c "from helpers.browser import missing; raise SystemExit(missing())" || python -m helpers.screenshot \
    --query "purple things in the sky" --output figure/search.png -- --images "$(bash shell/draw_demo.sh)" --checkpoint "$CHECKPOINT"
fi
CHINESE=$(ls -d logs/demo-cn-clip-*/ 2>/dev/null | tail -n 1 || true)
[ -z "$CHINESE" ] || cp "$CHINESE/retrieval.png" figure/demo_retrieval_chinese.png
FLICKR8K_RUNS=()
for results in logs/flickr8k-*/eval; do
  [ ! -d "$results" ] || FLICKR8K_RUNS+=("$(dirname "$results")")
done
python tests/bench/figures.py ${FLICKR8K_RUNS[0]:+--runs "${FLICKR8K_RUNS[@]}"}
python tests/bench/summary.py
