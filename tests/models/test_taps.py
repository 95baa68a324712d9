"""Taps: a feature is what its module computed, in place or not, compiled or not; a run with learned regressors."""

from __future__ import annotations

import json

import children
import pytest
import safetensors.torch
import torch
from test_resume import rows
from torch import nn

import kd.models.__main__ as list_taps
from kd.models import View, build_classifier
from kd.models.taps import tap_shapes
from kd.util.errors import UserError

CLASSES = ["a", "b", "c"]


class InPlace(nn.Module):
    """A network that overwrites its own intermediate results in every way."""

    def __init__(self, num_classes):
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.relu = nn.ReLU(inplace=True)
        self.last = nn.Linear(4, num_classes)

    def forward(self, x):
        out = self.norm(self.first(x))
        out += 1
        out = self.relu(out)
        return self.last(out.mean((2, 3)))


def classifier():
    import kd.models as models

    torch.manual_seed(0)
    view = View(mean=(0.5,) * 3, std=(0.5,) * 3)
    return models.Classifier(InPlace(3), view, CLASSES, {"model": "in_place", "model_args": {}}).eval()


def expected(model, images):
    with torch.no_grad():
        first = model.network.first(model.preprocess(images))
        norm = model.network.norm(first)
        return {"first": first, "norm": norm, "relu": (norm + 1).relu()}


@pytest.mark.first_tier(1)
@pytest.mark.parametrize("compiled", [False, True])
def test_a_tap_has_the_value_that_its_module_computed(compiled):
    model, images = classifier(), torch.randint(0, 256, (5, 3, 6, 6), dtype=torch.uint8)
    plain = model(images)
    model.tap(["first", "norm", "relu"])
    graph = torch.compile(model.outputs, backend="aot_eager") if compiled else model.outputs

    def call(some):
        return graph({"image": some})

    outputs = call(images)
    assert torch.allclose(outputs.logits, plain)
    for name, value in expected(model, images).items():
        assert torch.allclose(outputs.features[name], value, atol=1e-6), name
    again = call(images.flip(0))
    assert torch.allclose(again.features["relu"], outputs.features["relu"].flip(0), atol=1e-6)


def test_gradients_flow_through_a_tap():
    model, images = classifier(), torch.randint(0, 256, (5, 3, 6, 6), dtype=torch.uint8)
    model.tap(["norm"])
    model.train().outputs({"image": images}).features["norm"].square().sum().backward()
    assert model.network.first.weight.grad is not None
    assert model.network.last.weight.grad is None


def test_torchvisions_resnet_overwrites_bn2_and_the_tap_does_not_see_it():
    torch.manual_seed(0)
    model = build_classifier("resnet18", CLASSES, View()).eval()
    model.tap(["layer1.0.bn2"])
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    with torch.no_grad():
        got = model.outputs({"image": images}).features["layer1.0.bn2"]
        net = model.network
        prepared = model.preprocess(images).contiguous(memory_format=torch.channels_last)
        x = net.maxpool(net.relu(net.bn1(net.conv1(prepared))))
        block = net.layer1[0]
        assert torch.allclose(got, block.bn2(block.conv2(block.relu(block.bn1(block.conv1(x))))), atol=1e-6)


def test_an_unknown_tap_lists_the_known_ones():
    with pytest.raises(UserError, match=r"unknown tap of light_nn 'features\.99'.*known:.*features\.3"):
        build_classifier("light_nn", CLASSES, View()).tap(["features.99"])


def test_shapes_and_their_list(capsys):
    model = build_classifier("light_nn", CLASSES, View())
    shapes = tap_shapes(model.network, (3, 32, 32))
    assert shapes["features.2"] == (16, 16, 16)
    assert shapes["classifier"] == (3,)
    assert not model.network.features[0]._forward_hooks
    list_taps.main(["deeper_cnn"])
    lines = capsys.readouterr().out.splitlines()
    assert ["features.9", "MaxPool2d", "64x56x56"] in [line.split() for line in lines]


@pytest.mark.slow
def test_a_regressor_is_trained_resumed_and_not_exported(tmp_path):
    size = ("--data.num_train", 200, "--data.resize", 32, "--report_to", "none", "--log_every", 1)
    teacher = ("--model", "light_nn", *size, "--epochs", 1, "--output_dir", tmp_path / "teacher")
    assert children.run("train_teacher", teacher) == 0
    losses = (
        "[{class_path: FitNet, init_args: {student_tap: features.3, teacher_tap: features.4, kernel_size: 3}},"
        " {class_path: CosineEmbedding, init_args: {student_tap: features.5, teacher_tap: features.2}}, CrossEntropy]"
    )
    command = ("--student", "light_nn", *size, "--epochs", 2, "--teacher", tmp_path / "teacher", "--losses", losses)
    command = (*command, "--checkpoint_every", 2, "--keep_checkpoints", 2, "--output_dir")
    assert children.run("distill", (*command, tmp_path / "whole")) == 0
    assert children.run("distill", (*command, tmp_path / "cut"), sabotage=("kd.train.meter.Meter.add", 6)) == -9
    assert children.run("distill", (*command, tmp_path / "cut")) == 0
    assert (tmp_path / "cut/model.safetensors").read_bytes() == (tmp_path / "whole/model.safetensors").read_bytes()
    names = set(safetensors.torch.load_file(tmp_path / "cut/model.safetensors"))
    assert names == set(build_classifier("light_nn", CLASSES, View()).network.state_dict())
    before, after = (
        safetensors.torch.load_file(folder / "distiller.safetensors")["losses.FitNet.regressor.0.weight"]
        for folder in sorted((tmp_path / "cut/checkpoints").glob("step_*"))
    )
    assert not torch.equal(before, after)
    assert {"train/FitNet", "train/CosineEmbedding"} < json.loads(
        (tmp_path / "cut/metrics.jsonl").read_text().splitlines()[0]
    ).keys()


@pytest.mark.slow
def test_two_processes_with_a_regressor_give_the_losses_of_one(tmp_path):
    size = ("--data.num_train", 100, "--data.resize", 32, "--report_to", "none", "--log_every", 1, "--epochs", 1)
    teacher = ("--model", "light_nn", *size, "--output_dir", tmp_path / "teacher")
    assert children.run("train_teacher", teacher) == 0
    # batch norm would see each process's images
    taps = "student_tap: features.3, teacher_tap: features.4, batch_norm: false"
    losses = f"[{{class_path: FitNet, init_args: {{{taps}}}}}, CrossEntropy]"
    command = ("--student", "light_nn", *size, "--teacher", tmp_path / "teacher", "--losses", losses, "--output_dir")
    command = ("--optimizer.name", "sgd", "--data.batch_size", 20, *command)
    assert children.run("distill", (*command, tmp_path / "one")) == 0
    assert children.run_several("distill", (*command, tmp_path / "two"), 2) == [0, 0]
    for one, two in zip(rows(tmp_path / "one"), rows(tmp_path / "two"), strict=True):
        for key, value in one.items():
            assert two[key] == pytest.approx(value, rel=1e-4), key
