"""What each scheduler calls our words: a table for each, and the native command that a job becomes.

Nothing is generated: the command names the files in deployment/ that an expert uses by hand, and sets what they leave
open. No torch is imported here, so that submitting is immediate.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from marten.errors import MartenError, UsageError
from marten.files import ROOT
from marten.jobs import Job, Resources, lines_of, parsed, without

DEPLOYMENT = ROOT / "deployment"


@dataclass(frozen=True)
class Command:
    """What is really executed.

    Attributes:
        words: program and arguments.
        environment: variables set on top of the present ones.
        files: that it reads.
    """

    words: tuple[str, ...]
    environment: Mapping[str, str]
    files: tuple[Path, ...]

    def __str__(self) -> str:
        """The line to paste into a shell."""
        settings = [f"{name}={shlex.quote(value)}" for name, value in self.environment.items()]
        return " ".join([*settings, shlex.join(self.words)])


def _clock(seconds: int) -> str:
    return f"{seconds // 3600:02}:{seconds // 60 % 60:02}:{seconds % 60:02}"


# ------------------------------------------------------------- from our words to each scheduler's: one table for each

_HTCONDOR: dict[str, Callable[[Resources], str]] = {
    "cpus": lambda r: f"cpus={r.cpus * r.processes}",
    "gpus": lambda r: f"gpus={r.gpus}",
    "memory_gb": lambda r: f"memory={r.memory_gb}GB",
    "disk_gb": lambda r: f"disk={r.disk_gb}GB",
    "time_s": lambda r: f"checkpoint_interval={min(r.time_s, 3600)}s",
    "gpu_memory_gb": lambda r: f"gpu_memory={r.gpu_memory_gb}GB" if r.gpu_memory_gb else "",
}
_SLURM: dict[str, Callable[[Resources], str]] = {
    "nodes, gpus": lambda r: f"--nodes={r.nodes} --ntasks-per-node={r.processes}" if r.nodes * r.processes > 1 else "",
    "cpus": lambda r: f"--cpus-per-task={r.cpus}",
    "gpus": lambda r: f"--gres=gpu:{r.gpus}" if r.gpus else "--gres=none",
    "memory_gb": lambda r: f"--mem={r.memory_gb}G",
    "time_s": lambda r: f"--time={_clock(r.time_s)}",
}
_PBS: dict[str, Callable[[Resources], str]] = {
    "cpus, gpus, memory_gb": lambda r: (
        f"-l select=1:ncpus={r.cpus * r.processes}" + (f":ngpus={r.gpus}" if r.gpus else "") + f":mem={r.memory_gb}gb"
    ),
    "time_s": lambda r: f"-l walltime={_clock(r.time_s)}",
}


def _told(table: Mapping[str, Callable[[Resources], str]], resources: Resources) -> list[str]:
    return [words for words in (tell(resources) for tell in table.values()) if words]


def _htcondor(job: Job) -> Command:
    name = job.name.removeprefix("marten-")
    told = [parsed([*job.flags, *shlex.split(line)]).model_path for line in lines_of(job.runs)] if job.runs else []
    paths = [Path(path or f"out/model_{name}.pth") for path in told or [job.model_path]]
    top = paths[0].parts[0]
    outside = [p for p in paths if p.is_absolute() or ".." in p.parts or len(p.parts) < 2 or p.parts[0] != top]
    if outside:
        raise UsageError(
            f"--model_path {outside[0]}: HTCondor brings one folder back, so name a file in it, for instance"
            f" out/{outside[0].name}"
        )
    if job.at_once:
        raise UsageError("--at_once: HTCondor decides itself; say --native max_materialize=N")
    if job.data.lower().endswith((".csv", ".tsv")):
        raise UsageError(
            f"--data_dir {job.data}: HTCondor brings one file or folder, pack the pictures with their table"
        )
    words = [_quoted(word) for word in without(job.flags, "--model_path")]
    settings = [*_told(_HTCONDOR, job.resources), f"name={name}", f"out={top}", f"model_path={paths[0]}"]
    if job.runs:
        settings.append(f"each=flags from {job.runs}")
        words.append("$(flags)")
    settings.append(f"train={' '.join(words)}")
    data = job.data if "://" in job.data else str(Path(job.data).absolute()) if job.data else ""
    settings += [f"{name}={value}" for name, value in (("data", data), ("image", job.image)) if value]
    if job.python:
        settings.append(f"python={job.python}")
    file = DEPLOYMENT / "htcondor" / "train.sub"
    return Command(("condor_submit", *settings, *job.native, str(file)), {}, _files(job, file))


def _quoted(word: str) -> str:
    """A word inside HTCondor's arguments = "…"."""
    word = word.replace("$", "$(DOLLAR)").replace('"', '""')
    return "'" + word.replace("'", "''") + "'" if not word or set(word) & set(" \t'") else word


def _environment(job: Job) -> dict[str, str]:
    data = str(Path(job.data).absolute()) if job.data else ""  # a folder is used as it is, an archive is unpacked
    runs = str(job.runs.absolute()) if job.runs else ""
    told = {"MARTEN_HOME": str(ROOT), "MARTEN_PYTHON": job.python, "MARTEN_INPUT": data, "MARTEN_RUNS": runs}
    return {name: value for name, value in told.items() if value}


def _slurm(job: Job) -> Command:
    options = [f"--job-name={job.name}", *(word for told in _told(_SLURM, job.resources) for word in told.split())]
    if job.runs:
        options.append(f"--array=1-{job.run_count}" + (f"%{job.at_once}" if job.at_once else ""))
    file = DEPLOYMENT / "slurm" / "train.sh"
    return Command(("sbatch", *options, *job.native, str(file), *job.flags), _environment(job), _files(job, file))


def _pbs(job: Job) -> Command:
    words = [word for told in _told(_PBS, job.resources) for word in told.split()]
    options = ["-N", job.name[:15], *words, *job.native]
    array = ["-J", f"1-{job.run_count}" + (f"%{job.at_once}" if job.at_once else "")] if job.run_count > 1 else []
    if blank := [word for word in job.flags if not word or word.split() != [word]]:
        raise UsageError(f"{blank[0]!r}: PBS hands flags over in one line, no word may hold a blank")
    told = _environment(job)
    renamed = {"MARTEN_INPUT": "data", "MARTEN_RUNS": "runs"}
    environment = {renamed.get(name, name): value for name, value in told.items()}
    if job.runs and not array:
        environment["MARTEN_INDEX"] = "1"
    saved_s = job.resources.time_s - min(900, job.resources.time_s // 4)
    environment |= {"flags": " ".join(job.flags), "max_runtime": f"{saved_s}s", "options": shlex.join(options)}
    if job.resources.processes > 1:
        environment["processes"] = str(job.resources.processes)
    file = DEPLOYMENT / "pbs" / "train.pbs"
    # -V and not -v: a value may hold commas and blanks
    words = ["qsub", *options, *array, "-V", str(file)]
    return Command(tuple(words), environment, _files(job, file))


def _local(job: Job) -> Command:
    if job.run_count > 1:
        raise UsageError("--runs with --cluster local: scripts/sweep runs several here, one after the other")
    here = {"MARTEN_PYTHON": sys.executable, "MARTEN_SCHEDULER": "none"}
    environment = here | _environment(job) | ({"MARTEN_INDEX": "1"} if job.runs else {})
    if job.resources.processes > 1:
        environment["MARTEN_PROCESSES"] = str(job.resources.processes)
    return Command(("bash", str(DEPLOYMENT / "job.sh"), *job.flags), environment, _files(job))


def _files(job: Job, *native: Path) -> tuple[Path, ...]:
    return (*native, DEPLOYMENT / "job.sh", *([job.runs] if job.runs else []))


CLUSTERS: dict[str, Callable[[Job], Command]] = {"htcondor": _htcondor, "slurm": _slurm, "pbs": _pbs, "local": _local}


def native_command(cluster: str, job: Job) -> Command:
    """The command that submits a job.

    Raises:
        UsageError: an unknown scheduler, or a job that it cannot express.
    """
    if cluster not in CLUSTERS:
        raise UsageError(f"--cluster must be one of {', '.join(CLUSTERS)}, found {cluster!r}")
    if job.image and cluster != "htcondor":
        raise UsageError(f"--image is for HTCondor; under {cluster} load a module or name an interpreter with --python")
    if job.resources.nodes > 1 and cluster != "slurm":
        raise UsageError(f"--nodes {job.resources.nodes}: several machines train together under Slurm only")
    if job.data and "://" not in job.data and not Path(job.data).exists():
        raise UsageError(f"--data_dir {job.data}: there is no such file or folder here")
    return CLUSTERS[cluster](job)


def submit(cluster: str, job: Job) -> int:
    """Hand a job to its scheduler, whose words are printed as they are; `local` runs it here and now.

    Returns:
        The exit code: 0 when it is submitted; with `local` that of the run.

    Raises:
        UsageError: no machine of the pool could ever run it.
        MartenError: no such scheduler here, or it refused.
    """
    command = native_command(cluster, job)
    program = command.words[0]
    if shutil.which(program) is None:
        raise MartenError(
            f"there is no {program} on this machine: log in where jobs of {cluster} are submitted, look at the command"
            " with --dry_run, or run it here with --cluster local"
        )
    if cluster == "htcondor" and not job.image:
        _check_pool(job.resources)
    if cluster == "slurm":
        _check_slurm(command)
    done = subprocess.run(command.words, env={**os.environ, **command.environment}, check=False)
    if cluster == "local":
        return done.returncode
    if done.returncode:
        raise MartenError(f"{program} refused the job (exit {done.returncode}); its own words are above")
    return 0


def _check_slurm(command: Command) -> None:
    """Many a Slurm takes an impossible job and lets it wait for ever: ask when it would start."""
    words = [command.words[0], "--test-only", *command.words[1:]]
    told = subprocess.run(words, env={**os.environ, **command.environment}, capture_output=True, text=True, check=False)
    if told.returncode:
        raise UsageError(f"Slurm could not run this job: {' '.join((told.stdout + told.stderr).split())}")


def _check_pool(resources: Resources) -> None:
    """HTCondor takes any job and lets an impossible one wait for ever: ask whether a machine could run it."""
    cpus = resources.cpus * resources.processes
    wanted = f"TotalSlotCpus >= {cpus} && TotalSlotMemory >= {resources.memory_gb * 1024}"
    if resources.gpus:
        wanted += f" && TotalSlotGPUs >= {resources.gpus}"
    words = ["condor_status", "-limit", "1", "-constraint", wanted, "-af", "Name"]
    told = subprocess.run(words, capture_output=True, text=True, check=False)
    if told.returncode == 0 and not told.stdout.strip():
        raise UsageError(
            f"no machine of this pool has {cpus} processors, {resources.memory_gb} GB and"
            f" {resources.gpus} GPUs: the job would wait for ever. See condor_status -compact"
        )
