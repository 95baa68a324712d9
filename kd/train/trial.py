"""What can fail on the first batch is tried before a run begins: own networks and losses mostly."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from kd.data import Data, TrainBatches
from kd.outputs import Batch
from kd.train import zero
from kd.train.optim import try_optimizer
from kd.util.errors import UserError, say
from kd.util.own_code import blamed, described
from kd.util.tensors import buffers_put_back

NUM_IMAGES = 4


def scalar(name: str, value: object, batch: Batch) -> Tensor:
    """A loss's value as a scalar; one value per image, (B,), is averaged over this process's images.

    Raises:
        UserError: it is something else.
    """
    if not isinstance(value, Tensor):
        raise UserError(f"losses: {name} returns {type(value).__name__}; let it return a scalar tensor")
    if value.shape not in ((), (1,), (len(batch.labels),)) or not value.is_floating_point():
        raise UserError(
            f"losses: {name} returns a tensor of shape {tuple(value.shape)} and {value.dtype}; let it return a scalar, "
            f"or one value per image, as floats"
        )
    return value.mean() if value.dim() else value


def try_first_batch(distiller: nn.Module, teachers: Callable | None, data: Data, config, accelerator) -> None:
    """Take a few training images forward and backward, and leave everything as it was: no byte of the run changes.

    Args:
        distiller: moved to the accelerator's device; where FSDP2 will share it out, for the trial alone.
        teachers: gives their outputs for a batch, by name.

    Raises:
        UserError: the network or a loss of the user's own fails, or a loss cannot be trained on; see `try_optimizer`.
    """
    try_optimizer(config.optimizer, distiller, accelerator.is_fsdp2 or zero.wanted(accelerator.num_processes))
    device, what = accelerator.device, f"a trial on {NUM_IMAGES} training images failed"
    home = next(distiller.parameters()).device if accelerator.is_fsdp2 else device
    batches = TrainBatches(data.train, NUM_IMAGES, config.seed, 0, 1, data.views, 1, len(data.classes))
    try:
        with _unchanged(distiller.to(device).train()), blamed(what):
            batch, _ = batches.read(0, device)
            batch.turn = distiller.learner.turn(0)
            with accelerator.autocast():
                terms = distiller(batch, teachers(batch) if teachers is not None else {})
            for name, term in terms.items():
                if not term.detach().isfinite():
                    raise UserError(
                        f"losses: {name} is {term.item()} on the first images, before any step; look at its formula "
                        f"and at what the network gives"
                    )
            sum(terms.values()).backward()
    except (TypeError, AttributeError, KeyError, RuntimeError) as error:  # such as a forward with other arguments
        if isinstance(error, torch.OutOfMemoryError) and accelerator.is_fsdp2:
            say("note: what is trained does not fit one device whole, so that nothing is tried before the first step")
            return
        packages = {type(module).__module__.partition(".")[0] for module in distiller.modules()}
        if isinstance(error, torch.OutOfMemoryError) or packages <= {"kd", "torch", "torchvision"}:
            raise
        raise UserError(f"{what}, in a network or loss of your own: {described(error)}") from error
    finally:
        batches.close()
        distiller.to(home)


@contextmanager
def _unchanged(module: nn.Module) -> Iterator[None]:
    """Put back attributes, buffers and torch's generators at the end, and drop gradients."""
    attributes = [(part, dict(vars(part)), dict(part.named_buffers(recurse=False))) for part in module.modules()]
    devices = {parameter.device.index for parameter in module.parameters() if parameter.device.type == "cuda"}
    with buffers_put_back(module):
        try:
            with torch.random.fork_rng(devices=devices):
                yield
        finally:
            for part, own, buffers in attributes:
                vars(part).clear()
                vars(part).update(own)
                for name, buffer in buffers.items():  # another tensor may have taken its place
                    setattr(part, name, buffer)
            module.zero_grad()
