# Sourced by jobs: gives the program what is kept from everyone else, by reference. $MARTEN_KEYS names a folder that
# its owner alone may enter, with a file per variable, called as the variable is: ~/.marten-keys/WANDB_API_KEY holds
# a key of W&B. No value stands in a job file, on a command line, in a log or in the scheduler's records:
# $forget, put before a command that submits, takes the variables off its environment.
set -euo pipefail

forget=env
if [[ -n ${MARTEN_KEYS:-} ]]; then
  if [[ ! -d $MARTEN_KEYS || $(stat -Lc %a "$MARTEN_KEYS") != *00 ]]; then
    echo "keys.sh: $MARTEN_KEYS must be a folder that you alone may enter: chmod 700" >&2
    exit 2
  fi
  for file in "$MARTEN_KEYS"/*; do
    [[ -f $file ]] || continue
    name=${file##*/}
    [[ $name =~ ^[A-Z][A-Z0-9_]*$ ]] || { echo "keys.sh: $name is no name of a variable" >&2; exit 2; }
    export "$name=$(<"$file")"
    forget+=" -u $name"
  done
fi
