# shellcheck shell=bash
# Sourced by jobs that train or evaluate, after _common.sh: saves before the time limit and requeues the job, so that it
# goes on under the same number from its newest checkpoint, or from what an evaluation has stored. The only entry point is
# run_with_requeue, which a job may call several times.

part=''      # of an evaluation: its protocol; each has a history of its own, and RUN_DIR need not be a finished run
features=''  # where an evaluation keeps them, besides RUN_DIR/eval
submitted='' # RUN_DIR at submission, where the job has changed it

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

newest_step() { # RUN...: step of the newest checkpoint of these runs; 0 if there is none
  local run step newest=0
  for run; do
    step=$(sed -n 's/.*step-0*\([0-9]\{1,\}\).*/\1/p;T;q' "$run/checkpoints/latest.json" 2> /dev/null) || true
    [ "${step:-0}" -le "$newest" ] || newest=$step
  done
  echo "$newest"
}

kept() { # what a restart goes on from: the step of a checkpoint, or the bytes of an evaluation's features
  case $part in
    '') newest_step "$RUN_DIR" ;;
    linear_mae) newest_step "$RUN_DIR"/eval/linear_mae-* ;; # a training run of its own
    *) find "$RUN_DIR/eval" ${features:+"$features"} \( -name 'part-*' -o -name features.npy \) -printf '%s\n' 2> /dev/null |
      awk '{ bytes += $1 } END { printf "%.0f\n", bytes }' || true ;;
  esac
}

allow_fewer_nodes() { # for --nodes=A-B with MIN_NODES=A: otherwise a requeued job waits for as many tasks as before
  [ -z "${MIN_NODES:-}" ] ||
    scontrol update jobid="$SLURM_JOB_ID" numtasks=$((MIN_NODES * SLURM_NTASKS_PER_NODE)) 2> /dev/null || true
}

requeue_job() { # STEP WHY: requeue this job, unless it made no progress or was stopped, or restarts are used up
  local saved=$1 why=$2 restart=${SLURM_RESTART_COUNT:-0} history=$RUN_DIR/job/restarts${part:+-$part}.txt last=0 pause_s
  local terminated='' at="step $1" again="submit again with RUN_DIR='${submitted:-$RUN_DIR}' to go on"
  [ -z "$part" ] || [ "$part" = linear_mae ] || at="feature byte $1"
  # what an older job has stored of other weights says nothing about an evaluation
  [ ! -s "$history" ] || last=$(sed -n "\$s/^job ${part:+$SLURM_JOB_ID }.* //p" "$history")
  echo "job $SLURM_JOB_ID restart $restart $at" >> "$history"
  [ ! -e "$RUN_DIR/stop" ] || die 1 "saved at $at because of $RUN_DIR/stop; remove that file and $again"
  [ "$saved" -gt "${last:-0}" ] || [ "$why" = node ] || # a node may be lost twice between two checkpoints
    die 1 "saved at $at, no further than before the last restart; not requeued; $again"
  [ "$restart" -lt "${MAX_RESTARTS:-20}" ] ||
    die 1 "saved at $at; MAX_RESTARTS=${MAX_RESTARTS:-20} are used up; $again"
  echo "$(date '+%F %T') saved at $at: requeue $((restart + 1)) of at most ${MAX_RESTARTS:-20}"
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
  die 1 "saved at $at, but SLURM refused the requeue; $again"
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
    if [ -n "$part" ]; then
      echo "$part has not ended in time; the job goes on from what is stored"
    else
      echo "the ranks have not saved in time; the job goes on from the newest checkpoint"
    fi
    saved=$(kept)
  fi
  # After the crash of one rank srun ends the others with TERM; they may still save and write MIMSCALE_REQUEUE_FILE.
  # A run that hung writes it too, and always fails.
  if [ -z "$saved" ] || { [ "$status" != 0 ] && [ -z "$save_requested" ] && [ "$why" != hang ]; }; then
    if [ "$status" = 0 ]; then
      [ -n "$part" ] || [ -e "$RUN_DIR/done" ] || die 1 "the trainer ended without finishing $RUN_DIR; not requeued"
      early_stop=$save_requested # what the job runs next is asked to stop at once
      trap 'early_stop=1' USR1
      trap 'exit 143' TERM
      return 0
    fi
    # After the loss of a node the ranks of the other nodes crash long before SLURM marks it as down.
    lost=$(unreachable_nodes)
    [ -n "$lost" ] || die "$status" "${part:-the trainer} failed (srun exit code $status); not requeued"
    echo "${part:-the trainer} failed (srun exit code $status), and nothing can be started on $lost"
    trap 'allow_fewer_nodes; exit 143' TERM
    wait_s=$(scontrol show config | sed -n 's/^SlurmdTimeout *= \([0-9]*\).*/\1/p') || true
    sleep $((${wait_s:-300} + 120)) & # SLURM ends this shell and requeues the job when it marks the node as down
    wait $!
    saved=$(kept) why=node
  fi
  requeue_job "$saved" "$why"
}
