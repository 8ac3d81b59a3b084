"""What tests/test_distributed.py runs in several processes: python tests/ranks.py VERB..., once for each rank.

layers          layers that share a batch against the layers that see it whole; prints "equal"
run DATA OUT N  a training by tests.runs.QUICK, which the last process is asked to stop after N batches (0: never)
lose DATA OUT   one in which the last process cannot read its fifth picture
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.distributed as dist
from torch import nn

from marten.batches import Pictures
from marten.cli import Parser, run
from marten.distributed import ALONE, World, find_world, joined
from marten.errors import MISUSED, UsageError
from marten.progress import console
from marten.sharedlayers import share_batch_norm, share_dropout


def network(dropout: float) -> nn.Module:
    torch.manual_seed(3)
    layers = nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.ReLU(), nn.Dropout(dropout), nn.Flatten(), nn.Linear(5 * 36, 2)
    return nn.Sequential(*layers)


def compare_layers(world: World) -> None:
    """A batch of 7 pictures, in one piece and in the processes' shares, through batch norm and dropout."""
    torch.manual_seed(1)
    images = torch.randn(7, 3, 8, 8) * 3 + 40  # a mean far from 0 costs a careless variance its digits
    whole, shared = network(0.4), share_batch_norm(network(0.4), torch.device("cpu"))
    share_dropout(whole, ALONE)
    for dropout in share_dropout(shared, world):
        dropout.whole = 7
    torch.manual_seed(9)
    expected = whole(images)
    expected.square().mean().backward()
    torch.manual_seed(9)
    mine = world.share(images)  # type: ignore[type-var]
    outputs = shared(mine)
    (outputs.square().sum() / expected.numel()).backward()
    torch.testing.assert_close(outputs, world.share(expected))  # type: ignore[type-var]
    for parameter, other in zip(shared.parameters(), whole.parameters(), strict=True):
        dist.all_reduce(parameter.grad)
        torch.testing.assert_close(parameter.grad, other.grad, rtol=1e-4, atol=1e-5)
    for buffer, other in zip(shared.buffers(), whole.buffers(), strict=True):
        torch.testing.assert_close(buffer, other)
    assert list(shared.state_dict()) == list(whole.state_dict())
    torch.testing.assert_close(shared.eval()(images), whole.eval()(images))
    print("equal", flush=True)


def fail_first(world: World) -> None:
    """What the first process cannot do ends all with its exit code, and it alone says why."""

    def refuse() -> None:
        raise UsageError("no")

    try:
        world.first(refuse)
    except UsageError:
        told = "refused"
    except SystemExit as end:
        told = f"ended with {end.code}"
    assert told == ("refused" if world.is_first else f"ended with {MISUSED}")
    assert world.first(lambda: {"said by": world.rank}) == {"said by": 0}


def lose_fifth_picture() -> None:
    read, seen = Pictures.__getitem__, []

    def lose(self: Pictures, place: tuple[int, int]) -> object:
        seen.append(place)
        return "the fifth is gone" if len(seen) == 5 else read(self, place)

    Pictures.__getitem__ = lose  # type: ignore[assignment,method-assign]


def main(verb: str, *words: str) -> int:
    world = find_world()
    console.quiet = not world.is_first
    with joined(world, "cpu"):
        if verb == "layers":
            compare_layers(world)
            fail_first(world)
            return 0
        from tests.runs import run_once

        data, out, times = (*words, "0")[:3]
        is_last = world.rank == world.size - 1
        if verb == "lose" and is_last:
            lose_fifth_picture()
        return run_once(Path(data), Path(out), int(times) if is_last and int(times) else None, world)


if __name__ == "__main__":
    parser = Parser(prog="ranks")
    parser.add_argument("words", nargs="+")
    run(lambda args: main(*args.words), parser)
