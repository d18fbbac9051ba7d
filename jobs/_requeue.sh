# shellcheck shell=bash
# Sourced by jobs that train, after _common.sh: saves before the time limit and requeues the job, so that it goes on from
# its newest checkpoint under the same number. The only entry point is run_with_requeue.

request_save() { # SIGNAL: forward it to the ranks, and make a file for ranks whose handler is not installed yet
  signalled=1 save_requested=1
  echo "$(date '+%F %T') $1: asking the ranks to save and stop"
  : > "$MIMSCALE_STOP_FILE"
  kill -USR1 "$step" 2> /dev/null || true # srun forwards USR1; on TERM it would kill the ranks
  [ "$1" = TERM ] || start_save_timer
}

start_save_timer() { # USR2 to this shell after 4/5 of the remaining time: ranks that still run then will not save in time
  local end seconds=240
  [ -z "$timer" ] || return 0
  end=$(job_field EndTime)
  if [ -n "$end" ] && end=$(date -d "$end" +%s 2> /dev/null); then
    seconds=$(((end - $(date +%s)) * 4 / 5))
  fi
  { sleep $((seconds > 1 ? seconds : 1)) && kill -USR2 $$; } &
  timer=$!
}

job_field() { # NAME: current value of a field of this job; empty if SLURM does not answer
  scontrol show job -o "$SLURM_JOB_ID" 2> /dev/null | sed -n "s/.* $1=\([^ ]*\).*/\1/p" || true
}

unreachable_nodes() { # the nodes of this job on which no task can be started
  local text node unreachable=()
  # for SLURM the ranks on a lost node still occupy it, hence --overlap and --mem=0
  # shellcheck disable=SC2016  # expanded on the node
  text=$(on_each_node 60 --overlap --mem=0 bash -c 'echo "OK NODE $SLURMD_NODENAME"' 2> /dev/null) || true
  for node in $(scontrol show hostnames "$SLURM_JOB_NODELIST"); do
    grep -q -x "OK NODE $node" <<< "$text" || unreachable+=("$node")
  done
  echo "${unreachable[*]}"
}

newest_step() { # step of the newest checkpoint; 0 if there is none
  local step
  step=$(sed -n 's/.*step-0*\([0-9]\{1,\}\).*/\1/p;T;q' "$RUN_DIR/checkpoints/latest.json" 2> /dev/null) || true
  echo "${step:-0}"
}

allow_fewer_nodes() { # for --nodes=A-B with MIN_NODES=A: otherwise a requeued job waits for as many tasks as before
  [ -z "${MIN_NODES:-}" ] ||
    scontrol update jobid="$SLURM_JOB_ID" numtasks=$((MIN_NODES * SLURM_NTASKS_PER_NODE)) 2> /dev/null || true
}

requeue_job() { # STEP WHY: requeue this job, unless it made no progress or was stopped, or restarts are used up
  local saved=$1 why=$2 restart=${SLURM_RESTART_COUNT:-0} history=$RUN_DIR/job/restarts.txt last=0 pause_s terminated=''
  local again="submit again with RUN_DIR='$RUN_DIR' to go on"
  [ ! -s "$history" ] || last=$(sed -n '$s/.* step //p' "$history")
  echo "job $SLURM_JOB_ID restart $restart step $saved" >> "$history"
  [ ! -e "$RUN_DIR/stop" ] || die 1 "saved at step $saved because of $RUN_DIR/stop; remove that file and $again"
  [ "$saved" -gt "$last" ] || [ "$why" = node ] || # a node may be lost twice between two checkpoints
    die 1 "saved at step $saved, no further than before the last restart; not requeued; $again"
  [ "$restart" -lt "${MAX_RESTARTS:-20}" ] ||
    die 1 "saved at step $saved; MAX_RESTARTS=${MAX_RESTARTS:-20} are used up; $again"
  echo "$(date '+%F %T') saved at step $saved: requeue $((restart + 1)) of at most ${MAX_RESTARTS:-20}"
  trap 'terminated=1' TERM
  for pause_s in 5 10 20 40 0; do # slurmctld may be restarting
    if scontrol requeue "$SLURM_JOB_ID"; then
      allow_fewer_nodes
      trap 'exit 1' TERM
      [ -n "$terminated" ] || { sleep 300 & wait; } # SLURM ends this shell; exiting earlier would end the job
      exit 1
    fi
    [ "$pause_s" = 0 ] || echo "the requeue failed; trying again in $pause_s s"
    sleep "$pause_s"
  done
  die 1 "saved at step $saved, but SLURM refused the requeue; $again"
}

shift_step_ids() { # two empty job steps in every other restart, so that the trainer has other step ids than before
  # SLURM numbers the job steps of every restart from 0, and repeats unanswered messages for more than a minute: a message
  # that ends the steps of the last start (trainer, unreachable_nodes) would end the steps of this one with the same ids.
  [ $((${SLURM_RESTART_COUNT:-0} % 2)) = 0 ] || { on_each_node 60 true; on_each_node 60 true; } || true
}

run_with_requeue() { # PYTHON_ARGUMENTS...: like launch; saves before the time limit, then requeues the job
  shift_step_ids
  local restart=${SLURM_RESTART_COUNT:-0}
  local command step='' timer='' status signalled terminated='' overdue='' save_requested=$early_stop saved='' why='' lost now wait_s
  export MIMSCALE_STOP_FILE=$RUN_DIR/job/stop.$SLURM_JOB_ID.$restart
  export MIMSCALE_REQUEUE_FILE=$RUN_DIR/job/requeue.$SLURM_JOB_ID.$restart
  rm -f "$RUN_DIR/job"/{stop,requeue}."$SLURM_JOB_ID".* # also those of earlier starts, which may not have removed them
  trap 'request_save USR1' USR1
  trap 'overdue=1' USR2
  trap 'terminated=1; allow_fewer_nodes; request_save TERM' TERM # fewer nodes matter if SLURM requeues the job
  [ -z "$early_stop" ] || : > "$MIMSCALE_STOP_FILE"

  rank_command "$@"
  "${command[@]}" &
  step=$!
  [ -z "$early_stop" ] || start_save_timer
  while signalled='' && status=0 && { wait "$step" || status=$?; } && [ -n "$signalled" ]; do :; done
  trap '' USR1 USR2
  trap - TERM
  [ -z "$timer" ] || kill "$timer" 2> /dev/null || true

  [ ! -f "$MIMSCALE_REQUEUE_FILE" ] || read -r saved why < "$MIMSCALE_REQUEUE_FILE" || true
  rm -f "$MIMSCALE_STOP_FILE" "$MIMSCALE_REQUEUE_FILE" "$MIMSCALE_REQUEUE_FILE".part*
  [ -z "$terminated" ] || die 143 "ended by SLURM or by scancel; whether it runs again is SLURM's decision"
  # If SLURM lost contact to this node, a newer start of the job may run elsewhere: it must not be disturbed or requeued.
  now=$(job_field Restarts)
  [ "${now:-0}" -le "$restart" ] || die 1 "SLURM has restarted this job; restart $restart ends"
  if [ -n "$overdue" ] && [ -z "$saved" ]; then
    echo "the ranks have not saved in time; the job goes on from the newest checkpoint"
    saved=$(newest_step)
  fi
  # After the crash of one rank srun ends the others with TERM; they may still save and write MIMSCALE_REQUEUE_FILE.
  # A run that hung writes it too, and always fails.
  if [ -z "$saved" ] || { [ "$status" != 0 ] && [ -z "$save_requested" ] && [ "$why" != hang ]; }; then
    if [ "$status" = 0 ]; then
      [ -e "$RUN_DIR/done" ] || die 1 "the trainer ended without finishing $RUN_DIR; not requeued"
      return 0
    fi
    # After the loss of a node the ranks of the other nodes crash long before SLURM marks it as down.
    lost=$(unreachable_nodes)
    [ -n "$lost" ] || die "$status" "the trainer failed (srun exit code $status); not requeued"
    echo "the trainer failed (srun exit code $status), and nothing can be started on $lost"
    trap 'allow_fewer_nodes; exit 143' TERM
    wait_s=$(scontrol show config | sed -n 's/^SlurmdTimeout *= \([0-9]*\).*/\1/p') || true
    sleep $((${wait_s:-300} + 120)) & # SLURM ends this shell and requeues the job when it marks the node as down
    wait $!
    saved=$(newest_step) why=node
  fi
  requeue_job "$saved" "$why"
}
