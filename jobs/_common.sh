# shellcheck shell=bash
# Sourced by every job: the environment of the ranks, checks of nodes and geometry, and the command that starts the ranks.
# Settings come from jobs/site.env (see site.env.example) and from the environment at submission.
set -euo pipefail

JOBS=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
ROOT=$(dirname "$JOBS")

die() { # EXIT_CODE MESSAGE...; 2 = bad input, 3 = bad nodes
  local code=$1
  shift
  echo "${SLURM_JOB_NAME:-jobs}: $*" >&2
  exit "$code"
}

read_site() {
  local file=${SITE_ENV:-$JOBS/site.env}
  if [ -f "$file" ]; then
    set -a +eu # export all variables to the ranks; "module" fails under -u
    # shellcheck source=/dev/null
    source "$file"
    set +a -eu
  elif [ -n "${SITE_ENV:-}" ]; then
    die 2 "SITE_ENV='$SITE_ENV': no such file; copy jobs/site.env.example there"
  fi
}

# ---------------------------------------------------------------------------------------------- once per job

setup_job() { # set the environment of the ranks
  local head packages key
  : "${SLURM_JOB_ID:?is not set: start this file with sbatch}"
  unset SHARED_FILE # that of jobs/submit, which all its jobs would share
  [ -z "${MIMSCALE_STAGE_FILE:-}" ] || begin_stage
  early_stop=''
  trap 'early_stop=1' USR1 # a signal before the ranks run must not kill this shell
  # after `sbatch --export=NONE` or a list, every srun would drop what is exported here
  export SLURM_EXPORT_ENV=ALL
  # `--gres` on the command line replaces what the header allocates, but not the variable that srun reads
  if [ -n "${SLURM_GPUS_ON_NODE:-}" ] && [ -n "${SLURM_GPUS_PER_NODE:-}" ]; then
    export SLURM_GPUS_PER_NODE=$SLURM_GPUS_ON_NODE
  fi
  read_site
  set +eu
  eval "${SITE_SETUP:-}"
  set -eu

  head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)
  if ! getent hosts "$head" > /dev/null; then
    head=$(scontrol show node "$head" | sed -n 's/.*NodeAddr=\([^ ]*\).*/\1/p')
  fi
  MASTER_ADDR=$head
  # below the ephemeral ports; differs between jobs that share a head node, and between restarts of a job
  MASTER_PORT=$((10000 + (SLURM_JOB_ID * 31 + ${SLURM_RESTART_COUNT:-0}) % 20000))

  # Compiler caches are on the node-local disk: thousands of ranks that write to one shared home block each other.
  LOCAL_DIR=${SITE_LOCAL_DIR:-/tmp}/mimscale-$(id -un)
  CACHE_DIR=$LOCAL_DIR/cache-$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}
  export MASTER_ADDR MASTER_PORT LOCAL_DIR CACHE_DIR
  export TORCH_EXTENSIONS_DIR=$CACHE_DIR/torch_extensions TRITON_CACHE_DIR=$CACHE_DIR/triton
  export TORCHINDUCTOR_CACHE_DIR=$CACHE_DIR/inductor
  # flight recorder: before NCCL's watchdog ends a rank, it dumps the last collectives; older releases of torch have
  # TORCH_NCCL_TRACE_BUFFER_SIZE, about which newer ones warn
  export TORCH_FR_BUFFER_SIZE=${TORCH_FR_BUFFER_SIZE:-2000} TORCH_NCCL_DUMP_ON_TIMEOUT=1
  export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} PYTHONFAULTHANDLER=1 PYTHONUNBUFFERED=1 NCCL_DEBUG=${NCCL_DEBUG:-WARN}

  ENV_DIR=''
  if [ -n "${SITE_ENV_TARBALL:-}" ]; then
    packages=$(stat -L -c '%n %s %Y' "$SITE_ENV_TARBALL") || die 2 "SITE_ENV_TARBALL='$SITE_ENV_TARBALL' cannot be read"
    key=$(cksum <<< "$packages")
    ENV_DIR=$LOCAL_DIR/env-${key%% *}
    MIMSCALE_PYTHON=$ENV_DIR/bin/python
    export PATH=$ENV_DIR/bin:$PATH
  elif [ -n "${SITE_CONTAINER:-}" ]; then
    MIMSCALE_PYTHON=${MIMSCALE_PYTHON:-python}
  else
    [ -n "${MIMSCALE_PYTHON:-}" ] || MIMSCALE_PYTHON=$ROOT/.venv/bin/python
    command -v "$MIMSCALE_PYTHON" > /dev/null ||
      die 2 "MIMSCALE_PYTHON='$MIMSCALE_PYTHON' does not exist; set it in jobs/site.env"
  fi
  export ENV_DIR MIMSCALE_PYTHON PYTHONPATH=$ROOT${PYTHONPATH:+:$PYTHONPATH}
}

begin_stage() { # for jobs/submit: leave in MIMSCALE_STAGE_FILE what became of this job, which results.sbatch reads
  STAGE_FILE=${MIMSCALE_STAGE_FILE%.txt}${SLURM_ARRAY_TASK_COUNT:+-$SLURM_ARRAY_TASK_ID}.txt
  unset MIMSCALE_STAGE_FILE
  echo "running" > "$STAGE_FILE" || die 2 "$STAGE_FILE cannot be written; set RUN_DIR to a folder that all nodes share"
  trap 'end_stage $?' EXIT
  trap 'exit 143' TERM # ended by the signal itself, the shell would see exit code 0 in its EXIT trap
}

end_stage() { # EXIT_CODE
  if [ "$1" = 0 ]; then echo "done"; else echo "failed, exit code $1"; fi > "$STAGE_FILE" || true
}

set_run_dir() { # RECIPE SUFFIX: default of RUN_DIR; makes the folder
  RUN_DIR=$(realpath -m "${RUN_DIR:-${SITE_RUN_ROOT:-$ROOT/runs}/$(basename "$1" .yaml)-$2}")
  mkdir -p "$RUN_DIR/job" || die 2 "RUN_DIR='$RUN_DIR' cannot be made; set RUN_DIR or SITE_RUN_ROOT"
  SHARED_FILE=$RUN_DIR/job/shared-${SLURM_JOB_ID:-0}
  export RUN_DIR SHARED_FILE
}

check_geometry() { # one rank drives one GPU
  local per_node=${SLURM_NTASKS_PER_NODE:-0} gpus=${SLURM_GPUS_ON_NODE:-}
  [ "$SLURM_NTASKS" = $((per_node * SLURM_NNODES)) ] ||
    die 2 "$SLURM_NTASKS tasks are not $SLURM_NNODES nodes x $per_node; give --nodes and --ntasks-per-node, not --ntasks"
  [ -z "$gpus" ] || [ "$gpus" = "$per_node" ] ||
    die 2 "--ntasks-per-node=$per_node, but $gpus GPUs per node: one rank drives one GPU, so make the two equal"
}

# ---------------------------------------------------------------------------------------------- once per node

on_each_node() { # LIMIT_S COMMAND...: one task per node, with a time limit in case a node hangs
  local limit_s=$1
  shift
  timeout "$limit_s" srun --nodes="$SLURM_NNODES" --ntasks="$SLURM_NNODES" --ntasks-per-node=1 --kill-on-bad-exit=0 "$@"
}

exit_if_bad_nodes() { # TEXT that may have lines "BAD NODE name: why"
  local bad names
  bad=$(grep '^BAD NODE ' <<< "$1") || return 0
  names=$(sed 's/^BAD NODE \([^:]*\):.*/\1/' <<< "$bad" | sort -u | paste -sd, -)
  echo "$bad"
  die 3 "submit again with: sbatch --exclude=$names ... (or, for jobs/submit, SITE_EXCLUDE=$names in jobs/site.env)"
}

check_nodes() {
  local text node status=0
  [ "${NODE_CHECK:-1}" = 1 ] || return 0
  if [ -n "${SHARED_FILE:-}" ]; then # every node has to see it
    : > "$SHARED_FILE" || die 2 "RUN_DIR='$RUN_DIR' cannot be written; set RUN_DIR or SITE_RUN_ROOT"
  fi
  text=$(on_each_node 300 bash "$JOBS/node_check.sh" 2>&1) || status=$?
  if ! grep -q -E '^(OK|BAD|UNSHARED) NODE ' <<< "$text"; then # no node answered: the nodes are not the likely cause
    [ -z "$text" ] || echo "$text"
    die 1 "the node check did not run on any node (srun ended with $status); see its message above, or set NODE_CHECK=0"
  fi
  for node in $(scontrol show hostnames "$SLURM_JOB_NODELIST"); do
    grep -q -E "^(OK|BAD|UNSHARED) NODE $node(:|\$)" <<< "$text" || text+=$'\n'"BAD NODE $node: did not answer"
  done
  grep -v -E '^(OK|BAD|UNSHARED) NODE ' <<< "$text" || true
  exit_if_bad_nodes "$text"
  node=$(sed -n 's/^UNSHARED NODE //p' <<< "$text" | paste -sd, -)
  [ -z "$node" ] || die 2 "RUN_DIR='$RUN_DIR' is another folder on $node; set it to one on a file system that all nodes share"
  rm -f "${SHARED_FILE:-}"
}

prepare_nodes() { # make node-local folders; unpack SITE_ENV_TARBALL, if set, once per node
  # shellcheck disable=SC2016  # expanded on the node
  on_each_node 3600 bash -c '
    set -eu
    mkdir -p -m 700 "$LOCAL_DIR"
    find "$LOCAL_DIR" -maxdepth 1 -name "cache-*" -mtime +7 -exec rm -rf {} +
    mkdir -p "$TORCH_EXTENSIONS_DIR" "$TRITON_CACHE_DIR" "$TORCHINDUCTOR_CACHE_DIR"
    [ -n "$ENV_DIR" ] || exit 0
    exec 9> "$ENV_DIR.lock"
    flock 9 # another job may be unpacking it on this node; the lock is released when its holder ends
    [ ! -e "$ENV_DIR/COMPLETE" ] || exit 0
    echo "${SLURMD_NODENAME:-$(hostname -s)}: unpacking $SITE_ENV_TARBALL"
    rm -rf "$ENV_DIR"
    mkdir "$ENV_DIR"
    tar -xf "$SITE_ENV_TARBALL" -C "$ENV_DIR"
    [ -x "$ENV_DIR/bin/python" ] || { echo "SITE_ENV_TARBALL=$SITE_ENV_TARBALL has no bin/python at its top level; pack it with conda-pack or venv-pack" >&2; exit 2; }
    [ ! -x "$ENV_DIR/bin/conda-unpack" ] || "$ENV_DIR/bin/conda-unpack"
    touch "$ENV_DIR/COMPLETE"' || die $? "a node could not be prepared"
}

check_communication() { # with COMM_CHECK=1: timed all-reduces between the nodes
  local command text
  [ "${COMM_CHECK:-0}" = 1 ] || return 0
  rank_command "$JOBS/comm_check.py"
  text=$(timeout 900 "${command[@]}") || die 1 "the communication check failed or took more than 900 s"
  grep -v '^BAD NODE ' <<< "$text" || true
  exit_if_bad_nodes "$text"
}

# ---------------------------------------------------------------------------------------------- once per rank

rank_command() { # PYTHON_ARGUMENTS...: sets the array `command` of the caller
  local task in_srun=() in_task=() mounts
  if [ -n "${SITE_CONTAINER:-}" ]; then
    mounts=$ROOT:$ROOT,$PWD:$PWD,$LOCAL_DIR:$LOCAL_DIR${RUN_DIR:+,$RUN_DIR:$RUN_DIR}
    mounts+=${SHARDS:+,$SHARDS:$SHARDS}${VAL_SHARDS:+,$VAL_SHARDS:$VAL_SHARDS}
    mounts+=${SITE_CONTAINER_MOUNTS:+,$SITE_CONTAINER_MOUNTS}
    case "${SITE_CONTAINER_RUNTIME:-pyxis}" in
      pyxis) in_srun=(--container-image="$SITE_CONTAINER" --container-mounts="$mounts"
        --container-workdir="$PWD" --no-container-mount-home) ;;
      apptainer) in_task=(apptainer exec --nv --bind "$mounts" --pwd "$PWD" "$SITE_CONTAINER") ;;
      *) die 2 "SITE_CONTAINER_RUNTIME='$SITE_CONTAINER_RUNTIME': use pyxis or apptainer" ;;
    esac
  fi
  # USR1 is ignored until the trainer installs its handler: the default action would kill a rank that is still importing.
  # shellcheck disable=SC2016  # SLURM sets these variables in the task
  task='trap "" USR1
    export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS
    export LOCAL_WORLD_SIZE=${SLURM_STEP_TASKS_PER_NODE%%(*}
    exec "$@"'
  # since SLURM 22.05 srun does not inherit --cpus-per-task from sbatch
  command=(srun --kill-on-bad-exit=1 --wait="${SLURM_WAIT:-60}" --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" "${in_srun[@]}"
    bash -c "$task" rank "${in_task[@]}" "$MIMSCALE_PYTHON" "$@")
}

launch() { # PYTHON_ARGUMENTS...: start one task per rank
  local command
  rank_command "$@"
  "${command[@]}"
}
