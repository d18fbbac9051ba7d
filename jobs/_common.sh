# shellcheck shell=bash
# Sourced by every job: where things are, how the ranks are started, and how a run survives its time limit.
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
    set -a +eu # whatever a site writes there reaches the ranks; "module" is not clean under -u
    # shellcheck source=/dev/null
    source "$file"
    set +a -eu
  elif [ -n "${SITE_ENV:-}" ]; then
    die 2 "SITE_ENV='$SITE_ENV': no such file; copy jobs/site.env.example there"
  fi
}

# ---------------------------------------------------------------------------------------------- once per job

setup_job() { # everything that the ranks find in their environment
  local head packages key
  : "${SLURM_JOB_ID:?is not set: start this file with sbatch}"
  early_stop=''
  trap 'early_stop=1' USR1 # a signal that comes before the ranks run must not kill this shell
  read_site
  set +eu
  eval "${SITE_SETUP:-}"
  set -eu

  head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)
  if ! getent hosts "$head" > /dev/null; then
    head=$(scontrol show node "$head" | sed -n 's/.*NodeAddr=\([^ ]*\).*/\1/p')
  fi
  MASTER_ADDR=$head
  # below the ephemeral ports; different for jobs that share a head node and for a restart beside its own leftovers
  MASTER_PORT=$((10000 + (SLURM_JOB_ID * 31 + ${SLURM_RESTART_COUNT:-0}) % 20000))

  # Compilers' caches lie on node-local disk: thousands of ranks that build into one shared home block each other.
  LOCAL_DIR=${SITE_LOCAL_DIR:-/tmp}/mimscale-$(id -un)
  CACHE_DIR=$LOCAL_DIR/cache-$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}
  export MASTER_ADDR MASTER_PORT LOCAL_DIR CACHE_DIR
  export TORCH_EXTENSIONS_DIR=$CACHE_DIR/torch_extensions TRITON_CACHE_DIR=$CACHE_DIR/triton
  export TORCHINDUCTOR_CACHE_DIR=$CACHE_DIR/inductor
  # where NCCL's own watchdog ends a rank, it first writes down its last collectives
  export TORCH_NCCL_TRACE_BUFFER_SIZE=${TORCH_NCCL_TRACE_BUFFER_SIZE:-2000} TORCH_NCCL_DUMP_ON_TIMEOUT=1
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
      die 2 "MIMSCALE_PYTHON='$MIMSCALE_PYTHON' is not there; name the interpreter in jobs/site.env"
  fi
  export ENV_DIR MIMSCALE_PYTHON PYTHONPATH=$ROOT${PYTHONPATH:+:$PYTHONPATH}
}

name_run() { # RECIPE SUFFIX: the run's folder, unless RUN_DIR names it
  RUN_DIR=$(realpath -m "${RUN_DIR:-${SITE_RUN_ROOT:-$ROOT/runs}/$(basename "$1" .yaml)-$2}")
  mkdir -p "$RUN_DIR/job" || die 2 "RUN_DIR='$RUN_DIR' cannot be made; set RUN_DIR or SITE_RUN_ROOT"
  export RUN_DIR
}

check_geometry() { # one rank drives one GPU
  local per_node=${SLURM_NTASKS_PER_NODE:-0} gpus=${SLURM_GPUS_ON_NODE:-}
  [ "$SLURM_NTASKS" = $((per_node * SLURM_NNODES)) ] ||
    die 2 "$SLURM_NTASKS tasks are not $SLURM_NNODES nodes x $per_node; give --nodes and --ntasks-per-node, not --ntasks"
  [ -z "$gpus" ] || [ "$gpus" = "$per_node" ] ||
    die 2 "--ntasks-per-node=$per_node, but $gpus GPUs per node: one rank drives one GPU, so make the two equal"
}

# ---------------------------------------------------------------------------------------------- once per node

on_each_node() { # LIMIT_S COMMAND...: one task per node; a node that hangs must not hang the job
  local limit_s=$1
  shift
  timeout "$limit_s" srun --nodes="$SLURM_NNODES" --ntasks="$SLURM_NNODES" --ntasks-per-node=1 --kill-on-bad-exit=0 "$@"
}

refuse_nodes() { # TEXT with lines "BAD NODE name: why", or without any
  local bad names
  bad=$(grep '^BAD NODE ' <<< "$1") || return 0
  names=$(sed 's/^BAD NODE \([^:]*\):.*/\1/' <<< "$bad" | sort -u | paste -sd, -)
  echo "$bad"
  die 3 "submit again with: sbatch --exclude=$names ... (or, for jobs/submit, SITE_EXCLUDE=$names in jobs/site.env)"
}

check_nodes() {
  local text node
  [ "${NODE_CHECK:-1}" = 1 ] || return 0
  text=$(on_each_node 300 bash "$JOBS/node_check.sh" 2>&1) || true
  for node in $(scontrol show hostnames "$SLURM_JOB_NODELIST"); do
    grep -q -E "^(OK|BAD) NODE $node(:|\$)" <<< "$text" || text+=$'\n'"BAD NODE $node: did not answer"
  done
  grep -v -E '^(OK|BAD) NODE ' <<< "$text" || true
  refuse_nodes "$text"
}

prepare_nodes() { # node-local folders; the packed environment, where one is given, unpacked once per node
  # shellcheck disable=SC2016  # expanded on the node
  on_each_node 3600 bash -c '
    set -eu
    mkdir -p -m 700 "$LOCAL_DIR"
    find "$LOCAL_DIR" -maxdepth 1 -name "cache-*" -mtime +7 -exec rm -rf {} +
    mkdir -p "$TORCH_EXTENSIONS_DIR" "$TRITON_CACHE_DIR" "$TORCHINDUCTOR_CACHE_DIR"
    [ -n "$ENV_DIR" ] || exit 0
    exec 9> "$ENV_DIR.lock"
    flock 9 # another job may be at it on this node; the lock goes with its holder
    [ ! -e "$ENV_DIR/COMPLETE" ] || exit 0
    echo "${SLURMD_NODENAME:-$(hostname -s)}: unpacking $SITE_ENV_TARBALL"
    rm -rf "$ENV_DIR"
    mkdir "$ENV_DIR"
    tar -xf "$SITE_ENV_TARBALL" -C "$ENV_DIR"
    [ -x "$ENV_DIR/bin/python" ] || { echo "SITE_ENV_TARBALL=$SITE_ENV_TARBALL has no bin/python at its top level; pack it with conda-pack or venv-pack" >&2; exit 2; }
    [ ! -x "$ENV_DIR/bin/conda-unpack" ] || "$ENV_DIR/bin/conda-unpack"
    touch "$ENV_DIR/COMPLETE"' || die $? "a node could not be prepared"
}

check_communication() { # COMM_CHECK=1: timed all-reduces between the nodes
  local command text
  [ "${COMM_CHECK:-0}" = 1 ] || return 0
  rank_command "$JOBS/comm_check.py"
  text=$(timeout 900 "${command[@]}") || die 1 "the communication check failed or took more than 900 s"
  grep -v '^BAD NODE ' <<< "$text" || true
  refuse_nodes "$text"
}

# ---------------------------------------------------------------------------------------------- once per rank

rank_command() { # ARGUMENTS OF PYTHON... -> the array `command` of the caller
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
  # USR1 is ignored until the trainer installs its handler: the default action would kill a rank that still imports.
  # shellcheck disable=SC2016  # expanded in the task, where SLURM has set them
  task='trap "" USR1
    export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS
    export LOCAL_WORLD_SIZE=${SLURM_STEP_TASKS_PER_NODE%%(*}
    exec "$@"'
  # since SLURM 22.05 srun does not take --cpus-per-task over from sbatch
  command=(srun --kill-on-bad-exit=1 --wait="${SLURM_WAIT:-60}" --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" "${in_srun[@]}"
    bash -c "$task" rank "${in_task[@]}" "$MIMSCALE_PYTHON" "$@")
}

launch() { # ARGUMENTS OF PYTHON...: one task per rank
  local command
  rank_command "$@"
  "${command[@]}"
}

ask_to_save() { # by signal, and by a file for ranks that do not listen yet
  signalled=1 asked=1
  echo "$(date '+%F %T') $1: asking the ranks to save and stop"
  : > "$MIMSCALE_STOP_FILE"
  kill -USR1 "$step" 2> /dev/null || true # srun passes it on; TERM would make it kill them
  [ "$1" = TERM ] || limit_patience
}

limit_patience() { # ranks that are still there when most of what is left of the time limit is over will not save
  local end seconds=240
  [ -z "$timer" ] || return 0
  end=$(job_field EndTime)
  if [ -n "$end" ] && end=$(date -d "$end" +%s 2> /dev/null); then
    seconds=$(((end - $(date +%s)) * 4 / 5))
  fi
  { sleep $((seconds > 1 ? seconds : 1)) && kill -USR2 $$; } &
  timer=$!
}

job_field() { # NAME: of this job, as SLURM sees it now; empty where it does not answer
  scontrol show job -o "$SLURM_JOB_ID" 2> /dev/null | sed -n "s/.* $1=\([^ ]*\).*/\1/p" || true
}

silent_nodes() { # those of this job's nodes on which nothing can be started any more
  local text node silent=()
  # to SLURM the ranks on a lost node still occupy it, hence both options
  # shellcheck disable=SC2016  # expanded on the node
  text=$(on_each_node 60 --overlap --mem=0 bash -c 'echo "OK NODE $SLURMD_NODENAME"' 2> /dev/null) || true
  for node in $(scontrol show hostnames "$SLURM_JOB_NODELIST"); do
    grep -q -x "OK NODE $node" <<< "$text" || silent+=("$node")
  done
  echo "${silent[*]}"
}

newest_step() { # of the checkpoints; 0 without any
  local step
  step=$(sed -n 's/.*step-0*\([0-9]\{1,\}\).*/\1/p;T;q' "$RUN_DIR/checkpoints/latest.json" 2> /dev/null) || true
  echo "${step:-0}"
}

allow_fewer_nodes() { # --nodes=A-B with MIN_NODES=A: a requeued job otherwise waits for as many tasks as it last had
  [ -z "${MIN_NODES:-}" ] ||
    scontrol update jobid="$SLURM_JOB_ID" numtasks=$((MIN_NODES * SLURM_NTASKS_PER_NODE)) 2> /dev/null || true
}

ask_for_another_turn() { # STEP WHY: SLURM puts this job back into the queue, unless that would lead nowhere
  local saved=$1 why=$2 restart=${SLURM_RESTART_COUNT:-0} history=$RUN_DIR/job/restarts.txt last=0 pause_s gone=''
  local again="submit again with RUN_DIR='$RUN_DIR' to go on"
  [ ! -s "$history" ] || last=$(sed -n '$s/.* step //p' "$history")
  echo "job $SLURM_JOB_ID restart $restart step $saved" >> "$history"
  [ ! -e "$RUN_DIR/stop" ] || die 1 "saved at step $saved because of $RUN_DIR/stop; remove that file and $again"
  [ "$saved" -gt "$last" ] || [ "$why" = node ] || # a node can be lost twice within a checkpoint's interval
    die 1 "saved at step $saved, no further than the last time; not requeued; $again"
  [ "$restart" -lt "${MAX_RESTARTS:-20}" ] ||
    die 1 "saved at step $saved; MAX_RESTARTS=${MAX_RESTARTS:-20} are used up; $again"
  echo "$(date '+%F %T') saved at step $saved: requeue $((restart + 1)) of at most ${MAX_RESTARTS:-20}"
  trap 'gone=1' TERM
  for pause_s in 5 10 20 40 0; do # the controller may just be starting anew
    if scontrol requeue "$SLURM_JOB_ID"; then
      allow_fewer_nodes
      trap 'exit 1' TERM
      [ -n "$gone" ] || { sleep 300 & wait; } # SLURM ends this shell; leaving before would end the job
      exit 1
    fi
    [ "$pause_s" = 0 ] || echo "the requeue failed; trying again in $pause_s s"
    sleep "$pause_s"
  done
  die 1 "saved at step $saved, but SLURM refused the requeue; $again"
}

renumber_steps() { # two empty steps in every other turn, where the one before had its trainer and its silent_nodes
  # SLURM counts each turn's steps from 0, and what a node did not answer it repeats for a minute and more: an order to
  # end ranks of the last turn would reach those of this one under the same number.
  [ $((${SLURM_RESTART_COUNT:-0} % 2)) = 0 ] || { on_each_node 60 true; on_each_node 60 true; } || true
}

run_with_requeue() { # ARGUMENTS OF PYTHON...: as launch; saves before the time limit and goes on in a new turn
  renumber_steps
  local restart=${SLURM_RESTART_COUNT:-0}
  local command step='' timer='' status signalled terminated='' overdue='' asked=$early_stop saved='' why='' lost now wait_s
  export MIMSCALE_STOP_FILE=$RUN_DIR/job/stop.$SLURM_JOB_ID.$restart
  export MIMSCALE_REQUEUE_FILE=$RUN_DIR/job/requeue.$SLURM_JOB_ID.$restart
  rm -f "$RUN_DIR/job"/{stop,requeue}."$SLURM_JOB_ID".* # of older turns, too: not all of them could clean up
  trap 'ask_to_save USR1' USR1
  trap 'overdue=1' USR2
  trap 'terminated=1; allow_fewer_nodes; ask_to_save TERM' TERM # of use when SLURM requeues
  [ -z "$early_stop" ] || : > "$MIMSCALE_STOP_FILE"

  rank_command "$@"
  "${command[@]}" &
  step=$!
  [ -z "$early_stop" ] || limit_patience
  while signalled='' && status=0 && { wait "$step" || status=$?; } && [ -n "$signalled" ]; do :; done
  trap '' USR1 USR2
  trap - TERM
  [ -z "$timer" ] || kill "$timer" 2> /dev/null || true

  [ ! -f "$MIMSCALE_REQUEUE_FILE" ] || read -r saved why < "$MIMSCALE_REQUEUE_FILE" || true
  rm -f "$MIMSCALE_STOP_FILE" "$MIMSCALE_REQUEUE_FILE" "$MIMSCALE_REQUEUE_FILE".part*
  [ -z "$terminated" ] || die 143 "ended by SLURM or by scancel; whether it runs again is SLURM's decision"
  # Where SLURM lost sight of this node, a newer turn may run elsewhere: no step of ours in it, no requeue of it.
  now=$(job_field Restarts)
  [ "${now:-0}" -le "$restart" ] || die 1 "SLURM has started this job anew; restart $restart leaves"
  if [ -n "$overdue" ] && [ -z "$saved" ]; then
    echo "the ranks have not saved in time; going on from the newest checkpoint"
    saved=$(newest_step)
  fi
  # After the crash of one rank srun ends the others with TERM, on which they may still save and leave a marker.
  # A run that hung leaves one too, and always fails.
  if [ -z "$saved" ] || { [ "$status" != 0 ] && [ -z "$asked" ] && [ "$why" != hang ]; }; then
    if [ "$status" = 0 ]; then
      [ -e "$RUN_DIR/done" ] || die 1 "the trainer left without finishing $RUN_DIR; not requeued"
      return 0
    fi
    # Ranks whose peers are gone crash long before SLURM calls a node lost.
    lost=$(silent_nodes)
    [ -n "$lost" ] || die "$status" "the trainer failed (srun exit code $status); not requeued"
    echo "the trainer failed (srun exit code $status), and nothing can be started on $lost"
    trap 'allow_fewer_nodes; exit 143' TERM
    wait_s=$(scontrol show config | sed -n 's/^SlurmdTimeout *= \([0-9]*\).*/\1/p') || true
    sleep $((${wait_s:-300} + 120)) & # SLURM ends this shell and requeues the job when it gives the node up
    wait $!
    saved=$(newest_step) why=node
  fi
  ask_for_another_turn "$saved" "$why"
}
