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


def take_step(
    engine: Engine, teachers: Teachers | None, batches: TrainBatches, meter: Meter, seed: int, step: int, logs: bool
) -> Tensor | None:
    """Take a step, counted from 0: a function of the weights, the optimizer's state, the run's seed and its number.

    Returns:
        The gradient's norm where the step `logs`.
    """
    device, learner = engine.accelerator.device, engine.distiller.learner
    turn = learner.turn(step)
    draws = keyed.key(seed, keyed.Purpose.DROPOUT, step, engine.accelerator.process_index) & (2**63 - 1)
    _seed(device, draws)
    for micro in reversed(range(batches.num_micro(step))):
        batch, share = batches.read(step, device, micro)
        batch.turn = turn
        forward_backward = partial(_forward_backward, engine, teachers, batch, share)
        if not engine.settled:
            engine.settle(partial(forward_backward, last=True))
            _seed(device, draws)
        terms = forward_backward(last=not micro)
        labelled = batch.labels if batch.labelled is None else batch.labelled
        # a process without images has one in place of none, so that all take part
        meter.add(terms, len(batch.labels) if share else 0, step, engine.distiller.right, len(labelled))
    norm = engine.update(logs, learner.still(turn))
    with torch.no_grad():
        learner.after_step(step)
    return norm


def _forward_backward(
    engine: Engine, teachers: Teachers | None, batch: Batch, share: float, last: bool
) -> dict[str, Tensor]:
    with engine.accelerator.autocast():
        outputs = {} if teachers is None else teachers(batch)
    return engine.forward_backward(batch, outputs, share, last)


def _seed(device: torch.device, seed: int) -> None:
    """What `torch.manual_seed` does to the generators that a run on this device draws from.

    `torch.manual_seed` itself formats the stack for every kind of device that is not there: milliseconds per step.
    """
    torch.default_generator.manual_seed(seed)
    if device.type != "cpu":
        torch.get_device_module(device).manual_seed(seed)
