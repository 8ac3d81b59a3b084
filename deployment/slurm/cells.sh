#!/usr/bin/env bash
# Single-cell profiling from crops to a report, as Slurm jobs that wait for each other:
#
#   MARTEN_HOME=~/marten CELLS_ROOT=/scratch/me/project deployment/slurm/cells.sh [PARTS]
#
# MARTEN_HOME, CELLS_ROOT and the others are told in deployment/cells-step.sh. SBATCH holds further options for all
# jobs ("--account=lab --partition=gpu"); CELLS_GPU those of the steps with a network (default --gres=gpu:1).
set -euo pipefail

: "${MARTEN_HOME:?is not set: the folder of the repository}"
: "${CELLS_ROOT:?is not set: the folder of the project}"
export MARTEN_HOME CELLS_ROOT
parts=${1:-4}
gpu=${CELLS_GPU---gres=gpu:1}
step=$MARTEN_HOME/deployment/cells-step.sh
# a job that saved itself (85) puts itself back into the queue: Slurm does not do that by itself
again='"$@"; code=$?; if [ $code = 85 ]; then scontrol requeue "$SLURM_JOB_ID"; sleep 60; fi; exit $code'

submit() { # submit NAME AFTER SBATCH_OPTIONS... -- STEP...
    local name=$1 after=$2 options=()
    shift 2
    while [[ $1 != -- ]]; do
        options+=("$1")
        shift
    done
    shift
    [[ -z $after ]] || options+=("--dependency=afterok:$after" "--kill-on-invalid-dep=yes")
    # shellcheck disable=SC2086  # SBATCH holds several words
    sbatch --parsable --requeue --export=ALL --job-name="cells-$name" --output="cells-$name-%j.out" ${SBATCH:-} \
        "${options[@]}" <<JOB
#!/usr/bin/env bash
set -- "$step" $*
$again
JOB
}

# shellcheck disable=SC2086  # CELLS_GPU may hold several words, or none
{
    sample=$(submit sample "" --cpus-per-task=4 -- sample --validation --format shards --overwrite)
    check=$(submit check "$sample" --cpus-per-task=4 -- check --prune)
    train=$(submit train "$check" --cpus-per-task=4 $gpu -- train --max_runtime 4h)
    split=$(submit split "$check" -- split --parts "$parts")
    profile=$(submit profile "$train:$split" --cpus-per-task=4 --array="0-$((parts - 1))" $gpu -- \
        profile --checkpoint best --part '$SLURM_ARRAY_TASK_ID')
    aggregate=$(submit aggregate "$profile" -- aggregate)
    normalize=$(submit normalize "$aggregate" -- normalize)
    evaluate=$(submit evaluate "$normalize" -- evaluate)
}
echo "sample $sample, check $check, train $train, split $split, profile $profile, aggregate $aggregate," \
    "normalize $normalize, evaluate $evaluate"
