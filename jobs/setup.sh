# Makes the virtual environment $VENV (default .venv) and installs this project into it, with the extras demo and test.
# Sourced by jobs/demo.sh and tests/run.sh in the project's root. Does nothing if setup.cfg has not changed since then.
# CONSTRAINTS may name a pip constraints file.
# shellcheck shell=bash
VENV=${VENV:-.venv} CONSTRAINTS=${CONSTRAINTS:-}
PYTHON=${PYTHON:-python3}
"$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "setup: $PYTHON is older than 3.10; set PYTHON=" >&2; exit 2; }
wanted="$(cat setup.cfg pyproject.toml ${CONSTRAINTS:+"$CONSTRAINTS"} | cksum)"
if [ "$(cat "$VENV/.mimscale-setup" 2> /dev/null)" = "$wanted" ]; then
  echo "setup: $VENV is up to date"
else
  echo "setup: installing into $VENV (the first time this downloads about 5 GB and takes some minutes)"
  [ -x "$VENV/bin/python" ] || "$PYTHON" -m venv "$VENV"
  "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check --editable '.[demo,test]' ${CONSTRAINTS:+--constraint "$CONSTRAINTS"}
  printf '%s' "$wanted" > "$VENV/.mimscale-setup"
fi
PATH=$PWD/$VENV/bin:$PATH
