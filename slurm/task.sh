#!/usr/bin/env bash
# One rank of a step: srun starts `task.sh COMMAND`. Leaves the file $STOPPED behind if the command stopped on request, with
# exit code 0, so that srun lets the other ranks leave too; every other code is passed on, and ends the step.
trap : USR1 TERM # Slurm signals this shell too, and the command alone is to act on it
if [ -n "${UPSTREAM:-}" ]; then # the official code knows torchrun's variables only
  export RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_STEP_NUM_TASKS LOCAL_RANK=$SLURM_LOCALID
  export MASTER_PORT=${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 10000))}
fi
"$@"
code=$?
case $code in
  75) ;;                                                                       # stopped on request, state saved
  138 | 143) echo "ended by signal $((code - 128)) without saving its state" ;; # asked to stop where it could not save
  137) echo "killed by signal 9: memory ran out, or by hand" && exit 137 ;;
  *) exit $code ;;
esac
: >"$STOPPED"
