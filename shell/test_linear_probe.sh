#!/usr/bin/env bash
# Linear probe: logistic regression (L-BFGS, penalty searched from 1e-6 to 1e6) on image features. Top-1 or mean per class.
#
#   CHECKPOINT=run-folder-or-file DATA_ROOT=dir [DATASETS="cifar10 cifar100 food101 .."] [MODEL=preset-or-json]
#   [LOGS=where results go] bash shell/test_linear_probe.sh [--setting value ..]
#
# DATASETS   benchmarks below DATA_ROOT, training and test split (a missing one is named and passed over), or `imagefolder`
#            (default): DATA_ROOT holds train and test, each with a folder per class
# Features are kept in LOGS/cache: a run that was killed resumes, and the next one starts with them.
set -euo pipefail
source "$(dirname "$0")/needs.sh"
need_file CHECKPOINT "a run folder, weights file or open_clip:NAME:TAG"
need_file DATA_ROOT "the folder of the data sets"
source shell/setup.sh
LOGS=${LOGS:-$([ -d "$CHECKPOINT" ] && echo "${CHECKPOINT%/}" || echo logs)/eval}
python -m rwkv_clip.eval.main linear-probe --checkpoint "${CHECKPOINT%/}" --dataset ${DATASETS:-imagefolder} --data "$DATA_ROOT" \
  ${MODEL:+--model "$MODEL"} --logs "$LOGS" "$@"
