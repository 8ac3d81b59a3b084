#!/usr/bin/env bash
# After the runs of a sweep: collect.sh table FOLDER writes results.csv, collect.sh archive FOLDER packs the best run.
set -euo pipefail

home=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
python=${MARTEN_PYTHON:-python3}
case ${1:-} in
table)
  "$python" "$home/scripts/sweep" table --folder "$2"
  ;;
archive)
  best=$("$python" "$home/scripts/sweep" best --folder "$2")
  echo "best of $2: $best"
  "$python" "$home/scripts/archive" --model_path "$best" --name "${MARTEN_NAME:-best}" --export_path "$2"
  ;;
*)
  echo "collect.sh: table or archive, then a folder; found '${1:-}'" >&2
  exit 2
  ;;
esac
