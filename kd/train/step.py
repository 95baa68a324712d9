"""One optimizer step: draw the batch, forward, backward, update."""

from __future__ import annotations

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
    """Takes the steps of a run. Each is a function of the weights, the optimizer's state, the seed and its number."""

    def __init__(self, engine: Engine, teachers: Teachers | None, batches: TrainBatches, seed: int, meter: Meter):
        self._engine, self._teachers, self._batches, self._seed, self._meter = engine, teachers, batches, seed, meter

    def __call__(self, step: int, lr: float, wants_norm: bool) -> Tensor | None:
        """Take a step, counted from 0. Returns the gradient's norm where it is wanted."""
        engine, learner = self._engine, self._engine.distiller.learner
        device, process = engine.accelerator.device, engine.accelerator.process_index
        for group in engine.optimizer.param_groups:
            group["lr"] = lr
        turn = learner.turn(step)
        seed = keyed.key(self._seed, keyed.Purpose.DROPOUT, step, process) & (2**63 - 1)
        _seed(device, seed)
        for micro in reversed(range(self._batches.num_micro(step))):
            batch, share = self._batches.read(step, device, micro)
            batch.turn = turn
            if not engine.settled:
                engine.settle(partial(self._forward_backward, batch, share, last=True))
                _seed(device, seed)
            terms = self._forward_backward(batch, share, last=not micro)
            self._meter.add(terms, len(batch.labels) if share else 0, step)
        norm = engine.update(wants_norm, learner.still(turn))
        with torch.no_grad():
            learner.after_step(step)
        return norm

    def _forward_backward(self, batch: Batch, share: float, last: bool) -> dict[str, Tensor]:
        with self._engine.accelerator.autocast():
            outputs = {} if self._teachers is None else self._teachers(batch)
        return self._engine.forward_backward(batch, outputs, share, last)


def _seed(device: torch.device, seed: int) -> None:
    """What `torch.manual_seed` does to the generators that a run on this device draws from.

    `torch.manual_seed` itself formats the stack for every kind of device that is not there: milliseconds per step.
    """
    torch.default_generator.manual_seed(seed)
    if device.type != "cpu":
        torch.get_device_module(device).manual_seed(seed)
