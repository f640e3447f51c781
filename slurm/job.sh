# What the batch scripts of this folder share. A script sources this file, sets its values, FLAGS and OFFICIAL, and calls
# `launch MODULE FLAGS`. On a login node that checks everything and submits the script; inside the job it checks again,
# starts one task a GPU on every node, and requeues the job when it was stopped with its state saved.
# Sets PROJECT's environment up; needs bash 4.4 and Slurm 20.11 or newer.
set -euo pipefail

NAME=$(basename "${0%.sh}")
case $0 in
  */slurm_script) IN_JOB=1 NAME=$SLURM_JOB_NAME ;;
  *) IN_JOB= ;;
esac
[ -z "$IN_JOB" ] || trap : USR1 TERM # Slurm's signals are for the ranks; this shell waits for them

say() { printf '%s: %s\n' "$NAME" "$*"; }
fail() { printf '%s: error: %s\n' "$NAME" "$*" >&2; exit 2; }

[ -n "${PROJECT:-}" ] || fail "cannot tell which project this job's script belongs to; submit it by its path in slurm/"

# --- Values ----------------------------------------------------------------------------------------------------------

# What a site or a user may set, besides a script's own values: see site.env.example.
VALUES="PARTITION ACCOUNT QOS TIME NODES GPUS_PER_NODE TASKS_PER_NODE CPUS_PER_TASK MEM SBATCH_OPTIONS ACTIVATE SRUN_OPTIONS
  BATCH_PER_GPU EFFECTIVE_BATCH RECIPE DATA_PATH OUTPUT_DIR TOKENIZER UPSTREAM
  SIGNAL_SECONDS DIST_TIMEOUT MAX_RESTARTS AFTER"

environment=$(declare -p $VALUES 2>/dev/null | sed 's/^declare -[^ ]* /declare -gx /' || true)
SITE=${SITE_ENV:-$PROJECT/slurm/site.env}
if [ -e "$SITE" ]; then
  # shellcheck disable=SC1090
  . "$SITE" || fail "$SITE: cannot be read"
elif [ -n "${SITE_ENV:-}" ]; then
  fail "SITE_ENV $SITE: no such file"
fi
eval "$environment"
unset environment

: "${PARTITION=}" "${ACCOUNT=}" "${QOS=}" "${MEM=}" "${SBATCH_OPTIONS=}" "${SRUN_OPTIONS=}" "${ACTIVATE=}"
: "${UPSTREAM=}" "${AFTER=}" "${CHECKED=}" # AFTER: jobs to wait for, A:B; CHECKED: paper.reproduce has made the plan
: "${TIME=24:00:00}" "${CPUS_PER_TASK=10}" "${TASKS_PER_NODE=1}" "${TOKENIZER=}"
: "${SIGNAL_SECONDS=${SIGNAL_DEFAULT:-120}}" "${DIST_TIMEOUT=10}" "${MAX_RESTARTS=3}"

# The Python environment: ACTIVATE is a file to source (a venv's or conda's activate), or a command; default .venv.
activate() {
  set +u # activate scripts of conda and modules read unset variables
  if [ -z "$ACTIVATE" ]; then
    [ ! -e "$PROJECT/.venv/bin/activate" ] || . "$PROJECT/.venv/bin/activate"
  elif [ -e "$ACTIVATE" ]; then
    . "$ACTIVATE"
  else
    eval "$ACTIVATE" || fail "ACTIVATE $ACTIVATE: no such file, and it fails as a command"
  fi
  set -u
  export PYTHONPATH=$PROJECT${PYTHONPATH:+:$PYTHONPATH}
  command -v python >/dev/null || fail "python is not on PATH: set ACTIVATE (slurm/site.env.example)"
}

# --- Both ------------------------------------------------------------------------------------------------------------

launch() {
  local module=$1 word data=$DATA_PATH
  shift
  RESUME= # what the user says of the checkpoint, if anything
  for word in "$@"; do
    case $word in
      -h | --help) show_help "$module"; exit 0 ;;
      --resume | --resume=*) RESUME=named ;;
      --output_dir | --output_dir=*) fail "--output_dir: set OUTPUT_DIR in its place, the logs go there too" ;;
      --dataset | --dataset=* | --data_path | --data_path=*) data=named ;;
    esac
  done
  [ -n "$data" ] || fail "DATA_PATH is not set: the folder of the images (slurm/site.env, or DATA_PATH=... before the command)"
  activate
  [ -z "$IN_JOB" ] || allocation
  RANKS=$GPUS_PER_NODE
  [ "$GPUS_PER_NODE" != 0 ] || RANKS=$TASKS_PER_NODE
  if [ -z "$IN_JOB" ]; then
    [ -n "$CHECKED" ] || make_plan "$module" "$@"
    submit "$@"
  else
    plan_again "$module" "$@"
    work
  fi
}

# What this job got, which sbatch's options may have made another than NODES and GPUS_PER_NODE.
allocation() {
  NODES=$SLURM_JOB_NUM_NODES GPUS_PER_NODE=${SLURM_GPUS_ON_NODE:-0}
  TASKS_PER_NODE=${SLURM_NTASKS_PER_NODE:-$TASKS_PER_NODE} CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1}
}

# The plan of the job's first start holds for the later ones, which need not check again. But a job that was told to start
# anew (--resume none) or elsewhere does so once: later it continues its own checkpoint.
plan_again() {
  local first=$OUTPUT_DIR/logs/.$SLURM_JOB_ID.plan last=$OUTPUT_DIR/checkpoint-last.pth
  if [ "${SLURM_RESTART_COUNT:-0}" = 0 ] || [ ! -e "$first" ] || [ -n "$UPSTREAM" ]; then
    make_plan "$@"
    mkdir -p "$OUTPUT_DIR/logs" 2>/dev/null || fail "OUTPUT_DIR $OUTPUT_DIR: cannot be made"
    printf '%s\n' "$PLAN" >"$first"
  else
    PLAN=$(cat "$first")
    read_plan
    [ ! "$last" -nt "$first" ] || COMMAND+=(--resume auto)
  fi
}

# Sets PLAN, or ends with one line that says what cannot be.
make_plan() {
  local module=$1 lines
  shift
  local words=(--nodes "$NODES" --ranks_per_node "$RANKS" --effective_batch "$EFFECTIVE_BATCH" --batch_per_rank "$BATCH_PER_GPU"
    --data_path "$DATA_PATH" --output_dir "$OUTPUT_DIR" --dist_timeout "$DIST_TIMEOUT")
  if [ -z "$IN_JOB" ]; then
    words+=(--partition "${PARTITION:-${SBATCH_PARTITION:-}}" --qos "$QOS" --cpus_per_task "$CPUS_PER_TASK")
    words+=("--sbatch_options=$SBATCH_OPTIONS")
    [ -z "$AFTER" ] || words+=(--pending)
  fi
  if [ -n "$UPSTREAM" ]; then
    words+=(--upstream "$UPSTREAM" "$module" "${OFFICIAL[@]}")
  else
    words+=("$module" "${FLAGS[@]}")
  fi
  lines=$(python -m slurm.plan "${words[@]}" "$@") || exit $?
  [[ $lines == *slurm.plan:$'\n'* ]] || fail "there is no plan for these flags: $*"
  PLAN=${lines#*slurm.plan:$'\n'} # libraries may have written something before
  read_plan
}

# Sets SUMMARY and COMMAND from PLAN: the summary, then the words of the command after `python`, one a line.
read_plan() {
  mapfile -t COMMAND <<<"$PLAN"
  SUMMARY=${COMMAND[0]}
  COMMAND=("${COMMAND[@]:1}")
}

# What --help prints, on the login node or in a job: the head of the script, its variables, and the flags of the module.
show_help() {
  local name comment comments
  sed -n '1d; /^#SBATCH/q; s/^# \{0,1\}//p' "$PROJECT/slurm/$NAME.sh"
  printf '\nVariables, with the values that hold now. The environment wins over slurm/site.env, and that over the script.\n\n'
  comments=$(
    sed -n 's/^: "${\([A-Z_]*\)=.*}" *# *\(.*\)/\1 \2/p' "$PROJECT/slurm/$NAME.sh"
    sed -n 's/^#\{0,1\} *\([A-Z_]*\)=[^#]*# *\(.*\)/\1 \2/p' "$PROJECT/slurm/site.env.example"
    printf '%s\n' "RECIPE TOML file of flags; flags of the command line win" "OUTPUT_DIR checkpoints and logs" \
      "EFFECTIVE_BATCH images an update, kept for any number of GPUs"
  )
  for name in $VALUES; do
    comment=$(sed -n "/^$name /{s/^$name //p;q;}" <<<"$comments")
    [ -z "$comment" ] || printf '  %-32s %s\n' "$name=${!name-}" "$comment"
  done
  printf '\nFlags are those of python -m %s, but for --output_dir, --batch_size and --accum_iter, which follow from the\n' "$module"
  printf 'variables%s.\n\n' "${OFFICIAL:+; with UPSTREAM they are those of the official script}"
  activate
  python -m "$module" --help
}

# --- On the login node -----------------------------------------------------------------------------------------------

submit() {
  command -v sbatch >/dev/null || fail "sbatch is not on PATH: this is no node of a Slurm cluster"
  mkdir -p "$OUTPUT_DIR/logs" 2>/dev/null || fail "OUTPUT_DIR $OUTPUT_DIR: cannot be made"
  local options=(--parsable --export=ALL --job-name="$NAME" --nodes="$NODES" --ntasks-per-node="$RANKS"
    --gpus-per-node="$GPUS_PER_NODE" --cpus-per-task="$CPUS_PER_TASK" --time="$TIME" --signal="USR1@$SIGNAL_SECONDS"
    --requeue --open-mode=append --output="$OUTPUT_DIR/logs/%j.out")
  [ -z "$PARTITION" ] || options+=(--partition="$PARTITION")
  [ -z "$ACCOUNT" ] || options+=(--account="$ACCOUNT")
  [ -z "$QOS" ] || options+=(--qos="$QOS")
  [ -z "$MEM" ] || options+=(--mem="$MEM")
  [ -z "$AFTER" ] || options+=(--dependency="afterok:$AFTER" --kill-on-invalid-dep=yes)
  # shellcheck disable=SC2163,SC2206
  options+=($SBATCH_OPTIONS)
  local value answer
  for value in $VALUES; do [ -z "${!value+set}" ] || export "${value?}"; done # what was checked is what the job does
  if ! answer=$(sbatch "${options[@]}" "$PROJECT/slurm/$NAME.sh" "$@" 2>&1); then
    fail "not submitted: $(sed -n 's/^sbatch: [a-z]*: //p' <<<"$answer" | paste -sd ';' | sed 's/;/; /g')"
  fi
  [ -n "$CHECKED" ] || say "$SUMMARY"
  say "submitted job $(tail -n 1 <<<"$answer" | cut -d ';' -f 1); its output: $OUTPUT_DIR/logs"
}

# --- In the job ------------------------------------------------------------------------------------------------------

work() {
  local restart=${SLURM_RESTART_COUNT:-0} code=0
  local prefix=$OUTPUT_DIR/logs/$SLURM_JOB_ID-$restart
  STARTS=$OUTPUT_DIR/logs/.$SLURM_JOB_ID.starts ERRORS=$prefix.srun
  export STOPPED=$prefix.stopped PYTHONUNBUFFERED=1 UPSTREAM
  MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
  export MASTER_ADDR
  count_starts
  trap 'rm -f "$STOPPED" "$ERRORS"' EXIT
  say "$SUMMARY"
  say "start $restart of job $SLURM_JOB_ID on $SLURM_JOB_NODELIST; ranks write $prefix-rank*.log"
  # shellcheck disable=SC2086
  srun --nodes="$NODES" --ntasks-per-node="$RANKS" --ntasks=$((NODES * RANKS)) --cpus-per-task="$CPUS_PER_TASK" \
    --kill-on-bad-exit=1 --output="$prefix-rank%t.log" $SRUN_OPTIONS \
    bash "$PROJECT/slurm/task.sh" python "${COMMAND[@]}" 2>"$ERRORS" || code=$?
  conclude "$prefix" "$code"
}

# Sets UNSAVED: how many starts in a row, this one counted, have not written a checkpoint. The file STARTS keeps the number from
# start to start, and its time is that of the latest start.
count_starts() {
  UNSAVED=0
  [ ! -e "$STARTS" ] || has_saved || UNSAVED=$(cat "$STARTS")
  UNSAVED=$((${UNSAVED:-0} + 1))
  printf '%s\n' "$UNSAVED" >"$STARTS"
}

# Whether a checkpoint is newer than the start that STARTS stands for.
has_saved() { [ -n "$(find "$OUTPUT_DIR" -name '*.pth' -newer "$STARTS" | head -n 1)" ]; }

# What the step's end means: PREFIX of its files, srun's exit code.
conclude() {
  local state
  if [ "$2" = 0 ] && [ ! -e "$STOPPED" ]; then
    rm -f "$STARTS"
    say "finished; $OUTPUT_DIR"
    return
  fi
  state=$(scontrol show job "$SLURM_JOB_ID" | sed -n 's/^ *JobState=\([^ ]*\).*/\1/p')
  if [ "$state" != RUNNING ]; then
    say "stopped by Slurm, which ends the job or starts it again ($state)"
    exit 75
  elif [ "$2" != 0 ]; then
    report "$1" "$2"
    exit "$2"
  fi
  back_into_the_queue
}

# The ranks were asked to stop and did. Nothing forbids another start but MAX_RESTARTS of them in a row without a checkpoint:
# a job of days may be stopped as often as it likes while it gets on.
back_into_the_queue() {
  if [ "$UNSAVED" -ge "$MAX_RESTARTS" ] && ! has_saved; then
    say "error: $UNSAVED starts in a row ended before a checkpoint was written (MAX_RESTARTS $MAX_RESTARTS): not requeued" >&2
    exit 1
  fi
  say "stopped; back into the queue"
  scontrol requeue "$SLURM_JOB_ID"
  exit 75
}

# Why the step failed: what srun says, and the ends of the logs of the ranks that it names first.
report() {
  local rank ranks
  cat "$ERRORS" >&2
  ranks=$(sed -n 's/^srun: error: [^:]*: tasks\{0,1\} \([0-9]*\).*/\1/p' "$ERRORS" | head -n 2)
  ranks=${ranks:-0}
  say "error: rank ${ranks//$'\n'/, } failed (srun's exit code $2); $(way_on)" >&2
  for rank in $ranks; do
    say "the end of $1-rank$rank.log:" >&2
    tail -n 40 "$1-rank$rank.log" >&2 || true
  done
}

# What the same command would do after a failure.
way_on() {
  local checkpoint=$OUTPUT_DIR/checkpoint-last.pth
  [ -z "$UPSTREAM" ] || checkpoint=$(find "$OUTPUT_DIR" -name '*.pth' | head -n 1)
  if [ ! -e "$checkpoint" ]; then
    echo "there is no checkpoint yet, so the same command starts anew"
  elif [ -n "$RESUME" ] && [ -z "$UPSTREAM" ]; then
    echo "the same command with --resume auto continues the last checkpoint"
  else
    echo "the same command continues the last checkpoint"
  fi
}
