#!/usr/bin/env bash
# Sets up an environment and runs every test that needs no GPU.   bash tests/run.sh [--fast|--floor] [pytest arguments]
#   --fast   only the tests that start no processes (under three minutes)
#   --floor  a second environment with the oldest versions that setup.cfg admits, and the fast tests in it
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

VENV=.venv EXTRAS=test,demo CONSTRAINTS='' SELECT='not gpu'
case "${1:-}" in
  --fast) SELECT='not gpu and not multi and not slurm and not slow'; shift ;;
  --floor) VENV=.venv-floor CONSTRAINTS=tests/floor.txt SELECT='not gpu and not multi and not slurm and not slow'; shift ;;
esac
source jobs/setup.sh
PATH=$PWD/$VENV/bin:$PATH

case "$SELECT" in *'not slurm'*) ;; *)
  if command -v slurmctld > /dev/null && command -v munged > /dev/null; then
    echo "setup: SLURM is installed"
  elif [ "$(id -u)" = 0 ] && command -v apt-get > /dev/null; then
    echo "setup: installing SLURM's daemons for the tests of jobs/"
    apt-get update -qq > /dev/null
    # the daemons are started by the tests, in a folder of their own; keep the packages from starting them system-wide
    [ -e /usr/sbin/policy-rc.d ] || { printf '#!/bin/sh\nexit 101\n' > /usr/sbin/policy-rc.d; chmod +x /usr/sbin/policy-rc.d; made_policy=1; }
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends slurmctld slurmd slurm-client munge > /dev/null
    [ -z "${made_policy:-}" ] || rm /usr/sbin/policy-rc.d
  else
    echo "setup: SLURM's daemons are missing and cannot be installed without root and apt; its tests will be skipped"
  fi
esac

if [ -z "$CONSTRAINTS" ]; then
  echo "lint: ruff"; ruff check . ; ruff format --check .
  echo "types: mypy"; mypy
fi
export OMP_NUM_THREADS=1
exec python -m pytest -m "$SELECT" "$@"
