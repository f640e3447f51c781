#!/usr/bin/env bash
# Pre-trains BEiT with evolved part masking on a cluster: Table 4 of the paper (ViT-S, 200 epochs) unless flags say otherwise.
#   slurm/pretrain_beit.sh [flags]                    checks everything, then submits itself with the values below
#   sbatch [options] slurm/pretrain_beit.sh [flags]   the #SBATCH lines and sbatch's options say what is asked of the cluster
# Flags are those of python -m beit_evolved.run_beit_pretraining. docs/cluster.md explains the rest.
#SBATCH --job-name=pretrain_beit --nodes=1 --ntasks-per-node=8 --gpus-per-node=8 --cpus-per-task=10 --time=24:00:00
#SBATCH --requeue --open-mode=append --signal=USR1@120 --output=%x-%j.out

case $0 in # sbatch runs a copy of this file; Slurm knows where the file is
  */slurm_script) PROJECT=$(scontrol show job "$SLURM_JOB_ID" | sed -n 's|^ *Command=\(.*\)/slurm/[a-z_]*\.sh.*|\1|p') ;;
  *) PROJECT=$(cd "$(dirname "$0")/.." && pwd) ;;
esac
. "$PROJECT/slurm/job.sh" || exit 2 # reads slurm/site.env; a variable of the caller's environment wins over it

: "${NODES=1}"               # nodes
: "${GPUS_PER_NODE=8}"       # GPUs of each; 0: CPUs only, TASKS_PER_NODE processes a node
: "${BATCH_PER_GPU=128}"     # images that a GPU can hold at once; the rest is accumulated
: "${EFFECTIVE_BATCH=2048}"  # images an update, of the recipe: kept for any number of GPUs
: "${RECIPE=$PROJECT/beit_evolved/recipes/table4_beit_small_200.toml}"
: "${DATA_PATH=}"            # ImageNet: a folder with train/<class>/*.jpg
: "${TOKENIZER=}"            # OpenAI's encoder.pkl or a tokenizer of train_tokenizer; with UPSTREAM the folder of the former
: "${OUTPUT_DIR=output/pretrain_beit}"
: "${UPSTREAM=}"             # a clone of the official repository with patches/beit.patch in it: trains with that code

FLAGS=(--config "$RECIPE" --tokenizer "$TOKENIZER")
OFFICIAL=(--model beit_small_patch16_224_8k_vocab --clip_grad 3.0 --lr 1.5e-3 --epochs 200 --warmup_steps 10000)
OFFICIAL+=(--discrete_vae_weight_path "$TOKENIZER")
launch beit_evolved.run_beit_pretraining "$@"
