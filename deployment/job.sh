#!/usr/bin/env bash
# What runs on the machine that a scheduler chose: job.sh [FLAGS OF THE PROGRAM]
#
# The one wrapper for HTCondor, Slurm, PBS and a plain shell. It stages the data, sets the threads, runs the program in
# the current folder, hands it the scheduler's signals, and asks to be run again in the scheduler's own way when the
# program exits 85 (its state is saved). Run again in the folder that it left, or in a fresh one, it goes on.
#
# Several processes train as one: under Slurm one for each task that sbatch was asked for, on all nodes, by srun, which
# runs this file once more in each of them; elsewhere $MARTEN_PROCESSES on this machine, by torchrun.
#
# Reads from its environment; none is needed:
#   MARTEN_HOME          the repository        (the current folder, the one around this file, or /app of the image)
#   MARTEN_PYTHON        interpreter           (the repository's .venv, else python3)
#   MARTEN_PROGRAM       what to run           (train_main.py)
#   MARTEN_INPUT         given as --data_dir: a .zip, .tar or .tgz is staged on the node's own disk before
#   MARTEN_STAGE         flags of scripts/stage for it, with which a folder is staged too: --inaturalist 2021_train_mini
#   MARTEN_OUT           folder to make, so that a scheduler finds something to bring back whatever happens
#   MARTEN_RUNS          file of flags: one run per line; its line number $SLURM_ARRAY_TASK_ID (PBS_ARRAY_INDEX,
#                        MARTEN_INDEX) is added to the flags. Words are split at blanks
#   MARTEN_PROCESSES     how many train together on this machine, one for each GPU   (1; under Slurm its tasks)
#   MARTEN_SCHEDULER     htcondor, slurm, pbs or none   (what the environment shows)
#   MARTEN_RESUBMIT      PBS: the command that submits this job again
#   MARTEN_MAX_RESTARTS  how often a job may ask to be run again   (500)
#   OMP_NUM_THREADS      threads of each process        (the processors that the scheduler granted, shared evenly)
set -euo pipefail

say() { printf '%s job.sh: %s\n' "$(date +%H:%M:%S)" "$*" >&2; }
die() { say "$*"; exit 2; }

# ------------------------------------------------------------------------------------------------ where things are
[[ -z ${MARTEN_OUT:-} ]] || mkdir -p "$MARTEN_OUT"
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
program=${MARTEN_PROGRAM:-train_main.py}
home=""
for folder in "${MARTEN_HOME:-}" "$PWD" "$here/.." /app; do
  if [[ -z $home && -n $folder && -f $folder/$program ]]; then
    home=$(cd "$folder" && pwd)
  fi
done
[[ -n $home ]] || die "no $program in \$MARTEN_HOME (${MARTEN_HOME:-not set}), $PWD or /app: set MARTEN_HOME"
python=${MARTEN_PYTHON:-}
if [[ -z $python ]]; then
  python=python3
  [[ ! -x $home/.venv/bin/python ]] || python=$home/.venv/bin/python
fi
command -v "$python" >/dev/null || die "no interpreter $python on $(hostname): set MARTEN_PYTHON"

scheduler=${MARTEN_SCHEDULER:-}
if [[ -z $scheduler ]]; then
  # Slurm before PBS: sites that offer qsub on Slurm set the variables of both
  if [[ -n ${_CONDOR_SCRATCH_DIR:-} ]]; then scheduler=htcondor
  elif [[ -n ${SLURM_JOB_ID:-} ]]; then scheduler=slurm
  elif [[ -n ${PBS_JOBID:-} ]]; then scheduler=pbs
  else scheduler=none
  fi
fi

processes=${MARTEN_PROCESSES:-1}
[[ $processes =~ ^[0-9]+$ ]] || die "\$MARTEN_PROCESSES is a number, found '$processes'"
(( processes > 0 )) || processes=1
cpus=${SLURM_CPUS_PER_TASK:-$(( ${NCPUS:-$(nproc)} / processes ))}
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$(( cpus > 0 ? cpus : 1 ))}"
export PYTHONUNBUFFERED=1

# ----------------------------------------------------------------------------------------------- what is to be run
words=("$@")
if [[ -n ${MARTEN_RUNS:-} ]]; then
  index=${SLURM_ARRAY_TASK_ID:-${PBS_ARRAY_INDEX:-${PBS_ARRAYID:-${MARTEN_INDEX:-}}}}
  [[ $index =~ ^[1-9][0-9]*$ ]] || die "\$MARTEN_RUNS needs an array index from 1 on, found '$index'"
  line=$(sed -n "${index}p" "$MARTEN_RUNS")
  [[ -n $line ]] || die "$MARTEN_RUNS has no line $index"
  read -ra more <<<"$line"
  words+=("${more[@]}")
fi

# ----------------------------------------------------------------------------------- run it, handing signals over
child=0
asked=""
torchrun=""
hand_over() {
  local heirs=""
  asked=$1
  say "got SIG$1"
  (( child != 0 )) || return 0
  # past torchrun to its processes, once there are some: it would leave them 30 s, and what it makes of a signal, an
  # exception, is swallowed where that comes within a line of its log
  [[ -z $torchrun ]] || heirs=$(cat "/proc/$child/task/$child/children" 2>/dev/null) || heirs=""
  # shellcheck disable=SC2086  # numbers, with spaces between
  kill -s "$1" ${heirs:-"$child"} 2>/dev/null || true
}
for name in TERM USR1 INT; do
  # shellcheck disable=SC2064  # the name is meant now
  trap "hand_over $name" "$name"
done

supervise() { # supervise COMMAND...: its exit code, however many signals come in between
  local code=0
  "$@" &
  child=$!
  while true; do
    code=0
    wait "$child" || code=$?
    # wait also returns when a trap ran; the child's own code comes only after its end
    kill -0 "$child" 2>/dev/null || break
  done
  # a signal that arrived with the child's end has hidden its code: ask once more, the shell remembers it
  if (( code > 128 )) && [[ -n $asked ]]; then
    code=0
    wait "$child" || code=$?
  fi
  child=0
  return "$code"
}

stage_and_run() { # stage_and_run LAUNCHER...: on this machine; sets code
  local place staged
  if [[ -n ${MARTEN_INPUT:-} ]]; then
    # HTCondor puts what came from afar beside us, under its last name
    [[ $scheduler != htcondor || ! -e ${MARTEN_INPUT##*/} ]] || MARTEN_INPUT=${MARTEN_INPUT##*/}
    if [[ -z ${MARTEN_STAGE:-} && ( -d $MARTEN_INPUT || $MARTEN_INPUT == *.[ct]sv ) ]]; then
      staged=$MARTEN_INPUT
    else
      place=$(mktemp "${TMPDIR:-/tmp}/marten-staged.XXXXXX")
      read -ra how <<<"${MARTEN_STAGE:-}"
      stage() { exec "$python" "$home/scripts/stage" "$MARTEN_INPUT" "${how[@]}" >"$place"; }
      supervise stage || code=$?
      staged=$(<"$place")
      rm -f "$place"
    fi
    words+=(--data_dir "$staged")
    if [[ -n $asked && $code -ne 0 ]]; then
      code=85  # what is staged stays staged where the disk stays; nothing else was begun
    fi
  fi
  if (( code == 0 )) && [[ -n $asked ]]; then
    code=85
  fi
  if (( code == 0 )); then
    say "$(hostname):$PWD, $scheduler, $OMP_NUM_THREADS threads: $program ${words[*]}"
    supervise "$@" "$home/$program" "${words[@]}" || code=$?
    # dead of the very signal that it was handed: it had not begun to heed signals, so there was nothing to save
    case $asked:$code in TERM:143 | USR1:138 | INT:130) code=85 ;; esac
  fi
}

code=0
if [[ $scheduler == slurm && -n ${SLURM_STEP_NUM_TASKS:-} && -n ${MARTEN_EXIT:-} ]]; then
  # one of srun's tasks, see below
  stage_and_run "$python"
  (( code != 85 )) || echo 85 >"$MARTEN_EXIT"
  exit "$code"
elif [[ $scheduler == slurm ]] && (( ${SLURM_NTASKS:-1} > 1 )); then
  # srun and torchrun know done and failed: the first process leaves its own code in a file, and ends with 0
  MARTEN_EXIT=$(mktemp "$PWD/.marten-exit.XXXXXX")
  export MARTEN_EXIT
  say "$SLURM_NTASKS tasks on ${SLURM_JOB_NUM_NODES:-1} nodes"
  supervise srun --kill-on-bad-exit=1 ${SLURM_CPUS_PER_TASK:+--cpus-per-task="$SLURM_CPUS_PER_TASK"} \
    bash "${BASH_SOURCE[0]}" "$@" || code=$?
elif (( processes > 1 )); then
  MARTEN_EXIT=$(mktemp "${TMPDIR:-/tmp}/marten-exit.XXXXXX")
  export MARTEN_EXIT
  torchrun=yes
  # its processes meet on this machine alone, whatever its name resolves to; a signal that it gets itself it hands on
  stage_and_run "$python" -m torch.distributed.run --standalone --local-addr 127.0.0.1 --nproc-per-node "$processes" \
    --signals-to-handle SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1
else
  stage_and_run "$python"
fi
if [[ -n ${MARTEN_EXIT:-} ]]; then
  [[ ! -s $MARTEN_EXIT ]] || code=$(<"$MARTEN_EXIT")
  rm -f "$MARTEN_EXIT"
fi
say "$program exited $code"

# --------------------------------------------------------------------------------------- run me again, said once
(( code == 85 )) || exit "$code"
if [[ $asked == TERM || $asked == INT ]]; then
  # sent to end the job: by its owner (scancel, qdel), or by a preemption, after which the scheduler itself starts it
  # again. A job that put itself back then could not be cancelled
  say "ended by SIG$asked with its state saved: the same job goes on from there"
  exit 85
fi
case $scheduler in
slurm)
  restarts=${SLURM_RESTART_COUNT:-0}
  (( restarts < ${MARTEN_MAX_RESTARTS:-500} )) || { say "restarted $restarts times: enough"; exit 1; }
  say "asking Slurm to run job $SLURM_JOB_ID again (restart $((restarts + 1)))"
  # Slurm takes a requeued job down itself; until then an exit would end it for good
  trap '' TERM USR1 INT
  scontrol requeue "$SLURM_JOB_ID" && sleep 300
  say "Slurm did not take job $SLURM_JOB_ID back: submit it again by hand"
  ;;
pbs)
  restarts=${MARTEN_RESTARTS:-0}
  (( restarts < ${MARTEN_MAX_RESTARTS:-500} )) || { say "restarted $restarts times: enough"; exit 1; }
  [[ -n ${MARTEN_RESUBMIT:-} ]] || { say "MARTEN_RESUBMIT is not set: submit the job again by hand"; exit 85; }
  export MARTEN_RESTARTS=$((restarts + 1))
  if next=$(bash -c "$MARTEN_RESUBMIT"); then
    say "goes on as job $next"
    exit 0
  fi
  say "qsub refused: submit the job again by hand"
  ;;
esac
exit 85
