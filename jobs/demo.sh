#!/usr/bin/env bash
# The whole path on real digits, without a GPU and without a data download.   bash jobs/demo.sh [--seeds 3] [--out DIR]
# DEMO_DEVICE=cuda runs it on GPUs. A second call goes on where the first one stopped.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

source jobs/setup.sh
exec python jobs/demo.py "$@"
