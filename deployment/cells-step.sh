#!/usr/bin/env bash
# One step of single-cell profiling on whatever machine a scheduler chose: cells-step.sh VERB [OPTIONS]
#
# Reads from its environment where things are, all on a file system that every machine sees:
#   MARTEN_HOME    this repository                 (needed)
#   CELLS_ROOT     the project, with inputs/       (needed)
#   CELLS_CONFIG   file below inputs/config        (default config.json)
#   CELLS_EXP      experiment                      (default results)
#   MARTEN_PYTHON  interpreter                     (default: the repository's .venv, else python3)
# A step that was stopped goes on where it was when it is run again; exit 85 asks for that.
set -euo pipefail

: "${MARTEN_HOME:?is not set: the folder of the repository}"
: "${CELLS_ROOT:?is not set: the folder of the project}"
command=("$MARTEN_HOME/scripts/cells")
if [[ -n ${MARTEN_PYTHON:-} ]]; then
    command=("$MARTEN_PYTHON" "$MARTEN_HOME/scripts/cells")
fi
echo "$(hostname): cells $*" >&2
exec "${command[@]}" --root "$CELLS_ROOT" --config "${CELLS_CONFIG:-config.json}" --exp "${CELLS_EXP:-results}" "$@"
