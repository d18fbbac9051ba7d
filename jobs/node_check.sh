#!/usr/bin/env bash
# Checks whether this node can train. Run by one task per node; prints "OK NODE name" or "BAD NODE name: why", or
# "UNSHARED NODE name" where the file that the job wrote into RUN_DIR is not seen.
#   MIN_FREE_GB=10  free space that the node-local disk must have     CHECK_ECC=1  refuse uncorrected memory errors
set -u
node=${SLURMD_NODENAME:-$(hostname -s)}
bad() {
  echo "BAD NODE $node: $*"
  exit 0
}

asked=${SLURM_GPUS_ON_NODE:-0}
if [ "$asked" -gt 0 ]; then
  command -v nvidia-smi > /dev/null || bad "no NVIDIA driver (nvidia-smi not found)"
  list=$(timeout 60 nvidia-smi -L 2>&1) || bad "nvidia-smi fails: ${list%%$'\n'*}"
  found=$(grep -c '^GPU [0-9]' <<< "$list")
  [ "$found" -ge "$asked" ] || bad "$found of $asked GPUs answer"
  if [ "${CHECK_ECC:-0}" = 1 ]; then
    errors=$(timeout 60 nvidia-smi --query-gpu=ecc.errors.uncorrected.volatile.total --format=csv,noheader) ||
      bad "nvidia-smi fails to count ECC errors"
    total=$(awk '{n += $1} END {print n + 0}' <<< "$errors") # "[N/A]" counts as 0
    [ "$total" = 0 ] || bad "$total uncorrected ECC errors"
  fi
fi

folder=${LOCAL_DIR:-/tmp}
# shellcheck disable=SC2174 # only the last folder of the path needs this mode
mkdir -p -m 700 "$folder" 2> /dev/null && [ -w "$folder" ] || bad "$folder cannot be written"
free_gb=$(($(df -Pk "$folder" | awk 'NR == 2 {print $4}') / 1048576))
[ "$free_gb" -ge "${MIN_FREE_GB:-10}" ] || bad "$free_gb GB free on $folder, MIN_FREE_GB=${MIN_FREE_GB:-10}"
if [ -n "${SHARED_FILE:-}" ]; then
  for _ in 1 2 3 4 5 6; do # a network file system may show a new file late
    ls "$(dirname "$SHARED_FILE")" > /dev/null 2>&1
    [ ! -e "$SHARED_FILE" ] || break
    sleep 1
  done
  [ -e "$SHARED_FILE" ] || { echo "UNSHARED NODE $node"; exit 0; }
fi
echo "OK NODE $node"
