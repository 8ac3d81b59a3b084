"""What learns: a network with its optimizer, one step at a time, and the judge of what it has learnt."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from marten.architectures import Architecture, build_network
from marten.batches import Batch
from marten.devices import Runtime
from marten.distributed import ALONE, World
from marten.metrics import Running
from marten.mixing import mix
from marten.objectives import objective_of
from marten.schedules import learning_rate_factor
from marten.settings import Settings
from marten.sharedlayers import share_batch_norm, share_dropout
from marten.streams import stream
from marten.weights import start_weights
from modelspec import ModelSpec


class Learner:
    """A network in training.

    Args:
        settings: of the run.
        architecture: of the network.
        spec: what will serve; its preprocessing makes the network's input.
        runtime: device and number format.
        origin: of the first weights of a run that goes on: its state brings the weights, so none are looked for.
        world: the processes that learn together, each from its share of every batch.

    Attributes:
        factor: gives the factor on the base learning rates of a step, from its number and how many there are.
        network: on the device, in channels_last memory.
        origin: where its first weights came from.

    Raises:
        TrainingError: first weights out of reach or of another network.
    """

    def __init__(
        self,
        settings: Settings,
        architecture: Architecture,
        spec: ModelSpec,
        runtime: Runtime,
        origin: str | None = None,
        world: World = ALONE,
    ) -> None:
        self._settings = settings
        self._world = world
        self._head = architecture.head
        self._spec = spec
        self._runtime = runtime
        torch.manual_seed(stream(settings.seed, "weights"))
        network = build_network(spec.arch, spec.arch_args)
        self.origin = origin or start_weights(network, architecture, settings.weights)
        if world.size > 1 and settings.batch_norm == "shared":
            network = share_batch_norm(network, runtime.device)
        # GPUs draw their masks otherwise, so that there each process draws its own
        self._dropouts = share_dropout(network, world) if runtime.device.type == "cpu" else []
        self.network = network.to(runtime.device).to(memory_format=torch.channels_last)
        named = list(network.named_parameters())
        self._backbone = [p for name, p in named if not name.startswith(self._head)]
        head = [p for name, p in named if name.startswith(self._head)]
        self._base_lr = (settings.lr[0], settings.lr[-1])
        self.factor: Callable[[int, int], float] = self._scheduled
        self._optimizer = torch.optim.AdamW(
            [{"params": head}, {"params": self._backbone}],
            lr=settings.lr[0],
            betas=settings.betas,
            weight_decay=settings.weight_decay,
        )
        self._scaler = torch.amp.GradScaler(runtime.device.type, enabled=runtime.precision == "fp16")
        self._average = None
        if settings.ema:
            average = get_ema_multi_avg_fn(settings.ema)  # type: ignore[no-untyped-call]
            self._average = AveragedModel(self.network, multi_avg_fn=average, use_buffers=True)
        self._objective = objective_of(spec, settings.label_smoothing, settings.loss)
        self._forward = self._in_parallel() if world.size > 1 else self.network

    def _in_parallel(self) -> nn.Module:
        # "unused" are the parameters of a backbone held still. It also keeps torch from sorting gradients anew after
        # the first step: sums would then be made in another order in a run that was resumed
        return DistributedDataParallel(self.network, find_unused_parameters=True)

    @property
    def candidate(self) -> nn.Module:
        """The network that is validated and kept: the running average where one is kept."""
        return self.network if self._average is None else self._average.module

    @property
    def lr(self) -> float:
        """Learning rate of the head in the last step."""
        return float(self._optimizer.param_groups[0]["lr"])

    @property
    def rates(self) -> tuple[float, float]:
        """Learning rates of head and backbone that the last step really used; 0 for a backbone held still."""
        learns = any(parameter.requires_grad for parameter in self._backbone)
        return self.lr, float(self._optimizer.param_groups[1]["lr"]) if learns else 0.0

    def _scheduled(self, step: int, steps: int) -> float:
        settings = self._settings
        head_steps = steps * int(settings.freeze) // settings.epochs if settings.freeze.isdecimal() else 0
        return learning_rate_factor(settings.schedule, step, steps, head_steps)

    def begin_epoch(self, epoch: int) -> None:
        """Let the backbone learn or hold it still, batch norm included, as --freeze says for this epoch."""
        freeze = self._settings.freeze
        frozen = freeze == "backbone" or (freeze.isdecimal() and epoch < int(freeze))
        for parameter in self._backbone:
            parameter.requires_grad_(not frozen)
        self.network.train()
        if frozen:
            for name, module in self.network.named_modules():
                if isinstance(module, nn.BatchNorm2d | nn.SyncBatchNorm) and not name.startswith(self._head):
                    module.eval()

    def learn(
        self, pixels_NHWC: torch.Tensor, labels_N: torch.Tensor, whole: int, step: int, steps: int, seen: Running
    ) -> None:
        """Take one step of the optimizer.

        Args:
            pixels_NHWC: uint8, shape (batch, height, width, 3): this process's share of a batch.
            labels_N: int64, shape (batch,); or scores, see `marten.batches.Batches.epoch`.
            whole: pictures in the whole batch.
            step: its number in the whole run, from 0.
            steps: how many the whole run has.
            seen: gets the losses and hits of this batch.
        """
        device = self._runtime.device
        # dropout and the like draw from here: a function of the place in the run, so nothing of it is saved
        own = () if self._dropouts or self._world.is_first else (self._world.rank,)
        torch.manual_seed(stream(self._settings.seed, "step", step, *own))
        for dropout in self._dropouts:
            dropout.whole = whole
        factor = self.factor(step, steps)
        for group, base in zip(self._optimizer.param_groups, self._base_lr, strict=True):
            group["lr"] = base * factor
        images_NCHW = self._spec.preprocess.normalize(pixels_NHWC.to(device, non_blocking=True))
        labels_N = labels_N.to(device, non_blocking=True)
        images_NCHW, others_N, share = mix(images_NCHW, labels_N, self._settings.mix, self._settings.seed, step)
        with self._runtime.autocast():
            logits_NK = self._forward(images_NCHW)
        losses_N = self._objective.losses(logits_NK, labels_N, training=True)
        worth_N = self._objective.worth(logits_NK, labels_N)
        if share < 1:
            losses_N = share * losses_N + (1 - share) * self._objective.losses(logits_NK, others_N, training=True)
            worth_N = share * worth_N + (1 - share) * self._objective.worth(logits_NK, others_N)
        self._optimizer.zero_grad()
        is_shared = len(labels_N) < whole
        # gradients become the mean over the processes, whose shares may differ by a picture
        loss = losses_N.sum() * (self._world.size / whole) if is_shared else losses_N.mean()
        self._scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
        self._scaler.step(self._optimizer)
        self._scaler.update()
        if self._average is not None:
            self._average.update_parameters(self.network)
        if is_shared or self._world.is_first:
            seen.add(losses_N, worth_N)

    @torch.inference_mode()
    def judge(
        self,
        network: nn.Module,
        batches: Iterable[Batch],
        runtime: Runtime,
        stop: Callable[[], object] = lambda: False,
    ) -> Running | None:
        """Loss and accuracy of a network on held-out batches, through the transform that serves.

        None when `stop`, asked before each batch, says so. Every picture counts once, whoever looked at it.
        """
        network.eval()
        self._world.spread(network)
        seen = Running(runtime.device)
        for pixels_NHWC, labels_N, whole in batches:
            if stop():
                return None
            if len(labels_N) == whole and not self._world.is_first:
                continue
            images_NCHW = self._spec.preprocess.normalize(pixels_NHWC.to(runtime.device))
            labels_N = labels_N.to(runtime.device)
            with runtime.autocast():
                logits_NK = self._spec.logits(network, images_NCHW)
            losses_N = self._objective.losses(logits_NK, labels_N, training=False)
            seen.add(losses_N, self._objective.worth(logits_NK, labels_N))
        return seen.together(self._world)

    def state(self) -> dict[str, Any]:
        """Everything of it that the rest of a run depends on: tensors and plain Python."""
        return {
            "network": self.network.state_dict(),
            "average": None if self._average is None else self._average.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "scaler": self._scaler.state_dict(),
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go back to a state that `state` gave."""
        self.network.load_state_dict(state["network"])
        if self._average is not None:
            self._average.load_state_dict(state["average"])
        self._optimizer.load_state_dict(state["optimizer"])
        self._scaler.load_state_dict(state["scaler"])
