"""Learning rates as functions of the step, any optimizer by import path, no weight decay on norms and biases."""

from __future__ import annotations

import json
import math

import children
import pytest
import torch
from conftest import UNEVEN, assert_one_line, interrupted_at
from test_resume import assert_same_run
from test_sharded import ENGINES
from torch import nn

from kd.run.config import OptimizerConfig
from kd.train.optim import learning_rate, make_optimizer, try_optimizer
from kd.util.errors import UserError

CPU = torch.device("cpu")
RUN = (*UNEVEN, "--log_every", 3, "--checkpoint_every", 2, "--report_to", "none")
NO_DECAY = ("--optimizer.weight_decay", 0.1, "--optimizer.decay_norms_and_biases", "false", "--model", "resnet8")

# Learning rates


def test_warm_up_in_epochs_is_the_same_in_steps():
    for schedule in ("constant", "cosine", "multistep"):
        rates = [
            [learning_rate(OptimizerConfig(schedule=schedule, milestones=[3], **more), s, 40, 8) for s in range(40)]
            for more in ({"warmup_epochs": 1.5}, {"warmup_steps": 12}, {})
        ]
        assert rates[0] == rates[1] != rates[2]
        assert rates[0][:12] == [1e-3 * (step + 1) / 12 for step in range(12)]


def test_a_cosine_falls_to_its_floor():
    config = OptimizerConfig(lr=0.1, schedule="cosine", min_lr=0.01)
    rates = [learning_rate(config, step, 50, 10) for step in range(51)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[50] == pytest.approx(0.01)
    for step, rate in enumerate(rates):
        assert rate == pytest.approx(0.01 + 0.5 * (0.1 - 0.01) * (1 + math.cos(math.pi * step / 50)))
    plain = OptimizerConfig(lr=0.3, schedule="cosine")
    for step in range(50):  # to the byte what it was before there was a floor
        assert learning_rate(plain, step, 50, 10) == 0.3 * 0.5 * (1 + math.cos(math.pi * (step / 50)))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            ("--optimizer.warmup_steps", 3, "--optimizer.warmup_epochs", 1),
            ("warmup_steps and optimizer.warmup_epochs",),
        ),
        (("--optimizer.warmup_epochs", -1), ("optimizer.warmup_epochs -1 must be at least 0",)),
        (("--optimizer.min_lr", 1e-5), ("optimizer.min_lr 1e-05", "optimizer.schedule cosine")),
        (("--optimizer.min_lr", 1, "--optimizer.schedule", "cosine"), ("optimizer.min_lr 1", "optimizer.lr (0.001)")),
        (("--optimizer.name", "adamm"), ("optimizer.name 'adamm'", "sgd, adam, adamw", "torch.optim.RMSprop")),
        (("--optimizer.args.lr", 1), ("optimizer.args: lr has a field of its own", "optimizer.lr")),
        (("--optimizer.name", "sgd", "--optimizer.args", "{momentum: 0}"), ("momentum has a field of its own",)),
    ],
)
def test_settings_that_cannot_be_are_one_line(call, arguments, words):
    assert_one_line(call("train_teacher", *arguments), *words)


def test_foreach_takes_the_place_of_fused(call, tmp_path):
    command = (*UNEVEN, "--max_steps", 2, "--optimizer.args", "{foreach: true}", "--output_dir", tmp_path)
    assert call("train_teacher", *command).status == 0


@pytest.mark.parametrize("arguments", ["{betas: [0.9]}", "{capturable: true}"])
def test_arguments_that_torch_cannot_take_are_one_line(call, tmp_path, arguments):
    result = call("train_teacher", *UNEVEN, "--optimizer.args", arguments, "--output_dir", tmp_path / "run")
    assert_one_line(result, "optimizer.name 'adam'", "cannot be used")
    assert not (tmp_path / "run").exists()


# Optimizers by import path


class Counting(torch.optim.Optimizer):
    """Counts its steps where no checkpoint looks, as many published optimizers do."""

    def __init__(self, params, lr=1e-3):
        super().__init__(params, {"lr": lr, "step": 0})

    def step(self, closure=None):
        for group in self.param_groups:
            group["step"] += 1
            for parameter in group["params"]:
                parameter.data.sub_(parameter.grad, alpha=group["lr"] / group["step"])


class Broken(torch.optim.SGD):
    def step(self, closure=None):
        raise IndexError("nothing there")


USABLE = {
    "RMSprop": {"alpha": 0.9, "momentum": 0.9, "centered": True},
    **{name: {} for name in ("NAdam", "RAdam", "Adagrad", "Adadelta", "Adamax", "ASGD", "Rprop", "Adafactor")},
    "Adam": {"betas": [0.8, 0.9], "amsgrad": True},
}


def interrupted_equals_whole(call, tmp_path, *arguments) -> None:
    assert call("train_teacher", *RUN, *arguments, "--output_dir", tmp_path / "whole").status == 0
    command = (*RUN, *arguments, "--output_dir", tmp_path / "cut")
    with interrupted_at(4, 9):
        assert [call("train_teacher", *command).status for _ in range(3)] == [130, 130, 0]
    assert_same_run(tmp_path / "cut", tmp_path / "whole")


@pytest.mark.parametrize("name", [n if n == "RMSprop" else pytest.param(n, marks=pytest.mark.slow) for n in USABLE])
def test_any_optimizer_resumes_exactly(call, tmp_path, name):
    named = ("--optimizer.name", f"torch.optim.{name}", "--optimizer.args", json.dumps(USABLE[name]))
    interrupted_equals_whole(call, tmp_path, *named)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"name": "torch.optim.LBFGS"}, "torch.optim.LBFGS.*closure"),
        ({"name": "torch.optim.SparseAdam"}, "torch.optim.SparseAdam.*does not support dense gradients"),
        ({"name": "torch.optim.Muon"}, "torch.optim.Muon.*2D"),
        ({"name": "torch.optim.RMSProp"}, "unknown optimizer 'torch.optim.RMSProp'.*'torch.optim.RMSprop'"),
        ({"name": "torch.optimm.Adam"}, "cannot import the optimizer 'torch.optimm.Adam'"),
        ({"name": "torch.optim.RMSprop", "args": {"alfa": 1}}, "unknown argument of RMSprop 'alfa' .*'alpha'"),
        ({"name": "torch.optim.RMSprop", "args": {"alpha": -1}}, "torch.optim.RMSprop.*alpha.*-1"),
        ({"name": "torch.optim.Rprop", "weight_decay": 0.1}, "unknown argument of Rprop 'weight_decay'"),
        ({"name": "adam", "args": {"betas": 3}}, "optimizer.name 'adam'"),
        ({"name": "test_optim.Counting"}, "test_optim.Counting' does not resume exactly"),
        ({"name": "test_optim.Broken"}, "IndexError: nothing there, raised by your own code"),
        ({"name": "test_optim.OptimizerConfig"}, "unknown optimizer 'test_optim.OptimizerConfig'.*test_optim.Counting"),
    ],
)
def test_an_optimizer_that_cannot_be_used_is_one_line(settings, words):
    with pytest.raises(UserError, match=words) as caught:
        try_optimizer(OptimizerConfig(**settings), nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), False)
    assert "\n" not in str(caught.value)


def test_it_is_refused_before_a_run_begins(call, tmp_path):
    command = (*RUN, "--optimizer.name", "torch.optim.LBFGS", "--output_dir", tmp_path / "run")
    assert_one_line(call("train_teacher", *command), "torch.optim.LBFGS", "closure")
    assert not (tmp_path / "run").exists()


def test_engines_that_share_out_the_state_take_built_in_optimizers_only():
    with pytest.raises(UserError, match="FSDP2 and DeepSpeed share out the state of sgd, adam and adamw alone"):
        try_optimizer(OptimizerConfig(name="torch.optim.RMSprop"), nn.Linear(2, 2), True)
    try_optimizer(OptimizerConfig(), nn.Linear(2, 2), True)


# No weight decay on norms and biases


def test_norms_and_biases_are_not_decayed():
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2))
    for parameter in network.parameters():
        nn.init.ones_(parameter)
    config = OptimizerConfig(name="sgd", lr=0.5, weight_decay=0.1, decay_norms_and_biases=False)
    optimizer = make_optimizer(config, network, CPU)
    for parameter in network.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for parameter in network.parameters():
        assert torch.allclose(parameter, torch.tensor(0.95 if parameter.dim() > 1 else 1.0))
    for same in (OptimizerConfig(name="sgd", weight_decay=0.1), OptimizerConfig(decay_norms_and_biases=False)):
        (group,) = make_optimizer(same, network, CPU).param_groups  # as it was, to the byte
        assert all(one is other for one, other in zip(group["params"], network.parameters(), strict=True))


@pytest.mark.parametrize("name", ["adamw", pytest.param("sgd", marks=pytest.mark.slow)])
def test_two_groups_resume_exactly(call, tmp_path, name):
    interrupted_equals_whole(call, tmp_path, *NO_DECAY, "--optimizer.name", name)


@pytest.mark.slow
def test_two_groups_are_sharded_by_fsdp2_and_resume_exactly(tmp_path):
    command, fsdp2 = (*RUN, *NO_DECAY, "--optimizer.name", "adamw", "--output_dir"), ENGINES["fsdp2"]
    assert children.run_several("train_teacher", (*command, tmp_path / "whole"), 2, None, fsdp2) == [0, 0]
    stop = ("kd.train.meter.Meter.add:SIGTERM", 6)
    assert children.run_several("train_teacher", (*command, tmp_path / "cut"), 2, stop, fsdp2) == [143, 143]
    assert children.run_several("train_teacher", (*command, tmp_path / "cut"), 2, None, fsdp2) == [0, 0]
    assert_same_run(tmp_path / "cut", tmp_path / "whole")


def test_two_groups_are_refused_with_deepspeed(call, monkeypatch, tmp_path):
    monkeypatch.setattr("kd.train.zero.find_spec", lambda name: name)
    monkeypatch.setattr("kd.train.zero.shutil.which", lambda name: name)
    for name, value in {"ACCELERATE_USE_DEEPSPEED": "true", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    result = call("train_teacher", *RUN, *NO_DECAY, "--output_dir", tmp_path / "run")
    assert_one_line(result, "optimizer.decay_norms_and_biases false is not supported with DeepSpeed")
