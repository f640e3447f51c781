#!/bin/bash

# Parameters
#SBATCH --cpus-per-task=10
#SBATCH --error=WORK/out/submitit/%j/%j_0_log.err
#SBATCH --gpus-per-node=0
#SBATCH --job-name=evolved_masks
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --open-mode=append
#SBATCH --output=WORK/out/submitit/%j/%j_0_log.out
#SBATCH --requeue
#SBATCH --signal=USR1@120
#SBATCH --time=1440
#SBATCH --wckey=submitit

# setup
export PYTHONPATH=PROJECT${PYTHONPATH:+:$PYTHONPATH} SUBMITIT_PREEMPT_SIGNAL=USR1

# command
export SUBMITIT_EXECUTOR=slurm
srun --unbuffered --output WORK/out/submitit/%j/%j_%t_log.out --error WORK/out/submitit/%j/%j_%t_log.err --cpus-per-task=10 --kill-on-bad-exit=1 PYTHON -u -m submitit.core._submit WORK/out/submitit/%j
