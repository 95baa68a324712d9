"""The optimizer, and its learning rate as a function of the step."""

from __future__ import annotations

import importlib
import inspect
import math
from collections.abc import Sequence

import torch
from torch import nn

from kd.run.config import OptimizerConfig
from kd.train.checkpoint import load_optimizer_tensors, optimizer_tensors
from kd.util.errors import UserError, unknown
from kd.util.own_code import blamed, described

BUILT_IN = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}


def make_optimizer(
    config: OptimizerConfig, distiller: nn.Module, device: torch.device, sharded: bool = False
) -> torch.optim.Optimizer:
    """The optimizer of everything in the distiller that is trained; a UserError where that is nothing."""
    fused = device.type in ("cuda", "cpu") and not sharded  # not every fused optimizer takes what FSDP2 shares out
    return _make(config, _trained(distiller), fused)


def try_optimizer(config: OptimizerConfig, distiller: nn.Module, shared_out: bool) -> None:
    """Take steps on tensors of two numbers a side, one for each number of dimensions that a trained parameter has.

    Args:
        shared_out: whether FSDP2 or DeepSpeed shares out the optimizer's state.

    Raises:
        UserError: it cannot be made with these arguments, cannot step on dense gradients alone (LBFGS, SparseAdam), or
            would not resume exactly from the tensors of its state, which is what a checkpoint holds.
    """
    if shared_out and config.name not in BUILT_IN:
        raise UserError(
            f"optimizer.name {config.name!r}: FSDP2 and DeepSpeed share out the state of sgd, adam and adamw alone; "
            f"name one of these, or use DistributedDataParallel"
        )
    sizes = sorted({parameter.dim() for parameter in _trained(distiller)})
    first, second = ([nn.Parameter(torch.ones((2,) * size)) for size in sizes] for _ in range(2))
    try:
        with blamed(f"optimizer.name {config.name!r}"):
            whole = _make(config, first, fused=False)
            _take_steps(whole, first)
            resumed = _make(config, second, fused=False)
            for parameter, value in zip(second, first, strict=True):
                parameter.data.copy_(value.data)
            load_optimizer_tensors(resumed, {name: value.clone() for name, value in optimizer_tensors(whole).items()})
            _take_steps(whole, first)
            _take_steps(resumed, second)
    except (TypeError, ValueError, RuntimeError, AttributeError, LookupError, AssertionError) as error:
        raise UserError(
            f"optimizer.name {config.name!r} with args {config.args} cannot be used: {described(error)}"
        ) from error
    if not all(torch.equal(one, other) for one, other in zip(first, second, strict=True)):
        raise UserError(
            f"optimizer.name {config.name!r} does not resume exactly: a checkpoint keeps the tensors in its `state`, "
            f"and it remembers something else; keep that as a tensor, or name another optimizer"
        )


def _take_steps(optimizer: torch.optim.Optimizer, parameters: Sequence[nn.Parameter]) -> None:
    for size in (0.5, -0.25, 2.0):
        for parameter in parameters:
            parameter.grad = torch.full_like(parameter, size)
        optimizer.step()


def _trained(distiller: nn.Module) -> list[nn.Parameter]:
    parameters = [parameter for parameter in distiller.parameters() if parameter.requires_grad]
    if not parameters:
        raise UserError("nothing is left to train; the whole network is frozen")
    return parameters


def _make(config: OptimizerConfig, parameters: list[nn.Parameter], fused: bool) -> torch.optim.Optimizer:
    optimizer = _class_of(config.name)
    known = inspect.signature(optimizer).parameters
    arguments = {"lr": config.lr}
    if "weight_decay" in known or config.weight_decay:  # its own default is not ours
        arguments["weight_decay"] = config.weight_decay
    if config.name in BUILT_IN and not config.args.get("foreach"):  # torch takes one of the two
        arguments["fused"] = fused
    if config.name == "sgd":
        arguments |= {"momentum": config.momentum, "nesterov": config.nesterov}
    arguments |= config.args
    wrong = [name for name in arguments if name not in known]
    if wrong and not any(parameter.kind is parameter.VAR_KEYWORD for parameter in known.values()):
        raise unknown(f"argument of {optimizer.__name__}", wrong[0], set(known) - {"params"})
    groups = parameters
    if config.weight_decay and not config.decay_norms_and_biases:
        decayed = [parameter for parameter in parameters if parameter.dim() > 1]
        others = [parameter for parameter in parameters if parameter.dim() <= 1]
        groups = [{"params": decayed}] * bool(decayed) + [{"params": others, "weight_decay": 0.0}] * bool(others)
    return optimizer(groups, **arguments)


def _class_of(name: str) -> type[torch.optim.Optimizer]:
    """The optimizer of a name or import path."""
    if name in BUILT_IN:
        return BUILT_IN[name]
    path, _, attribute = name.rpartition(".")
    try:
        with blamed(f"cannot import the optimizer {name!r}"):
            module = importlib.import_module(path)
    except (ImportError, ValueError) as error:
        raise UserError(f"cannot import the optimizer {name!r}: {error}") from None
    found = {
        key: value
        for key, value in vars(module).items()
        if inspect.isclass(value) and issubclass(value, torch.optim.Optimizer) and value is not torch.optim.Optimizer
    }
    if attribute not in found:
        raise unknown("optimizer", name, [*BUILT_IN, *(f"{path}.{key}" for key in found)])
    return found[attribute]


def learning_rate(config: OptimizerConfig, step: int, total: int, per_epoch: int) -> float:
    """The learning rate of a step, counted from 0; nothing about it has to be saved."""
    warmup = config.warmup_steps or round(config.warmup_epochs * per_epoch)
    if step < warmup:
        return config.lr * (step + 1) / warmup
    if config.schedule == "cosine":
        done = (step - warmup) / max(1, total - warmup)
        return config.min_lr + (config.lr - config.min_lr) * 0.5 * (1 + math.cos(math.pi * done))
    if config.schedule == "multistep":
        return config.lr * config.gamma ** sum(step // per_epoch >= epoch for epoch in config.milestones)
    return config.lr


def total_steps(config, data) -> int:
    """Optimizer steps of a whole run on a `kd.data.Data`."""
    steps = config.epochs * -(-len(data.train) // data.batch_size)
    return steps if config.max_steps is None else min(steps, config.max_steps)
