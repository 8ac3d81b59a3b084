#!/usr/bin/env bash
# After the runs of a sweep: collect.sh table FOLDER writes results.csv, collect.sh archive FOLDER packs the best run,
# collect.sh ensemble FOLDER the $MARTEN_BEST (3) best ones as a single model.
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
ensemble)
  joined=$("$python" "$home/scripts/sweep" ensemble --folder "$2" --best "${MARTEN_BEST:-3}")
  "$python" "$home/scripts/archive" --model_path "$joined" --name "${MARTEN_NAME:-ensemble}" --export_path "$2"
  ;;
*)
  echo "collect.sh: table, archive or ensemble, then a folder; found '${1:-}'" >&2
  exit 2
  ;;
esac
