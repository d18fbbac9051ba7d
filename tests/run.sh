#!/usr/bin/env bash
# Sets up an environment and runs every test that needs no GPU.   bash tests/run.sh [--fast|--floor] [pytest arguments]
#   --fast   only the tests that start no processes (under three minutes)
#   --floor  a second environment with the oldest versions that setup.cfg admits, and the fast tests in it
# Three files are tested at a time; `-n 0` makes it one, for --pdb.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

SELECT='not gpu'
case "${1:-}" in
  --fast) SELECT='not gpu and not multi and not slurm and not slow'; shift ;;
  --floor) VENV=.venv-floor CONSTRAINTS=tests/floor.txt SELECT='not gpu and not multi and not slurm and not slow'; shift ;;
esac
install_slurm() {
  local missing='' policy=/usr/sbin/policy-rc.d pair
  for pair in slurmctld:slurmctld slurmd:slurmd sbatch:slurm-client munged:munge shellcheck:shellcheck; do
    command -v "${pair%:*}" > /dev/null || missing="$missing ${pair#*:}"
  done
  if [ -z "$missing" ] || [[ $SELECT == *'not slurm'* ]]; then
    echo "setup: nothing to install for the tests of jobs/"
  elif [ "$(id -u)" = 0 ] && command -v apt-get > /dev/null; then
    echo "setup: installing$missing for the tests of jobs/"
    # the tests start the daemons themselves, in a folder of their own; keep the packages from starting them system-wide
    if [ -e $policy ]; then policy=''; else printf '#!/bin/sh\nexit 101\n' > $policy; chmod +x $policy; fi
    apt-get update -qq > /dev/null
    # shellcheck disable=SC2086
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $missing > /dev/null 2>&1
    [ -z "$policy" ] || rm $policy
  else
    echo "setup:$missing missing and not installable without root and apt; the tests that need them will be skipped"
  fi
}
install_browser() {
  if { command -v chromium && command -v chromedriver; } > /dev/null || [[ $SELECT == *'not slow'* ]]; then
    echo "setup: nothing to install for the test of the report's page"
  elif [ "$(id -u)" = 0 ] && command -v apt-get > /dev/null; then
    echo "setup: installing chromium and chromium-driver for the test of the report's page"
    apt-get update -qq > /dev/null
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium chromium-driver > /dev/null 2>&1
  else
    echo "setup: chromium and chromium-driver missing and not installable without root and apt; their test will be skipped"
  fi
}
{ install_slurm; install_browser; } & # beside the packages from pip; one after the other, because apt has a lock
source jobs/setup.sh
wait $!

if [ -z "$CONSTRAINTS" ]; then
  echo "lint: ruff"; ruff check . ; ruff format --check .
  echo "types: mypy"; mypy
fi
export OMP_NUM_THREADS=1
exec python -m pytest -n 3 --dist loadfile --no-loadscope-reorder -m "$SELECT" "$@"
