#!/usr/bin/env bash
# Train one network, or one per line of a file, under Slurm:
#
#   sbatch train.sh --conv_net vgg --epochs 20 --data_dir /scratch/me/pets
#   MARTEN_INPUT=/scratch/me/train.zip sbatch --time=3:00:00 train.sh --conv_net vgg     unpacked to the node's own disk
#   sbatch --gres=gpu:4 --ntasks-per-node=4 train.sh --conv_net vgg --batch_size 256     four GPUs, one process for each
#   sbatch --nodes=2 --gres=gpu:4 --ntasks-per-node=4 train.sh --batch_size 512          on each of two machines
#   sbatch --gres=none --cpus-per-task=8 train.sh --conv_net base_cnn                    on processors alone
#   MARTEN_RUNS=runs.txt sbatch --array=1-6%2 train.sh --epochs 5      six runs, two at once; one line of flags each
#
# Options of sbatch before the file win over those below. Relative paths are those of the folder it is submitted from;
# give each run of an array its own --model_path in runs.txt. Further variables are told in deployment/job.sh.
# --batch_size is that of all processes together: the result does not depend on how many share it, but for rounding.
# --cpus-per-task is for each process, --mem for each machine. Data are unpacked once on each machine.
#
# How it survives. Two minutes before its time is over the job gets SIGUSR1, saves its state, and puts itself back into
# the queue; so does a job that exits 85 by --max_runtime. A preempted job is requeued by Slurm. The checkpoint lies
# beside --model_path, so that must be on a file system that every node sees, never in $SLURM_TMPDIR.
# Where preemption comes without notice add --checkpoint_every 30min.
#SBATCH --job-name=marten
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=4
#SBATCH --mem=16G
#SBATCH --gres=gpu:1
#SBATCH --time=12:00:00
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=marten-%j.out
set -euo pipefail

# Slurm runs a copy of this file: the repository is named, or is around the folder the job was submitted from
home=${MARTEN_HOME:-}
folder=${SLURM_SUBMIT_DIR:-$PWD}
while [[ -z $home && $folder != / ]]; do
  [[ ! -f $folder/train_main.py ]] || home=$folder
  folder=$(dirname "$folder")
done
if [[ -z $home ]]; then
  echo "train.sh: no train_main.py in or above ${SLURM_SUBMIT_DIR:-$PWD}: set MARTEN_HOME" >&2
  exit 2
fi
export MARTEN_HOME=$home MARTEN_SCHEDULER=slurm
exec bash "$home/deployment/job.sh" "$@"
