"""The optimizer, and its learning rate as a function of the step."""

from __future__ import annotations

import math

import torch
from torch import nn

from kd.run.config import OptimizerConfig
from kd.util.errors import UserError


def make_optimizer(
    config: OptimizerConfig, distiller: nn.Module, device: torch.device, sharded: bool = False
) -> torch.optim.Optimizer:
    """The optimizer of everything in the distiller that is trained; a UserError where that is nothing."""
    parameters = [p for p in distiller.parameters() if p.requires_grad]
    if not parameters:
        raise UserError("nothing is left to train; the whole network is frozen")
    fused = device.type in ("cuda", "cpu") and not sharded  # not every fused optimizer takes what FSDP2 shares out
    arguments = {"lr": config.lr, "weight_decay": config.weight_decay, "fused": fused}
    if config.name == "sgd":
        return torch.optim.SGD(parameters, momentum=config.momentum, nesterov=config.nesterov, **arguments)
    return {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[config.name](parameters, **arguments)


def learning_rate(config: OptimizerConfig, step: int, total: int, per_epoch: int) -> float:
    """The learning rate of a step, counted from 0; nothing about it has to be saved."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.schedule == "cosine":
        done = (step - config.warmup_steps) / max(1, total - config.warmup_steps)
        return config.lr * 0.5 * (1 + math.cos(math.pi * done))
    if config.schedule == "multistep":
        return config.lr * config.gamma ** sum(step // per_epoch >= epoch for epoch in config.milestones)
    return config.lr


def total_steps(config, data) -> int:
    """Optimizer steps of a whole run on a `kd.data.Data`."""
    steps = config.epochs * -(-len(data.train) // data.batch_size)
    return steps if config.max_steps is None else min(steps, config.max_steps)
