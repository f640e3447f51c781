#!/usr/bin/env bash
# Trains Mask R-CNN on a pre-trained encoder on a cluster: Tables 1-5 of the paper unless flags say otherwise.
#   slurm/detect.sh --init_from CHECKPOINT [flags]                    checks everything, then submits itself with the values below
#   sbatch [options] slurm/detect.sh --init_from CHECKPOINT [flags]   the #SBATCH lines and sbatch's options count
# Flags are those of python -m downstream.detect. docs/cluster.md explains the rest.
#SBATCH --job-name=detect --nodes=1 --ntasks-per-node=8 --gpus-per-node=8 --cpus-per-task=10 --time=24:00:00
#SBATCH --requeue --open-mode=append --signal=USR1@600 --output=%x-%j.out

case $0 in # sbatch runs a copy of this file; Slurm knows where the file is
  */slurm_script) PROJECT=$(scontrol show job "$SLURM_JOB_ID" | sed -n 's|^ *Command=\(.*\)/slurm/[a-z_]*\.sh.*|\1|p') ;;
  *) PROJECT=$(cd "$(dirname "$0")/.." && pwd) ;;
esac
SIGNAL_DEFAULT=600 # seconds: an evaluation that is under way is finished first
. "$PROJECT/slurm/job.sh" || exit 2 # reads slurm/site.env; a variable of the caller's environment wins over it

: "${NODES=1}"               # nodes
: "${GPUS_PER_NODE=8}"       # GPUs of each; 0: CPUs only, TASKS_PER_NODE processes a node
: "${BATCH_PER_GPU=4}"        # images that a GPU can hold at once; the rest is accumulated
: "${EFFECTIVE_BATCH=64}"     # images an update, of the recipe: kept for any number of GPUs
: "${RECIPE=$PROJECT/downstream/recipes/coco_mask_rcnn_15ep.toml}"
: "${DATA_PATH=}"            # COCO: a folder with annotations/, train2017/ and val2017/
: "${OUTPUT_DIR=output/detect}"

FLAGS=(--config "$RECIPE")
launch downstream.detect "$@"
