#!/usr/bin/env bash
# Fine-tunes a pre-trained encoder for classification on a cluster: Tables 1-5 of the paper unless flags say otherwise.
#   slurm/finetune.sh --init_from CHECKPOINT [flags]                    checks everything, then submits itself with the values below
#   sbatch [options] slurm/finetune.sh --init_from CHECKPOINT [flags]   the #SBATCH lines and sbatch's options count
# Flags are those of python -m downstream.finetune. docs/cluster.md explains the rest.
#SBATCH --job-name=finetune --nodes=1 --ntasks-per-node=8 --gpus-per-node=8 --cpus-per-task=10 --time=24:00:00
#SBATCH --requeue --open-mode=append --signal=USR1@600 --output=%x-%j.out

case $0 in # sbatch runs a copy of this file; Slurm knows where the file is
  */slurm_script) PROJECT=$(scontrol show job "$SLURM_JOB_ID" | sed -n 's|^ *Command=\(.*\)/slurm/[a-z_]*\.sh.*|\1|p') ;;
  *) PROJECT=$(cd "$(dirname "$0")/.." && pwd) ;;
esac
SIGNAL_DEFAULT=600 # seconds: an evaluation that is under way is finished first
. "$PROJECT/slurm/job.sh" || exit 2 # reads slurm/site.env; a variable of the caller's environment wins over it

: "${NODES=1}"               # nodes
: "${GPUS_PER_NODE=8}"       # GPUs of each; 0: CPUs only, TASKS_PER_NODE processes a node
: "${BATCH_PER_GPU=128}"      # images that a GPU can hold at once; the rest is accumulated
: "${EFFECTIVE_BATCH=1024}"   # images an update, of the recipe: kept for any number of GPUs
: "${RECIPE=$PROJECT/downstream/recipes/table4_finetune_small.toml}"
: "${DATA_PATH=}"            # ImageNet: a folder with train/<class>/*.jpg and val/<class>/*.jpg
: "${OUTPUT_DIR=output/finetune}"

FLAGS=(--config "$RECIPE")
launch downstream.finetune "$@"
