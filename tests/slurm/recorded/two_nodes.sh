#!/bin/bash

# Parameters
#SBATCH --account=lab
#SBATCH --constraint=h100
#SBATCH --cpus-per-task=10
#SBATCH --error=WORK/out/submitit/%j/%j_0_log.err
#SBATCH --exclusive
#SBATCH --gpus-per-node=8
#SBATCH --job-name=mae
#SBATCH --mem=200GB
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --open-mode=append
#SBATCH --output=WORK/out/submitit/%j/%j_0_log.out
#SBATCH --partition=gpu
#SBATCH --qos=long
#SBATCH --requeue
#SBATCH --signal=USR1@90
#SBATCH --time=600
#SBATCH --wckey=submitit

# setup
export PYTHONPATH=PROJECT${PYTHONPATH:+:$PYTHONPATH} SUBMITIT_PREEMPT_SIGNAL=USR1
module load cuda

# command
export SUBMITIT_EXECUTOR=slurm
srun --unbuffered --output WORK/out/submitit/%j/%j_%t_log.out --error WORK/out/submitit/%j/%j_%t_log.err --cpus-per-task=10 --kill-on-bad-exit=1 PYTHON -u -m submitit.core._submit WORK/out/submitit/%j
