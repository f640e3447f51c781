#!/usr/bin/env bash
# Trains BEiT's visual tokenizer, in one process: for data of your own, or where OpenAI's encoder.pkl is not to be used.
#   slurm/train_tokenizer.sh [flags]                    checks everything, then submits itself with the values below
#   sbatch [options] slurm/train_tokenizer.sh [flags]   the #SBATCH lines and sbatch's options say what is asked of the cluster
# Flags are those of python -m beit_evolved.train_tokenizer. docs/cluster.md explains the rest.
#SBATCH --job-name=train_tokenizer --nodes=1 --ntasks-per-node=1 --gpus-per-node=1 --cpus-per-task=10 --time=24:00:00
#SBATCH --requeue --open-mode=append --signal=USR1@120 --output=%x-%j.out

case $0 in # sbatch runs a copy of this file; Slurm knows where the file is
  */slurm_script) PROJECT=$(scontrol show job "$SLURM_JOB_ID" | sed -n 's|^ *Command=\(.*\)/slurm/[a-z_]*\.sh.*|\1|p') ;;
  *) PROJECT=$(cd "$(dirname "$0")/.." && pwd) ;;
esac
. "$PROJECT/slurm/job.sh" || exit 2 # reads slurm/site.env; a variable of the caller's environment wins over it

NODES=1 TASKS_PER_NODE=1 # the tokenizer trains in one process
[ "${GPUS_PER_NODE=1}" = 0 ] || GPUS_PER_NODE=1 # 0: on a CPU
: "${BATCH_PER_GPU=128}"
: "${EFFECTIVE_BATCH=128}"
: "${RECIPE=}"               # TOML file of flags, such as beit_evolved/recipes/demo_tokenizer.toml; empty: the defaults
: "${DATA_PATH=}"            # folder of images, as for pre-training
: "${OUTPUT_DIR=output/train_tokenizer}"

FLAGS=(${RECIPE:+--config "$RECIPE"})
launch beit_evolved.train_tokenizer "$@"
