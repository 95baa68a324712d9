"""One optimizer step: draw the batch, forward, backward, update."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from kd import keyed
from kd.data import TrainBatches
from kd.outputs import Batch
from kd.teachers import Teachers
from kd.train.engine import Engine
from kd.train.meter import Meter


class Stepper:
    """Takes the steps of a run. Each is a function of the weights, the optimizer's state and its number.

    Args:
        seed: the run's.
        meter: is given the terms.
    """

    def __init__(self, engine: Engine, teachers: Teachers | None, batches: TrainBatches, seed: int, meter: Meter):
        self._engine, self._teachers, self._batches, self._seed, self._meter = engine, teachers, batches, seed, meter
        self._set_seed = _seeder(engine.accelerator.device)

    def __call__(self, step: int, lr: float, wants_norm: bool) -> Tensor | None:
        """Take a step, counted from 0. Returns the gradient's norm where it is wanted."""
        engine, accelerator, learner = self._engine, self._engine.accelerator, self._engine.distiller.learner
        for group in engine.param_groups:
            group["lr"] = lr
        turn = learner.turn(step)
        seed = keyed.key(self._seed, keyed.Purpose.DROPOUT, step, accelerator.process_index) & (2**63 - 1)
        self._set_seed(seed)
        for micro in reversed(range(self._batches.num_micro(step))):
            batch, share = self._batches.read(step, accelerator.device, micro)
            batch.turn = turn
            if not engine.settled:
                engine.settle(partial(self._forward_backward, batch, share, last=True))
                self._set_seed(seed)
            terms = self._forward_backward(batch, share, last=not micro)
            images, labelled = len(batch.labels), batch.labels if batch.labelled is None else batch.labelled
            if share:
                self._meter.add(terms, images, step, engine.distiller.right, len(labelled))
            else:  # an image in place of none, so that all processes take part
                self._meter.add(terms, 0, step)
        norm = engine.update(wants_norm, learner.still(turn))
        with torch.no_grad():
            learner.after_step(step)
        return norm

    def _forward_backward(self, batch: Batch, share: float, last: bool) -> dict[str, Tensor]:
        outputs = {}
        if self._teachers is not None:
            with self._engine.accelerator.autocast():
                outputs = self._teachers(batch)
        return self._engine.forward_backward(batch, outputs, share, last)


def _seeder(device: torch.device) -> Callable[[int], None]:
    """What `torch.manual_seed` does to the generators that a run on this device draws from.

    `torch.manual_seed` itself formats the stack for every kind of device that is not there: milliseconds per step.
    """
    if device.type not in ("cpu", "cuda"):
        return torch.manual_seed
    generators = [torch.default_generator]
    if device.type == "cuda":
        generators.append(torch.cuda.default_generators[torch.cuda.current_device()])

    def set_seed(seed: int) -> None:
        for generator in generators:
            generator.manual_seed(seed)

    return set_seed
