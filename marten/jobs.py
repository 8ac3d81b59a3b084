"""One training job before any scheduler's words: what it runs, and what it needs of a machine.

No torch is imported here, so that submitting is immediate.
"""

from __future__ import annotations

import runpy
import shlex
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from marten.cli import Parser, underscored
from marten.errors import UsageError
from marten.files import ROOT
from marten.settings import duration_s, settings_from


@dataclass(frozen=True)
class Resources:
    """What one run needs.

    Attributes:
        cpus: processors of each process; there is one for each GPU, or one on a machine without.
        gpus: of each machine; 0 trains on processors.
        nodes: machines that train together.
        memory_gb: main memory of each machine.
        disk_gb: the node's own disk; only HTCondor asks for it.
        time_s: longest time in one go; the run saves itself before and goes on afterwards.
        gpu_memory_gb: least memory of each GPU, 0 for any; only HTCondor can ask for it.
    """

    cpus: int = 4
    gpus: int = 1
    nodes: int = 1
    memory_gb: int = 16
    disk_gb: int = 15
    time_s: int = 12 * 3600
    gpu_memory_gb: int = 0

    def __post_init__(self) -> None:
        checks = {
            f"--cpus must be at least 1, found {self.cpus}": self.cpus >= 1,
            f"--gpus must not be negative, found {self.gpus}": self.gpus >= 0,
            f"--nodes must be at least 1, found {self.nodes}": self.nodes >= 1,
            f"--memory_gb must be at least 1, found {self.memory_gb}": self.memory_gb >= 1,
            f"--disk_gb must be at least 1, found {self.disk_gb}": self.disk_gb >= 1,
            f"--time must be at least 5min, found {self.time_s} s": self.time_s >= 300,
            f"--gpu_memory_gb must not be negative, found {self.gpu_memory_gb}": self.gpu_memory_gb >= 0,
            f"--gpu_memory_gb {self.gpu_memory_gb} needs --gpus 1": self.gpus > 0 or not self.gpu_memory_gb,
        }
        if broken := [message for message, good in checks.items() if not good]:
            raise UsageError("; ".join(broken))

    @property
    def processes(self) -> int:
        """Processes on each machine that train together."""
        return max(1, self.gpus)


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
        return len(lines_of(self.runs)) if self.runs else 1


def add_machine_flags(parser: Parser) -> None:
    """The flags that say what a run needs of a machine, for every command that submits."""
    standard = Resources()
    add = parser.add_argument_group("the machine").add_argument
    add("--cpus", type=int, default=standard.cpus, metavar="N", help="of each process; there is one for each GPU")
    add("--gpus", type=int, default=standard.gpus, metavar="N", help="of each machine; 0 trains on processors")
    add("--nodes", type=int, default=standard.nodes, metavar="N", help="machines that train together, Slurm only")
    add("--memory_gb", type=int, default=standard.memory_gb, metavar="N", help="of each machine")
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
        nodes=args.nodes,
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
    words = [underscored(word) for word in words]
    lines = lines_of(runs) if runs else [""]
    namespaces = [parsed([*words, *shlex.split(line)]) for line in lines]
    first = namespaces[0]
    together, least = resources.nodes * resources.processes, min(n.batch_size for n in namespaces)
    if least < together:
        raise UsageError(f"--batch_size {least} cannot be shared by {together} processes")
    paths = [str(n.model_path) for n in namespaces]
    if len(set(paths)) < len(paths):
        raise UsageError(
            f"two runs of {runs} would write {_repeated(paths) or 'the same model'}: give each --model_path"
        )
    data = first.data_dir if any(word.partition("=")[0] == "--data_dir" for word in words) else ""
    return Job(
        flags=without(words, "--data_dir"),
        model_path=first.model_path,
        data=data,
        resources=resources,
        runs=runs,
        **{"name": f"marten-{first.conv_net}", **{k: v for k, v in rest.items() if v}},  # type: ignore[arg-type]
    )


def parsed(words: Sequence[str]) -> Namespace:
    """Words as train_main.py will read them.

    Raises:
        UsageError: a setting out of range.
        SystemExit: a flag that it does not know, told on stderr; exit code 2.
    """
    # the program itself says which flags it has; running its file as a module starts nothing
    namespace: Namespace = runpy.run_path(str(ROOT / "train_main.py"))["build_parser"]().parse_args(list(words))
    settings_from(namespace)
    return namespace


def lines_of(runs: Path) -> list[str]:
    """The runs of a file, one line of flags each.

    Raises:
        UsageError: it cannot be read, is empty, or has an empty line.
    """
    try:
        lines = runs.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise UsageError(f"--runs {runs}: {error.strerror}") from error
    if not lines or not all(line.strip() for line in lines):
        raise UsageError(f"--runs {runs}: one run per line, and no line empty")
    return lines


def _repeated(paths: list[str]) -> str:
    return next((path for path in paths if path and paths.count(path) > 1), "")


def without(words: Sequence[str], flag: str) -> tuple[str, ...]:
    """Words without a flag and its value."""
    kept: list[str] = []
    waiting = iter(words)
    for word in waiting:
        if word == flag:
            next(waiting, None)
        elif not word.startswith(flag + "="):
            kept.append(word)
    return tuple(kept)
