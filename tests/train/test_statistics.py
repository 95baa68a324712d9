"""Batch norm whose statistics cannot have arrived is re-estimated for evaluation; training keeps its own."""

from __future__ import annotations

import json
from types import SimpleNamespace

import children
import numpy as np
import pytest
import safetensors.torch
import torch
from conftest import SMALL
from torch import nn

from kd.train.checkpoint import load_newest
from kd.train.standing import PATIENCE, Standing
from kd.train.statistics import chosen, learning_layers, left_over, reestimate
from kd.util.tensors import buffers_put_back

RESNET = (*SMALL, "--model", "resnet8", "--data.resize", 32, "--data.batch_size", 48, "--data.flip", "true")
ARGUMENTS = (*RESNET, "--checkpoint_every", 2, "--report_to", "none")


class OneLayer(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(3, momentum=0.01).double()

    def logits(self, inputs):
        return self.norm(inputs["image"]).mean((2, 3))


class Images:
    """The `read` and length of a split of images (N, 3, 2, 2)."""

    def __init__(self, count: int):
        self.images = torch.randn(count, 3, 2, 2, dtype=torch.double, generator=torch.Generator().manual_seed(0)) * 3

    def __len__(self):
        return len(self.images)

    def read(self, where, device):
        return {"image": self.images[where]}, None, None


def test_reestimated_is_the_mean_of_the_batches():
    split = Images(150)
    images = split.images
    network = OneLayer().train()
    network.logits({"image": images})
    names, count = learning_layers(network), network.norm.num_batches_tracked.item()
    reestimate(network, names, split, torch.device("cpu"))
    means, variances = [], []
    for where in chosen(150):
        for channel in range(3):
            values = [value for image in where for value in images[image, channel].flatten().tolist()]
            mean = sum(values) / len(values)
            means.append(mean)
            variances.append(sum((value - mean) ** 2 for value in values) / (len(values) - 1))
    by_channel = [np.reshape(values, (-1, 3)).mean(0) for values in (means, variances)]
    assert network.norm.running_mean.tolist() == pytest.approx(by_channel[0], rel=1e-12)
    assert network.norm.running_var.tolist() == pytest.approx(by_channel[1], rel=1e-12)
    assert network.norm.momentum == 0.01
    assert network.norm.num_batches_tracked == count
    assert not network.norm.training


@pytest.mark.parametrize("count", [1, 10, 64, 65, 221, 5000])
def test_chosen_images_are_spread_and_each_used_once(count):
    batches = chosen(count)
    places = np.sort(np.concatenate(batches))
    assert len({len(batch) for batch in batches}) == 1
    assert len(np.unique(places)) == len(places) <= 512
    assert places[0] == 0
    assert count - places[-1] <= max(1, -(-count // len(places)))


def test_what_is_left_over():
    network = OneLayer().train()
    assert left_over(network, learning_layers(network), 40) == pytest.approx(0.669, abs=1e-3)
    assert learning_layers(network.eval()) == []  # frozen: nothing moves them
    assert left_over(network, [], 0) == 0


def test_training_gets_its_statistics_back():
    split = Images(70)
    images = split.images
    network = OneLayer().train()
    network.logits({"image": images})
    before = {name: value.clone() for name, value in network.state_dict().items()}
    with buffers_put_back(network):
        reestimate(network, learning_layers(network), split, torch.device("cpu"))
        assert not torch.equal(network.norm.running_mean, before["norm.running_mean"])
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


@pytest.mark.slow  # three real runs
def test_a_short_run_is_told_and_resumes_exactly(call, tmp_path):
    result = call("train_teacher", *ARGUMENTS, "--output_dir", tmp_path / "whole")
    assert result.status == 0, result.out + result.err
    assert (result.out + result.err).count("batch norm: 59% of the first statistics are left after 5 steps") == 1
    command = (*ARGUMENTS, "--output_dir", tmp_path / "killed")
    assert children.run("train_teacher", command, sabotage=("kd.train.meter.Meter.add", 8)) == -9
    assert children.run("train_teacher", command) == 0
    whole, killed = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "killed"))
    assert whole == killed
    summary = json.loads((tmp_path / "whole" / "summary.json").read_text())
    assert summary["batch_norm_left_over"] == pytest.approx(0.9**10)
    ones = [load_newest(tmp_path / name / "checkpoints")[1]["distiller"] for name in ("whole", "killed")]
    assert all(torch.equal(value, ones[1][name]) for name, value in ones[0].items())
    trained = next(value for name, value in ones[0].items() if name.endswith("running_var"))
    written = next(value for name, value in safetensors.torch.load(whole).items() if name.endswith("running_var"))
    assert not torch.equal(trained, written)  # training has its own


def config(**changed):
    return SimpleNamespace(**{"weights": None, "init_from": None, "optimizer": SimpleNamespace(lr=0.1), **changed})


LABELS = torch.tensor([0, 1, 0, 1])
SAME, RIGHT = torch.tensor([[1.0, 0.0]] * 4), torch.eye(2)[LABELS]


def test_one_class_is_said_once_and_at_the_end(capsys):
    seen = {}
    for epoch in range(8):
        Standing(config(), seen).look("student", SAME, LABELS, 50.0, 5 * epoch + 5)  # a new start at each epoch
    assert "gives all 4 validation images the same class: 10 steps from random weights" in (
        said := "".join(capsys.readouterr())
    )
    assert said.count("warning") == 1
    Standing(config(weights="imagenet"), seen).conclude("student", SAME, LABELS, 40)
    assert "all 4 test images the same class: the learning rate (0.1)" in "".join(capsys.readouterr())


def test_accuracy_that_never_moves_is_said(capsys):
    seen, other = {}, torch.eye(2)[torch.tensor([0, 0, 1, 1])]
    standing = Standing(config(), seen)
    for _ in range(PATIENCE + 2):
        standing.look("student", other, LABELS, 50.0, 5)
    assert "".join(capsys.readouterr()).count(f"has stood at 50.00 % for {PATIENCE} epochs") == 1
    standing.conclude("student", other, LABELS, 35)
    assert "never moved from 50.00 %" in "".join(capsys.readouterr())


def test_a_run_that_learns_is_not_warned(capsys):
    standing = Standing(config(), {})
    standing.look("student", SAME, LABELS, 50.0, 5)
    for _ in range(PATIENCE + 2):
        standing.look("student", RIGHT, LABELS, 100.0, 10)
    standing.conclude("student", RIGHT, LABELS, 50)
    assert "".join(capsys.readouterr()) == ""
