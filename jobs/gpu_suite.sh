#!/usr/bin/env bash
# Measures this project on a GPU machine that can download nothing. Called in the project's root.
#   jobs/gpu_suite.sh make [FOLDER]           here: downloads the packages that such a machine lacks, some 14 MB, into
#                                             FOLDER (default build/gpu_suite), and prints the command to run there
#   jobs/gpu_suite.sh run FOLDER [OPTIONS]    there: tests/gpu, then `mimscale bench train --suite gpu OPTIONS`; results
#                                             go to $OUT (default FOLDER/results) as they come
# That machine must have torch, torchvision, timm, torchmetrics, safetensors, tensorboard, scikit-learn, einops, rich,
# transformers and pytest with xdist, timeout and hypothesis.
#   PYTHON=python3         with this project installed (make) or those packages (run)
#   TARGET_PYTHON=3.12     Python of that machine
#   SUITE=gpu BUDGET_S=540 TESTS_S=110   suite, seconds for everything, seconds for the tests of them
set -euo pipefail
PYTHON=${PYTHON:-python3} TARGET_PYTHON=${TARGET_PYTHON:-3.12}
SUITE=${SUITE:-gpu} BUDGET_S=${BUDGET_S:-540} TESTS_S=${TESTS_S:-110}
PACKAGES=(hjson msgpack psutil py-cpuinfo pydantic pydantic-core annotated-types typing-inspection webdataset braceexpand
  open-clip-torch ftfy wcwidth simplejpeg shtab torchao mlxtend)
EXPECTED=(torch torchvision timm torchmetrics safetensors tensorboard sklearn einops rich transformers pytest xdist
  pytest_timeout hypothesis) # modules
usage() {
  sed -n '2,13s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" >&2
  exit 2
}

version_of() {
  "$PYTHON" -c 'import importlib.metadata as m, sys; print(m.version(sys.argv[1]))' "$1" 2> /dev/null ||
    { echo "gpu_suite: $PYTHON lacks $1; set PYTHON= to one with this project installed" >&2; exit 2; }
}

make_folder() {
  local folder=$1 name pinned=()
  mkdir -p "$folder"
  rm -f "$folder"/*.whl
  for name in "${PACKAGES[@]}"; do
    pinned+=("$name==$(version_of "$name")")
  done
  # DeepSpeed has no wheel of its own; without compiled operators it is pure Python
  DS_BUILD_OPS=0 "$PYTHON" -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir "$folder" \
    "deepspeed==$(version_of deepspeed)"
  "$PYTHON" -m pip download --quiet --no-deps --only-binary=:all: --dest "$folder" \
    --python-version "$TARGET_PYTHON" --implementation cp \
    --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 "${pinned[@]}"
  echo "$(find "$folder" -name '*.whl' | wc -l) wheels, $(du -sh "$folder" | cut -f1), in $folder. On the GPU machine, in"
  echo "the project's root with that folder in it:"
  echo "  bash jobs/gpu_suite.sh run $folder"
}

check_machine() {
  "$PYTHON" - "$SUITE" "${EXPECTED[@]}" << 'CHECK' || exit 2
import importlib.util, sys
suite, *expected = sys.argv[1:]
missing = [name for name in expected if importlib.util.find_spec(name) is None]
if missing:
    sys.exit(f"gpu_suite: {sys.executable} lacks {', '.join(missing)}; set PYTHON= to one that has them")
import torch
if suite == "gpu" and not torch.cuda.is_available():
    sys.exit(f"gpu_suite: SUITE=gpu needs a GPU and torch {torch.__version__} sees none here; SUITE=tiny is for a CPU")
CHECK
}

run_suite() {
  local folder=$1 site out wheels
  shift
  check_machine
  site=$(mktemp -d) out=${OUT:-$folder/results}
  mkdir -p "$out"
  wheels=$(find "$folder" -maxdepth 1 -name '*.whl')
  if [ -n "$wheels" ]; then
    # shellcheck disable=SC2086 # one word per wheel; names of wheels have no spaces
    "$PYTHON" -m pip install --quiet --no-index --no-deps --target "$site" $wheels
  fi
  export PYTHONPATH=$PWD:$site${PYTHONPATH:+:$PYTHONPATH}
  { nvidia-smi || echo "no NVIDIA driver"; } > "$out/nvidia-smi.txt" 2>&1
  timeout "$TESTS_S" "$PYTHON" -m pytest -n "${WORKERS:-6}" -m gpu tests/gpu 2>&1 | tee "$out/tests.txt" ||
    echo "gpu_suite: the tests ended with an error or were cut after $TESTS_S s; see $out/tests.txt"
  "$PYTHON" -m mimscale bench train --suite "$SUITE" --budget "$((BUDGET_S - SECONDS))" --out "$out/suite.jsonl" "$@" \
    2> >(tee "$out/suite.err" >&2) | tee "$out/suite.md"
  echo "results: $out"
}

case "${1:-}" in
  make) [ $# -le 2 ] || usage; make_folder "${2:-build/gpu_suite}" ;;
  run) [ $# -ge 2 ] || usage; run_suite "${@:2}" ;;
  *) usage ;;
esac
