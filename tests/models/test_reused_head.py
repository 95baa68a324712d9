"""A student with its teacher's head (SimKD): what learns, what stays, what the run folder holds, what is refused."""

from __future__ import annotations

import json

import pytest
import torch
from conftest import ROOT, assert_one_line, interrupted_at
from test_resume import assert_same_run
from torch import nn

import kd
from kd.data import load_data
from kd.models import Classifier, View, build_classifier, build_network, load_classifier, reuse_head, state_hash
from kd.models.reused_head import averaged_map, up_to
from kd.run.config import DistillConfig
from kd.run.parse import parse
from kd.teachers import Teachers
from kd.train.setup import build_learner, build_trained
from kd.util.errors import UserError

pytestmark = pytest.mark.first_tier(1)

DIGITS = ("--data.num_train", 60, "--data.batch_size", 20, "--log_every", 1, "--report_to", "none")
LOSSES = "[{class_path: FeatureDistance, init_args: {student_tap: projector, teacher_tap: stage3}}, CrossEntropy]"
REUSE = (*DIGITS, "--student", "resnet8", "--learner", "ReusedHead", "--losses", LOSSES)
CLASSES = ["a", "b", "c", "d"]


def build_student(data, config, classifier):
    teachers = Teachers({"teacher": classifier}, classifier.classes)
    return build_learner(build_trained(config.student, data, config), teachers, data, config).student


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """The folder of a finished resnet14 on the digits."""
    import os

    import train_teacher

    folder, here = tmp_path_factory.mktemp("reused") / "teacher", os.getcwd()
    os.chdir(ROOT)
    try:
        arguments = ("--model", "resnet14", *DIGITS, "--epochs", 2, "--output_dir", folder)
        assert train_teacher.main([str(argument) for argument in arguments]) == 0
    finally:
        os.chdir(here)
    return folder


def pair(student, teacher, size=32, classes=CLASSES, student_args=None):
    """Two classifiers with random weights for images of one size."""
    torch.manual_seed(0)
    view = View(resize=size, crop=size)
    names = (student, CLASSES, student_args), (teacher, classes, None)
    return [build_classifier(name, known, view, arguments).eval() for name, known, arguments in names]


@pytest.mark.slow
def test_a_run_trains_body_and_projector_and_its_folder_is_enough(call, teacher, tmp_path):
    folder = tmp_path / "run"
    command = ("--teacher", teacher, *REUSE, "--epochs", 2, "--output_dir")
    result = call("distill", *command, folder)
    assert result.status == 0, result.err
    assert "650 of them frozen" in result.out
    run, theirs = kd.load(folder), kd.load(teacher)
    assert state_hash(run.network.fc) == state_hash(theirs.network.fc)
    config = parse(DistillConfig, [str(word) for word in (*command, folder)])
    first = build_student(load_data(config.data), config, theirs)
    after = run.network.state_dict()
    changed = {key for key, value in first.network.state_dict().items() if not torch.equal(value, after[key])}
    assert changed == {key for key in after if not key.startswith("fc.")}
    images = torch.randint(0, 256, (5, 1, 8, 8), dtype=torch.uint8)
    prepared = run.preprocess(images)
    with torch.no_grad():
        vector = run.network.projector(run.network.body(prepared)).mean((2, 3))
        assert torch.allclose(run(images), theirs.network.fc(vector), atol=1e-5)
    losses = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [row["train/FeatureDistance"] for row in losses if "train/FeatureDistance" in row]
    assert steps[-1] < steps[0]
    result = call("evaluate", folder, "--latency", "false", "--json", tmp_path / "numbers.json")
    assert result.status == 0, result.err
    (row,) = json.loads((tmp_path / "numbers.json").read_text())["runs"]
    summary = json.loads((folder / "summary.json").read_text())
    assert row["top1"] == pytest.approx(summary["test_accuracy"])
    assert row["num_params"] == summary["num_params"] == sum(p.numel() for p in run.network.parameters())
    assert row["agreement"] is not None


@pytest.mark.slow
def test_an_interrupted_run_resumes_exactly(call, teacher, tmp_path):
    command = ("--teacher", teacher, *REUSE, "--epochs", 3, "--checkpoint_every", 2, "--output_dir")
    assert call("distill", *command, tmp_path / "whole").status == 0
    with interrupted_at(6):
        assert call("distill", *command, tmp_path / "cut").status == 130
    assert not (tmp_path / "cut" / "summary.json").exists()
    result = call("distill", *command, tmp_path / "cut")
    assert result.status == 0, result.err
    assert "resuming after step 4" in result.out
    assert_same_run(tmp_path / "cut", tmp_path / "whole")


@pytest.mark.slow
def test_the_body_starts_with_the_students_own_weights(teacher, tmp_path):
    classifier = load_classifier(teacher)
    torch.save(build_network("resnet8", 10).state_dict(), tmp_path / "w.pth")
    for arguments in ((), ("--weights", tmp_path / "w.pth"), ("--student", "resnet14", "--init_from", teacher)):
        words = [str(word) for word in ("--teacher", teacher, *REUSE, *arguments, "--output_dir", tmp_path / "run")]
        config = parse(DistillConfig, words)
        data = load_data(config.data)
        built = build_student(data, config, classifier)
        alone = build_trained(config.student, data, config).network.state_dict()
        body = built.network.body.state_dict()
        assert body
        assert all(torch.equal(value, alone[key]) for key, value in body.items())
        assert not any(key.startswith("fc") for key in body)


@pytest.mark.slow
def test_the_heads_rows_are_in_the_students_order():
    student, theirs = pair("resnet8", "resnet14", classes=["d", "x", "b", "a", "c"])
    whole = reuse_head(student, theirs, (3, 32, 32)).eval()
    assert whole.network.body[0][0].weight is not theirs.network.stem[0].weight
    assert torch.equal(whole.network.fc.weight, theirs.network.fc.weight[[3, 2, 4, 0]])
    assert torch.equal(whole.network.fc.bias, theirs.network.fc.bias[[3, 2, 4, 0]])
    whole.train()
    assert not whole.network.fc.training
    assert whole.network.body.training
    assert [name for name, p in whole.network.named_parameters() if not p.requires_grad] == ["fc.weight", "fc.bias"]


@pytest.mark.parametrize(
    ("student", "teacher", "size", "tap", "student_map", "teacher_map", "projected"),
    [
        ("resnet8", "wrn_16_2", 32, "stage3", [64, 8, 8], [128, 8, 8], (128, 8, 8)),
        ("resnet8", "vgg8", 32, "stage3", [64, 8, 8], [512, 4, 4], (512, 4, 4)),
        ("vgg8", "resnet8", 40, "stage5", [512, 5, 5], [64, 10, 10], (64, 5, 5)),
        ("resnet8", "vgg8", 44, "stage3", [64, 11, 11], [512, 5, 5], (512, 5, 5)),
        ("mobilenet_v2_half", "shufflenet_v2_cifar", 32, "stage4", [160, 2, 2], [1024, 4, 4], (1024, 2, 2)),
        ("resnet18", "shufflenet_v1", 64, "layer4", [512, 2, 2], [960, 8, 8], (960, 2, 2)),
    ],
)
def test_maps_of_several_sizes(student, teacher, size, tap, student_map, teacher_map, projected):
    mine, theirs = pair(student, teacher, size)
    whole = reuse_head(mine, theirs, (3, size, size))
    arguments = whole.recipe["model_args"]
    assert (arguments["student_tap"], arguments["student_map"], arguments["teacher_map"]) == (
        tap,
        student_map,
        teacher_map,
    )
    whole.tap(["projector", "pool", f"body.{tap}"])
    outputs = whole.eval().outputs({"image": torch.randint(0, 256, (2, 3, size, size), dtype=torch.uint8)})
    assert outputs.features["projector"].shape[1:] == projected
    assert list(outputs.features[f"body.{tap}"].shape[1:]) == student_map
    assert torch.allclose(outputs.logits, theirs.network.fc(outputs.features["pool"]), atol=1e-5)
    outputs.logits.square().sum().backward()
    assert all(p.grad is not None for p in whole.network.body.parameters())
    config = json.loads(whole.files()["config.json"])
    again = build_network(config["model"], 4, config["model_args"])
    again.load_state_dict(whole.network.state_dict())


def test_the_projector_is_the_published_bottleneck():
    mine, theirs = pair("resnet8x4", "resnet32x4")
    projector = reuse_head(mine, theirs, (3, 32, 32)).network.projector
    kinds = [type(module).__name__ for module in projector]
    assert kinds == ["Conv2d", "BatchNorm2d", "ReLU"] * 3
    weights = [tuple(module.weight.shape) for module in projector if isinstance(module, nn.Conv2d)]
    assert weights == [(128, 256, 1, 1), (128, 128, 3, 3), (256, 128, 1, 1)]
    # conv 32768 + 147456 + 32768, norm 2 * (128 + 128 + 256)
    assert sum(p.numel() for p in projector.parameters()) == 214_016


@pytest.mark.slow
def test_a_student_of_another_kind_is_cut_at_the_named_module():
    mine, theirs = pair("mobilenet_v3_small", "resnet18", 64)
    with pytest.raises(UserError, match=r"last feature map of mobilenet_v3_small is not known; .*in tap"):
        reuse_head(mine, theirs, (3, 64, 64))
    whole = reuse_head(mine, theirs, (3, 64, 64), "features.11").eval()
    assert len(whole.network.body.features) == 12
    images = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    prepared = mine.preprocess(images)
    assert torch.allclose(whole.network.body(prepared), mine.network.features[:12](prepared), atol=1e-5)


class Branches(nn.Module):
    """A network whose modules do not run one after another, and that draws dropout."""

    def __init__(self, num_classes: int):
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Dropout(0.5))
        self.second = nn.Conv2d(4, 4, 1)
        self.fc = nn.Linear(4, num_classes)

    def forward(self, x):
        x = self.first(x)
        return self.fc(self.second(x + 1).mean((2, 3)))


def test_what_cannot_be_cut_is_refused_and_dropout_keeps_its_keys():
    mine, theirs = pair("test_reused_head.Branches", "resnet8")
    for tap, words in (("second", "one after another up to 'second'"), ("fc", "tap 'fc' .* gives 4; name")):
        with pytest.raises(UserError, match=words):
            reuse_head(mine, theirs, (3, 32, 32), tap)
    with pytest.raises(UserError, match=r"unknown tap of test_reused_head.Branches 'frist' \(did you mean 'first'"):
        reuse_head(mine, theirs, (3, 32, 32), "frist")
    whole = reuse_head(mine, theirs, (3, 32, 32), "first").train()
    images, keys = {"image": torch.randint(0, 256, (6, 3, 32, 32), dtype=torch.uint8)}, torch.arange(6)
    assert torch.equal(whole.outputs(images, keys).logits, whole.outputs(images, keys).logits)
    assert not torch.equal(whole.outputs(images, keys).logits, whole.outputs(images, keys + 9).logits)


def test_a_head_behind_anything_but_an_average_is_refused():
    for name, size in (("light_nn", 32), ("squeezenet1_1", 64), ("mobilenet_v3_small", 64)):
        theirs = pair("resnet8", name, size)[1]
        with pytest.raises(UserError, match=f"the teacher, a {name}, is not one linear layer on the average"):
            averaged_map(theirs, (3, size, size))
        assert not any(module._forward_hooks for module in theirs.network.modules())


def test_a_head_without_bias_adds_nothing():
    student, theirs = pair("resnet8", "resnet14")
    theirs.network.fc = nn.Linear(64, 4, bias=False)
    whole = reuse_head(student, theirs, (3, 32, 32))
    assert torch.equal(whole.network.fc.weight, theirs.network.fc.weight)
    assert not whole.network.fc.bias.any()


def test_names_stay_where_a_network_is_cut():
    network = build_network("resnet18", 3)
    cut = up_to(network, "layer2.1")
    names = set(cut.state_dict())
    assert names < set(network.state_dict())
    assert {name.split(".")[0] for name in names} == {"conv1", "bn1", "layer1", "layer2"}


def test_a_classifier_with_a_reused_head_can_be_a_teacher(teacher):
    theirs = load_classifier(teacher)
    student = build_classifier("resnet8", theirs.classes, theirs.preprocess.view)
    whole = reuse_head(student, theirs, (1, 8, 8)).eval()
    assert isinstance(whole, Classifier)
    assert averaged_map(whole, (1, 8, 8)) == whole.recipe["model_args"]["teacher_map"] == [64, 2, 2]
    again = reuse_head(student, whole, (1, 8, 8))
    assert state_hash(again.network.fc) == state_hash(theirs.network.fc)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--teacher", "[{teacher}, {teacher}]"), ["ReusedHead needs one teacher", "not 2"]),
        (("--learner.tap", "stage4"), ["unknown tap of resnet8 'stage4'", "stage3"]),
        (("--learner.tap", "pool"), ["tap 'pool' of resnet8 gives 64", "map"]),
        (("--student", "shufflenet_v2_x0_5", "--data.resize", 64), ["shufflenet_v2_x0_5 is not known", "in tap"]),
        (("--student", "reused_head"), ["cannot build reused_head"]),
        (("--losses", LOSSES.replace("projector", "projecter")), ["'projecter'", "did you mean 'projector'"]),
    ],
)
def test_wrong_cases_end_in_one_line(call, teacher, tmp_path, arguments, words):
    arguments = [str(word).format(teacher=teacher) if "{teacher}" in str(word) else word for word in arguments]
    result = call("distill", "--teacher", teacher, *REUSE, "--output_dir", tmp_path / "run", *arguments)
    assert_one_line(result, *words)
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_a_teacher_with_another_kind_of_head_ends_in_one_line(call, teacher_run, tmp_path):
    result = call("distill", "--teacher", teacher_run, *REUSE, "--output_dir", tmp_path / "run")
    assert_one_line(result, "ReusedHead: the head of the teacher, a mnist_teacher, is not one linear layer")
