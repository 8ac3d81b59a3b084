# Sourced by jobs: gives the program what is kept from everyone else, by reference. $MARTEN_SECRETS names a folder that
# its owner alone may enter, with a file per variable, called as the variable is: ~/.marten-secrets/WANDB_API_KEY holds
# a key of W&B. No value stands in a job file, on a command line, in a log or in the scheduler's records:
# $forget, put before a command that submits, takes the variables off its environment.
set -euo pipefail

forget=env
if [[ -n ${MARTEN_SECRETS:-} ]]; then
  if [[ ! -d $MARTEN_SECRETS || $(stat -Lc %a "$MARTEN_SECRETS") != *00 ]]; then
    echo "secrets.sh: $MARTEN_SECRETS must be a folder that you alone may enter: chmod 700" >&2
    exit 2
  fi
  for file in "$MARTEN_SECRETS"/*; do
    [[ -f $file ]] || continue
    name=${file##*/}
    [[ $name =~ ^[A-Z][A-Z0-9_]*$ ]] || { echo "secrets.sh: $name is no name of a variable" >&2; exit 2; }
    export "$name=$(<"$file")"
    forget+=" -u $name"
  done
fi
