# Makes the virtual environment and installs this project into it. Sourced by jobs/demo.sh and tests/run.sh, which
# set VENV and EXTRAS. Does nothing when setup.cfg has not changed since the last time.
# shellcheck shell=bash
: "${VENV:?}" "${EXTRAS:?}"
PYTHON=${PYTHON:-python3}
"$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "setup: $PYTHON is older than 3.10; set PYTHON=" >&2; exit 2; }
wanted="$EXTRAS $(cksum < setup.cfg) $(cksum < pyproject.toml)"
if [ "$(cat "$VENV/.mimscale-setup" 2>/dev/null)" = "$wanted" ]; then
  echo "setup: $VENV is up to date"
else
  echo "setup: installing into $VENV (the first time this fetches about 5 GB and takes some minutes)"
  [ -x "$VENV/bin/python" ] || "$PYTHON" -m venv "$VENV"
  "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check --editable ".[$EXTRAS]" ${CONSTRAINTS:+--constraint "$CONSTRAINTS"}
  printf '%s' "$wanted" > "$VENV/.mimscale-setup"
fi
