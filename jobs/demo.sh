#!/usr/bin/env bash
# Shards, teacher, students and evaluation on real digits, without a GPU and without a data download.
#   bash jobs/demo.sh [--all] [--seeds 3] [--out DIR]
# --all trains more students (MFF, AMT, ConvMAE, MR-MAE); --set mae:schedule.epochs=160 changes a recipe.
# DEMO_DEVICE=cuda runs it on GPUs. A second call continues where the first one stopped.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

source jobs/setup.sh
exec python jobs/demo.py "$@"
