"""One job in our words, and what each scheduler calls them: a table per scheduler, and the native command it gives.

Nothing is generated: the command names the files in deployment/ that an expert uses by hand, and sets what they leave
open. No torch is imported here, so that submitting is immediate.
"""

from __future__ import annotations

import os
import runpy
import shlex
import shutil
import subprocess
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from marten.cli import Parser
from marten.errors import MartenError, UsageError
from marten.files import ROOT
from marten.settings import duration_s, settings_from

DEPLOYMENT = ROOT / "deployment"


@dataclass(frozen=True)
class Resources:
    """What one run needs of a machine.

    Attributes:
        cpus: processors.
        gpus: 0 trains on processors.
        memory_gb: main memory.
        disk_gb: the node's own disk; only HTCondor asks for it.
        time_s: longest time in one go; the run saves itself before and goes on afterwards.
        gpu_memory_gb: least memory of each GPU, 0 for any; only HTCondor can ask for it.
    """

    cpus: int = 4
    gpus: int = 1
    memory_gb: int = 16
    disk_gb: int = 15
    time_s: int = 12 * 3600
    gpu_memory_gb: int = 0

    def __post_init__(self) -> None:
        checks = {
            f"--cpus must be at least 1, found {self.cpus}": self.cpus >= 1,
            f"--gpus must be 0 or 1, found {self.gpus}: a run trains on one GPU": self.gpus in (0, 1),
            f"--memory_gb must be at least 1, found {self.memory_gb}": self.memory_gb >= 1,
            f"--disk_gb must be at least 1, found {self.disk_gb}": self.disk_gb >= 1,
            f"--time must be at least 5min, found {self.time_s} s": self.time_s >= 300,
            f"--gpu_memory_gb must not be negative, found {self.gpu_memory_gb}": self.gpu_memory_gb >= 0,
            f"--gpu_memory_gb {self.gpu_memory_gb} needs --gpus 1": self.gpus > 0 or not self.gpu_memory_gb,
        }
        if broken := [message for message, good in checks.items() if not good]:
            raise UsageError("; ".join(broken))


@dataclass(frozen=True)
class Job:
    """One training run, or one per line of a file, before any scheduler's words.

    Attributes:
        flags: words for train_main.py, without --data_dir.
        name: under which the scheduler lists it.
        model_path: state dict that will be written, as train_main.py takes it; "" for its default.
        data: archive or folder; archives are unpacked on the node's own disk.
        resources: of each run.
        runs: file with further flags, one run per line; None for a single run.
        at_once: how many of these runs at the same time; 0 for as many as there is room for.
        image: container with Marten inside, under HTCondor; "" for none.
        python: interpreter on the worker; "" for what job.sh finds.
        native: further words for the scheduler's own command.
    """

    flags: tuple[str, ...]
    name: str = "marten"
    model_path: str = ""
    data: str = ""
    resources: Resources = field(default_factory=Resources)
    runs: Path | None = None
    at_once: int = 0
    image: str = ""
    python: str = ""
    native: tuple[str, ...] = ()

    @property
    def run_count(self) -> int:
        """Runs in all."""
        return len(_lines(self.runs)) if self.runs else 1


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


def add_machine_flags(parser: Parser) -> None:
    """The flags that say what a run needs of a machine, for every command that submits."""
    standard = Resources()
    add = parser.add_argument_group("the machine").add_argument
    add("--cpus", type=int, default=standard.cpus, metavar="N")
    add("--gpus", type=int, default=standard.gpus, metavar="N", help="0 or 1")
    add("--memory_gb", type=int, default=standard.memory_gb, metavar="N")
    add("--disk_gb", type=int, default=standard.disk_gb, metavar="N", help="HTCondor only")
    add("--time", default="12h", metavar="T", help="longest time in one go")
    add("--gpu_memory_gb", type=int, default=0, metavar="N", help="least memory of the GPU, HTCondor only")
    add("--at_once", type=int, default=0, metavar="N", help="of several runs, under Slurm and PBS")
    add("--image", default="", metavar="URL", help="container with Marten inside, under HTCondor")
    add("--python", default="", metavar="PATH", help="interpreter on the machine that trains")
    add("--native", default="", metavar="WORDS", help="for the scheduler's own command: --native=--account=lab")


def job_from_flags(args: Namespace, words: Sequence[str], runs: Path | None, name: str = "") -> Job:
    """A job from parsed machine flags and the words for train_main.py; see `job_from`."""
    resources = Resources(
        cpus=args.cpus,
        gpus=args.gpus,
        memory_gb=args.memory_gb,
        disk_gb=args.disk_gb,
        time_s=int(duration_s(args.time, "--time")),
        gpu_memory_gb=args.gpu_memory_gb,
    )
    rest = {"name": name, "at_once": args.at_once, "image": args.image, "python": args.python}
    return job_from(words, resources=resources, runs=runs, native=tuple(shlex.split(args.native)), **rest)


def job_from(words: Sequence[str], *, resources: Resources, runs: Path | None = None, **rest: object) -> Job:
    """A job that trains as the words say; they are read as train_main.py will read them, for every run.

    Raises:
        UsageError: a setting out of range, or no such file of runs.
        SystemExit: a flag that train_main.py does not know, told on stderr; exit code 2.
    """
    lines = _lines(runs) if runs else [""]
    namespaces = [_parsed([*words, *shlex.split(line)]) for line in lines]
    first = namespaces[0]
    paths = [str(n.model_path) for n in namespaces]
    if len(set(paths)) < len(paths):
        raise UsageError(
            f"two runs of {runs} would write {_repeated(paths) or 'the same model'}: give each --model_path"
        )
    data = first.data_dir if any(word.partition("=")[0] == "--data_dir" for word in words) else ""
    return Job(
        flags=_without(words, "--data_dir"),
        model_path=first.model_path,
        data=data,
        resources=resources,
        runs=runs,
        **{"name": f"marten-{first.conv_net}", **{k: v for k, v in rest.items() if v}},  # type: ignore[arg-type]
    )


def _parsed(words: Sequence[str]) -> Namespace:
    # the program itself says which flags it has; running its file as a module starts nothing
    namespace: Namespace = runpy.run_path(str(ROOT / "train_main.py"))["build_parser"]().parse_args(list(words))
    settings_from(namespace)
    return namespace


def _lines(runs: Path) -> list[str]:
    try:
        lines = runs.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise UsageError(f"--runs {runs}: {error.strerror}") from error
    if not lines or not all(line.strip() for line in lines):
        raise UsageError(f"--runs {runs}: one run per line, and no line empty")
    return lines


def _repeated(paths: list[str]) -> str:
    return next((path for path in paths if path and paths.count(path) > 1), "")


def _without(words: Sequence[str], flag: str) -> tuple[str, ...]:
    kept: list[str] = []
    waiting = iter(words)
    for word in waiting:
        if word == flag:
            next(waiting, None)
        elif not word.startswith(flag + "="):
            kept.append(word)
    return tuple(kept)


def _clock(seconds: int) -> str:
    return f"{seconds // 3600:02}:{seconds // 60 % 60:02}:{seconds % 60:02}"


# ------------------------------------------------------------- from our words to each scheduler's: one table for each

_HTCONDOR: dict[str, Callable[[Resources], str]] = {
    "cpus": lambda r: f"cpus={r.cpus}",
    "gpus": lambda r: f"gpus={r.gpus}",
    "memory_gb": lambda r: f"memory={r.memory_gb}GB",
    "disk_gb": lambda r: f"disk={r.disk_gb}GB",
    "time_s": lambda r: f"checkpoint_interval={min(r.time_s, 3600)}s",
    "gpu_memory_gb": lambda r: f"gpu_memory={r.gpu_memory_gb}GB" if r.gpu_memory_gb else "",
}
_SLURM: dict[str, Callable[[Resources], str]] = {
    "cpus": lambda r: f"--cpus-per-task={r.cpus}",
    "gpus": lambda r: f"--gres=gpu:{r.gpus}" if r.gpus else "--gres=none",
    "memory_gb": lambda r: f"--mem={r.memory_gb}G",
    "time_s": lambda r: f"--time={_clock(r.time_s)}",
}
_PBS: dict[str, Callable[[Resources], str]] = {
    "cpus, gpus, memory_gb": lambda r: (
        f"-l select=1:ncpus={r.cpus}" + (f":ngpus={r.gpus}" if r.gpus else "") + f":mem={r.memory_gb}gb"
    ),
    "time_s": lambda r: f"-l walltime={_clock(r.time_s)}",
}


def _told(table: Mapping[str, Callable[[Resources], str]], resources: Resources) -> list[str]:
    return [words for words in (tell(resources) for tell in table.values()) if words]


def _htcondor(job: Job) -> Command:
    name = job.name.removeprefix("marten-")
    told = [_parsed([*job.flags, *shlex.split(line)]).model_path for line in _lines(job.runs)] if job.runs else []
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
    words = [_quoted(word) for word in _without(job.flags, "--model_path")]
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
    options = [f"--job-name={job.name}", *_told(_SLURM, job.resources)]
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
    file = DEPLOYMENT / "pbs" / "train.pbs"
    # -V and not -v: a value may hold commas and blanks
    words = ["qsub", *options, *array, "-V", str(file)]
    return Command(tuple(words), environment, _files(job, file))


def _local(job: Job) -> Command:
    if job.run_count > 1:
        raise UsageError("--runs with --cluster local: scripts/sweep runs several here, one after the other")
    environment = _environment(job) | {"MARTEN_SCHEDULER": "none"} | ({"MARTEN_INDEX": "1"} if job.runs else {})
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
    wanted = f"TotalSlotCpus >= {resources.cpus} && TotalSlotMemory >= {resources.memory_gb * 1024}"
    if resources.gpus:
        wanted += f" && TotalSlotGPUs >= {resources.gpus}"
    words = ["condor_status", "-limit", "1", "-constraint", wanted, "-af", "Name"]
    told = subprocess.run(words, capture_output=True, text=True, check=False)
    if told.returncode == 0 and not told.stdout.strip():
        raise UsageError(
            f"no machine of this pool has {resources.cpus} processors, {resources.memory_gb} GB and"
            f" {resources.gpus} GPUs: the job would wait for ever. See condor_status -compact"
        )
