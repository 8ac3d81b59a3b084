"""Several processes as one run: who each of them is, and the few words by which they stay of one mind.

torchrun and srun start the same program many times. Each process takes its share of every batch, so that all of them
together do what one would have done; what only one may do (looking at the pictures, writing files) the first does,
and tells the others. Without a launcher there is one process, and everything here is free.
"""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist

from marten.datasets import PictureSet
from marten.errors import FAILED, MISUSED, MartenError, TrainingError, UsageError
from marten.files import available_cpus

T = TypeVar("T")

_LONGEST_SILENCE = timedelta(hours=2)
"""Within which the first process must have looked at all pictures; one that has died is noticed at once."""
_LOST = re.compile(r"gloo|Connection (closed|reset|refused)|Broken pipe|NCCL|TCPStore", re.IGNORECASE)


@dataclass(frozen=True)
class World:
    """The processes of one run, as one of them sees it.

    Attributes:
        rank: its number, from 0.
        size: how many there are.
        local_rank: its number among those of this machine.
        local_size: how many this machine has.
        own_cpus: whether the launcher gave each process its own processors, as srun does.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    own_cpus: bool = False

    @property
    def is_first(self) -> bool:
        """Whether this process speaks and writes for all."""
        return self.rank == 0

    @property
    def cpus(self) -> int:
        """Processors for this process."""
        return available_cpus() if self.own_cpus else max(1, available_cpus() // self.local_size)

    def share(self, batch: Sequence[T]) -> Sequence[T]:
        """Give this process's part of a batch; all of one too small to be shared, which everyone then learns."""
        return batch[self.rank :: self.size] if len(batch) >= self.size else batch

    def first(self, action: Callable[[], T]) -> T:
        """Let the first process act, and give its result to all; where it fails, all end with its exit code.

        Raises:
            MartenError: as `action`, in the first process, which alone tells it.
            SystemExit: in the others.
        """
        if self.size == 1:
            return action()
        told: list[object] = [None, FAILED]
        try:
            if self.is_first:
                told = [action(), None]
        except MartenError as error:
            told = [None, MISUSED if isinstance(error, UsageError) else FAILED]
            raise
        finally:
            dist.broadcast_object_list(told, src=0)
        if told[1] is not None:
            sys.exit(told[1])  # type: ignore[arg-type]
        return told[0]  # type: ignore[return-value]

    def largest(self, *numbers: int) -> list[int]:
        """The largest that any process says, for each of the numbers."""
        if self.size == 1:
            return list(numbers)
        said = torch.tensor(numbers)
        dist.all_reduce(said, dist.ReduceOp.MAX)
        return [int(number) for number in said.tolist()]

    def gather(self, thing: T) -> list[T]:
        """What each process has, in the order of their ranks."""
        if self.size == 1:
            return [thing]
        things: list[T | None] = [None] * self.size
        dist.all_gather_object(things, thing)
        return things  # type: ignore[return-value]

    def spread(self, network: torch.nn.Module) -> None:
        """Give everyone the first process's buffers: batch norm's running statistics differ, and one set counts."""
        for buffer in network.buffers() if self.size > 1 else ():
            dist.broadcast(buffer, src=0)


ALONE = World()


def find_world(environment: Mapping[str, str] = os.environ) -> World:
    """Who the launcher says we are: torchrun, or srun, or nobody.

    Raises:
        UsageError: the launcher's variables are no numbers.
    """
    try:
        if "RANK" in environment and "WORLD_SIZE" in environment:
            rank, size = int(environment["RANK"]), int(environment["WORLD_SIZE"])
            local = int(environment.get("LOCAL_RANK", 0)), int(environment.get("LOCAL_WORLD_SIZE", 1))
            return World(rank, size, *local)
        # of a step of srun; SLURM_NTASKS stands in the batch script's environment too, which is one process
        if (size := int(environment.get("SLURM_STEP_NUM_TASKS", 1))) > 1:
            rank, local_rank = int(environment["SLURM_PROCID"]), int(environment["SLURM_LOCALID"])
            per_node = environment.get("SLURM_STEP_TASKS_PER_NODE", environment.get("SLURM_TASKS_PER_NODE", "1"))
            return World(rank, size, local_rank, _tasks_here(per_node, environment), own_cpus=True)
    except (KeyError, ValueError) as error:
        raise UsageError(f"the variables of torchrun or srun make no sense here: {error}") from error
    return ALONE


def _tasks_here(per_node: str, environment: Mapping[str, str]) -> int:
    """Of Slurm's "2(x3),1", the tasks on this node."""
    counts: list[int] = []
    for part in per_node.split(","):
        count, _, times = part.partition("(x")
        counts += [int(count)] * int(times.rstrip(")") or 1)
    return counts[min(int(environment.get("SLURM_NODEID", 0)), len(counts) - 1)]


@contextlib.contextmanager
def joined(world: World, device: str) -> Iterator[None]:
    """Meet the other processes; within it they can talk.

    Processors talk by gloo, GPUs by nccl.

    Raises:
        TrainingError: they cannot be met, or one of them ended in between.
    """
    if world.size == 1:
        yield
        return
    if "MASTER_ADDR" not in os.environ and "SLURM_STEP_NODELIST" in os.environ:
        _meet_by_slurm()
    backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
    try:
        dist.init_process_group(backend, rank=world.rank, world_size=world.size, timeout=_LONGEST_SILENCE)
    except (RuntimeError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise TrainingError(
            f"process {world.rank} cannot meet the other {world.size - 1} at {os.environ.get('MASTER_ADDR')}:"
            f"{os.environ.get('MASTER_PORT')}: {reason}"
        ) from error
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, dist.DistError) or _LOST.search(str(error)):
            raise TrainingError(
                f"process {world.rank} of {world.size} has lost the others: one of them ended, see its words."
                " The same command goes on from the last checkpoint"
            ) from error
        raise
    dist.destroy_process_group()


def exit_code(code: int, world: World) -> int:
    """The exit code to end with. In a job, job.sh reads the real one from a file: launchers know 0 and failure."""
    place = os.environ.get("MARTEN_EXIT")
    if not place or world.size == 1:
        return code
    if world.is_first:
        Path(place).write_text(f"{code}\n", encoding="ascii")
    return 0


def _meet_by_slurm() -> None:
    """Say where the processes of a step meet: at the first node, at a port that follows from the job's number."""
    nodes = _asked("scontrol", "show", "hostnames", os.environ["SLURM_STEP_NODELIST"]).split()
    # a node's name need not be one that the network knows; its address always is
    address = re.search(r"NodeAddr=(\S+)", _asked("scontrol", "show", "node", nodes[0]))
    os.environ["MASTER_ADDR"] = address[1] if address else nodes[0]
    # below the range from which systems give out ports, and another for each job of an array
    os.environ["MASTER_PORT"] = str(10_000 + int(os.environ["SLURM_JOB_ID"]) % 10_000)


def _asked(*words: str) -> str:
    try:
        return subprocess.run(words, capture_output=True, text=True, check=True, timeout=60).stdout
    except (OSError, subprocess.SubprocessError) as error:
        raise TrainingError(
            f"cannot ask Slurm where the processes are to meet ({error}): set MASTER_ADDR and MASTER_PORT"
        ) from error


def moved(pictures: PictureSet, there: Path, here: Path) -> PictureSet:
    """Pictures that another process found below `there`, as they lie below `here` on this machine."""
    if there == here:
        return pictures

    def place(path: Path) -> Path:
        base = there if there in path.parents or path == there else there.parent  # of a table, the folder around it
        return (here if base == there else here.parent) / path.relative_to(base) if base in path.parents else path

    samples = tuple(replace(sample, path=place(sample.path)) for sample in pictures.samples)
    return replace(pictures, root=here if pictures.root == there else place(pictures.root), samples=samples)
