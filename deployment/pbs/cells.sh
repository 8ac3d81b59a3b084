#!/usr/bin/env bash
# Single-cell profiling from crops to a report, as PBS jobs that wait for each other:
#
#   MARTEN_HOME=~/marten CELLS_ROOT=/scratch/me/project deployment/pbs/cells.sh [PARTS]
#
# MARTEN_HOME, CELLS_ROOT and the others are told in deployment/cells-step.sh. QSUB holds further options for all jobs
# ("-A lab -q gpu"); CELLS_GPU what the steps with a network select on top (default :ngpus=1).
set -euo pipefail

: "${MARTEN_HOME:?is not set: the folder of the repository}"
: "${CELLS_ROOT:?is not set: the folder of the project}"
parts=${1:-4}
gpu=${CELLS_GPU-:ngpus=1}
names=MARTEN_HOME,CELLS_ROOT,CELLS_CONFIG,CELLS_EXP,MARTEN_PYTHON
export MARTEN_HOME CELLS_ROOT CELLS_CONFIG=${CELLS_CONFIG:-config.json} CELLS_EXP=${CELLS_EXP:-results}
export MARTEN_PYTHON=${MARTEN_PYTHON:-}
step=$MARTEN_HOME/deployment/cells-step.sh

submit() { # submit NAME AFTER SELECT QSUB_OPTIONS... -- STEP...
    local name=$1 after=$2 select=$3 options=()
    shift 3
    while [[ $1 != -- ]]; do
        options+=("$1")
        shift
    done
    shift
    [[ -z $after ]] || options+=(-W "depend=afterok:$after")
    # exit 85: the training saved itself because its time was over; within its own job it simply goes on
    # shellcheck disable=SC2086  # QSUB holds several words
    qsub -N "cells-$name" -j oe -l "select=1:$select" -l walltime=12:00:00 -v "$names" ${QSUB:-} "${options[@]}" <<JOB
#!/usr/bin/env bash
cd "\${PBS_O_WORKDIR:-.}"
code=85
while [ \$code = 85 ]; do
    "$step" $*
    code=\$?
done
exit \$code
JOB
}

sample=$(submit sample "" ncpus=4:mem=8gb -- sample --validation --format shards --overwrite)
check=$(submit check "$sample" ncpus=4:mem=8gb -- check --prune)
train=$(submit train "$check" "ncpus=4:mem=16gb$gpu" -- train --max_runtime 4h)
split=$(submit split "$check" ncpus=1:mem=4gb -- split --parts "$parts")
profile=$(submit profile "$train:$split" "ncpus=4:mem=16gb$gpu" -J "0-$((parts - 1))" -- \
    profile --checkpoint best --part '$PBS_ARRAY_INDEX')
aggregate=$(submit aggregate "$profile" ncpus=1:mem=8gb -- aggregate)
normalize=$(submit normalize "$aggregate" ncpus=1:mem=8gb -- normalize)
evaluate=$(submit evaluate "$normalize" ncpus=1:mem=8gb -- evaluate)
echo "sample $sample, check $check, train $train, split $split, profile $profile, aggregate $aggregate," \
    "normalize $normalize, evaluate $evaluate"
