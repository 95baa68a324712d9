"""What a user can do wrong: one line that names it, a status that is not 0, and nothing that was there is lost."""

from __future__ import annotations

import errno
import itertools
import json
import os
import shutil
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
import yaml
from conftest import assert_one_line, write_image
from filelock import FileLock
from refusing import (  # noqa: F401 (fixtures)
    NOTES,
    QUICK,
    _one_thread,
    contents,
    finished,
    losses,
    out,
    refused,
    runs,
    teacher,
    train,
)

from kd.models import build_network, load_classifier
from kd.teachers.load import load_teachers
from kd.train.checkpoint import checkpoints, load_newest

pytestmark = pytest.mark.first_tier(1, every=5)

# Names and values

WRONG = [
    pytest.param(
        ("--model", "mnist_studnt"), ["unknown model 'mnist_studnt'", "did you mean 'mnist_student'"], id="model"
    ),
    pytest.param(("--model", "nowhere.Net"), ["cannot import the model 'nowhere.Net'"], id="model import path"),
    pytest.param(("--model", "conftest.Net"), ["cannot import the model 'conftest.Net'"], id="model attribute"),
    pytest.param(
        ("--model", "math.pi"), ["the model 'math.pi' is of math", "a module of your own"], id="model of Python"
    ),
    pytest.param(
        ("--model", "torch.hub.load", "--model_args", '{"repo_or_dir": ".", "model": "net", "source": "local"}'),
        ["the model 'torch.hub.load' is of torch", "a module of your own"],
        id="model of torch",
    ),
    pytest.param(("--model", "conftest.ROOT"), ["'conftest.ROOT' is neither a torch.nn.Module class"], id="no class"),
    pytest.param(("--model", "conftest.Image"), ["'conftest.Image' is neither a torch.nn.Module class"], id="no net"),
    pytest.param(("--model", ".."), ["the model '..' is no import path"], id="model of dots"),
    pytest.param(
        ("--model", "resnet18", "--weights", "IMAGENET1K_V9"),
        ["IMAGENET1K_V9", "resnet18", "known: imagenet, IMAGENET1K_V1"],
        id="weights name",
    ),
    pytest.param(("--model_args", '{"drop": 1}'), ["argument of mnist_student 'drop'"], id="model argument"),
    pytest.param(
        ("--losses", losses(("CrosEntropy", {}))),
        ["unknown loss 'CrosEntropy'", "did you mean 'CrossEntropy'", "known: "],
        id="loss",
    ),
    pytest.param(("--losses", losses(("nowhere.Mine", {}))), ["nowhere.Mine"], id="loss import path"),
    pytest.param(
        ("--losses", losses(("CrossEntropy", {"label_smooth": 0.1}))),
        ["'label_smooth'", "did you mean 'label_smoothing'", "weight"],
        id="loss argument",
    ),
    pytest.param(("--losses", "[]"), ["no loss is given", "CrossEntropy"], id="no loss"),
    pytest.param(("--data.batchsize", 3), ["'data.batchsize'", "did you mean 'data.batch_size'"], id="flag of data"),
    pytest.param(("--optimizer.lrr", 3), ["'optimizer.lrr'", "did you mean 'optimizer.lr'"], id="flag of optimizer"),
    pytest.param(("--seeds", 3), ["unknown field 'seeds'", "did you mean 'seed'"], id="flag"),
    pytest.param(("--epoch", 3), ["unknown field 'epoch'", "did you mean 'epochs'"], id="abbreviated flag"),
    pytest.param(("stray",), ["unexpected argument 'stray'"], id="stray word"),
    pytest.param(("--epochs",), ["--epochs has no value"], id="flag without value"),
    pytest.param(("--config", "nowhere.yaml"), ["nowhere.yaml"], id="recipe"),
    pytest.param(("--data.batch_size", "many"), ["data.batch_size", "'many'", "int"], id="type of batch_size"),
    pytest.param(("--optimizer.name", "sdg"), ["optimizer.name", "'sdg'", "sgd", "adamw"], id="choice"),
    pytest.param(("--data.num_train", 1.5), ["data.num_train", "1.5", "int"], id="type of num_train"),
    pytest.param(("--overwrite", "maybe"), ["overwrite", "'maybe'", "bool"], id="type of overwrite"),
    pytest.param(("--data.batch_size", 0), ["data.batch_size 0 must be above 0"], id="batch_size 0"),
    pytest.param(("--epochs", 0), ["epochs 0 must be above 0"], id="epochs 0"),
    pytest.param(("--max_steps", 0), ["max_steps 0 must be above 0 or null"], id="max_steps 0"),
    pytest.param(("--optimizer.lr=-0.1",), ["optimizer.lr -0.1", "above 0"], id="negative lr"),
    pytest.param(("--optimizer.lr", "inf"), ["optimizer.lr"], id="infinite lr"),
    pytest.param(
        ("--data.val_fraction", 1), ["data.val_fraction 1 must be at least 0 and below 1"], id="val_fraction 1"
    ),
    pytest.param(
        ("--data.test_fraction", 0), ["data.test_fraction 0 must be above 0 and below 1"], id="test_fraction 0"
    ),
    pytest.param(("--data.std", "[0]"), ["data.std", "above 0"], id="std 0"),
    pytest.param(("--data.mean", "[1, 2]"), ["data.mean", "data.channels (3)"], id="mean of two channels"),
    pytest.param(("--data.crop", 29), ["data.crop 29", "data.resize 28"], id="crop above resize"),
    pytest.param(
        ("--losses", losses(("KL", {"temperature": 0}))), ["KL: temperature 0", "above 0"], id="temperature 0"
    ),
    pytest.param(
        ("--losses", losses(("CrossEntropy", {"weight": -1}))), ["CrossEntropy: weight -1"], id="negative weight"
    ),
    pytest.param(
        ("--select", "best", "--data.val_fraction", 0), ["select best", "data.val_fraction"], id="best of nothing"
    ),
    pytest.param(("--output_dir", ""), ["output_dir is empty"], id="no output_dir"),
    pytest.param(("--accumulate", 0), ["accumulate 0 must be above 0"], id="accumulate 0"),
    pytest.param(("--accumulate", 13), ["accumulate 13", "from 1 to data.batch_size (12)"], id="accumulate 13"),
    pytest.param(
        ("--accumulate", 2, "--losses", losses(("DIST", {}), ("CrossEntropy", {}))),
        ["accumulate 2: DIST compares the images of a whole batch", "set accumulate 1"],
        id="accumulate what sees the batch",
    ),
    pytest.param(("--peer_timeout", 0), ["peer_timeout 0 must be at least 1"], id="peer_timeout 0"),
    pytest.param(
        ("--losses", losses(("KL", {}))), ["losses: KL needs a teacher", "distill.py --teacher"], id="loss with teacher"
    ),
    pytest.param(
        ("--data.source", "cifar1"),
        ["unknown data.source 'cifar1'", "did you mean 'cifar10'", "hub:owner/name", "folder"],
        id="source",
    ),
    pytest.param(
        ("--data.num_train", 5), ["data.num_train 5 must", "10 (one image per class)", "1747"], id="num_train too small"
    ),
    pytest.param(
        ("--data.num_train", 5000),
        ["data.num_train 5000 must", "10 (one image per class)", "1747"],
        id="num_train too large",
    ),
    pytest.param(
        ("--data.num_labels", 21),
        ["data.num_labels 21 must", "10 (one image per class) to 20"],
        id="more labels than images",
    ),
    pytest.param(
        ("--data.num_labels", 10, "--data.mixup", 0.2),
        ["data.num_labels 10", "without a label", "data.mixup"],
        id="unlabelled images mixed",
    ),
    pytest.param(
        ("--data.resize", "null"), ["mnist_student takes images of 28x28 and gets 8x8", "--data.resize 28"], id="size"
    ),
    pytest.param(("--data.crop", 20), ["mnist_student takes images of 28x28 and gets 20x20"], id="size after the crop"),
    pytest.param(
        ("--model", "alexnet", "--data.resize", "null"),
        ["alexnet does not take the data's images (1x8x8)", "data.resize"],
        id="size of a torchvision network",
    ),
    pytest.param(
        ("--freeze_backbone", "true"), ["freeze_backbone", "random weights", "weights"], id="frozen at random"
    ),
    pytest.param(("--init_from", "nowhere"), ["'nowhere'", "no such folder"], id="init_from"),
    pytest.param(("--init_from", "a", "--weights", "b"), ["init_from or weights, not both"], id="two first weights"),
    pytest.param(("--weights", "nowhere.pth"), ["weights 'nowhere.pth'", "no such file"], id="weights file"),
]


@pytest.mark.parametrize(("arguments", "words"), WRONG)
def test_wrong_argument(refused, arguments, words):
    refused(arguments, words)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--studnt", "x"), ["unknown field 'studnt'", "did you mean 'student'"]),
        (("--model", "light_nn"), ["unknown field 'model'"]),
        (("--teacher", ""), ["teacher is not given"]),
        (("--teacher", "nowhere"), ["'nowhere'", "no such folder"]),
        (("--teacher", "tests"), ["'tests'", "no run folder"]),
        (("--teacher", "resnet18"), ["'resnet18'", "does not know 0, 1, 2", "train_teacher.py"]),
        (("--teacher_mean", "median"), ["teacher_mean", "'median'", "probabilities"]),
        (
            (
                "--teacher",
                "x",
                "--data.num_labels",
                10,
                "--losses",
                losses(("CRD", {"student_tap": "a", "teacher_tap": "b"})),
            ),
            ["data.num_labels 10", "CRD relates all"],
        ),
    ],
)
def test_wrong_argument_of_distill(refused, arguments, words):
    refused(arguments, words, script="distill")


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        ("modle: x\n", ["unknown field 'modle'", "did you mean 'model'"]),
        ("data: {sourc: digits}\n", ["unknown field 'data.sourc'", "did you mean 'data.source'"]),
        ("optimizer: {lr: fast}\n", ["optimizer.lr", "'fast'", "float"]),
        ("epochs: 0\n", ["epochs 0"]),
        ("losses: [{class_path: Cross_Entropy}]\n", ["unknown loss 'Cross_Entropy'", "did you mean 'CrossEntropy'"]),
        ("losses: [{class_path: CrossEntropy, init_args: {smooth: 1}}]\n", ["'smooth'", "known: label_smoothing"]),
        ("data: [1\n", ["line"]),
        ("just text", ["just text"]),
        ("", ["config"]),
    ],
)
def test_wrong_recipe(refused, tmp_path, recipe, words):
    (tmp_path / "recipe.yaml").write_text(recipe)
    refused(("--config", tmp_path / "recipe.yaml"), words)


def test_recipe_that_is_no_text(refused, tmp_path):
    (tmp_path / "recipe.yaml").write_bytes(b"\xff\xfe\x00\x80")
    refused(("--config", tmp_path / "recipe.yaml"), [])


def test_batch_size_that_the_processes_cannot_share(refused, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    refused(("--data.batch_size", 64), ["data.batch_size 64", "3 processes", "63"])


# Data


@pytest.fixture
def folder_refused(refused):
    """Train on a folder that must be refused."""

    def run(folder, words, *arguments) -> None:
        size = ("--data.resize", 28, "--data.crop", 28, "--data.num_train", "null")
        refused(("--data.source", folder, *size, *arguments), words)

    return run


def test_data_folder_is_missing(folder_refused, tmp_path):
    folder_refused(tmp_path / "nowhere", ["unknown data.source", "nowhere", "none of this name"])


def test_data_folder_is_empty(folder_refused, tmp_path):
    (tmp_path / "empty").mkdir()
    folder_refused(tmp_path / "empty", ["data.source", "empty folder", "train/CLASS/IMAGE"])


def test_data_folder_is_a_file(folder_refused, tmp_path):
    (tmp_path / "data.zip").write_bytes(b"PK")
    folder_refused(tmp_path / "data.zip", ["data.zip", "is a file", "folder"])


def test_data_folder_holds_no_images(folder_refused, tmp_path):
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("a")
    folder_refused(tmp_path / "texts", ["texts", "no images", ".png", "Parquet"])


def test_data_folder_has_no_train_split(folder_refused, image_folder):
    shutil.rmtree(image_folder / "train")
    folder_refused(image_folder, ["no train split", "found: test"])


def test_images_without_class_folders(folder_refused, tmp_path):
    write_image(tmp_path / "flat" / "a.png", (1, 2, 3))
    folder_refused(tmp_path / "flat", ["no train split", "CLASS/IMAGE"])


def test_train_holds_no_class_folders(folder_refused, image_folder):
    shutil.rmtree(image_folder / "train")
    write_image(image_folder / "train" / "a.png", (1, 2, 3))
    folder_refused(image_folder, ["train", "CLASS/IMAGE"])


def test_class_folder_is_empty(folder_refused, image_folder):
    (image_folder / "train" / "yellow").mkdir()
    folder_refused(image_folder, ["class folder", "yellow", "holds no images", "fill it or remove it"])


def test_one_class_only(folder_refused, image_folder):
    for split in ("train", "test"):
        for name in ("red", "green"):
            shutil.rmtree(image_folder / split / name)
    folder_refused(image_folder, ["one class (blue)", "two or more"])


def test_class_of_test_is_unknown_to_train(folder_refused, image_folder):
    (image_folder / "test" / "red").rename(image_folder / "test" / "rad")
    folder_refused(image_folder, ["'rad'", "did you mean 'red'", "test", "classes of train"])


def test_too_few_images_to_validate_on(folder_refused, image_folder):
    folder_refused(image_folder, ["data.val_fraction 0.01", "no image to validate on"], "--data.val_fraction", 0.01)


def test_images_of_several_sizes(refused, image_folder):
    write_image(image_folder / "train" / "red" / "wide.png", (200, 60, 60), size=(20, 10))
    arguments = ("--data.source", image_folder, "--data.num_train", "null", "--data.resize", "null")
    refused(arguments, ["12x10 and 20x10", "set data.resize"])


@pytest.mark.parametrize("damage", ["garbage", "truncated", "empty"])
def test_unreadable_image_is_named_and_can_be_skipped(folder_refused, train, image_folder, damage):
    bad = image_folder / "train" / "green" / "03.png"
    bad.write_bytes({"garbage": b"no image", "truncated": bad.read_bytes()[:100], "empty": b""}[damage])
    folder_refused(image_folder, ["unreadable image", str(bad), "--data.skip_unreadable true"])
    if damage == "truncated":
        size = ("--data.resize", 28, "--data.crop", 28, "--data.num_train", "null", "--overwrite", "true")
        result = train("--data.source", image_folder, *size, "--data.skip_unreadable", "true")
        assert result.status == 0, result.err
        assert f"1 unreadable images of train are left out: {bad}" in result.out


def test_no_image_is_readable(folder_refused, image_folder):
    for path in image_folder.rglob("*.png"):
        path.write_bytes(b"no image")
    folder_refused(image_folder, ["image", "can be read"], "--data.skip_unreadable", "true")


@pytest.mark.parametrize(
    ("name", "file"),
    [("cifar10", "cifar-10-python.tar.gz"), ("stl10", "stl10_binary.tar.gz"), ("mnist", "train-images-idx3-ubyte.gz")],
)
def test_no_network_for_a_named_set(refused, tmp_path, monkeypatch, name, file):
    def unreachable(*_, **__):
        raise urllib.error.URLError("network is unreachable")

    monkeypatch.setattr(urllib.request, "urlopen", unreachable)
    refused(
        ("--data.source", name, "--data.download_dir", tmp_path / "sets"),
        [f"cannot download {name}", file, str(tmp_path / "sets"), "data.download_dir"],
    )


def test_no_network_for_weights(refused, tmp_path, monkeypatch):
    def unreachable(*_, **__):
        raise urllib.error.URLError("network is unreachable")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr(torch.hub, "urlopen", unreachable)
    where = str(tmp_path / "torch" / "hub" / "checkpoints" / "resnet18-")
    refused(("--model", "resnet18", "--weights", "imagenet"), ["cannot get the weights", "unreachable", "https", where])


def test_a_download_of_weights_is_one_line_of_ours(tmp_path, monkeypatch, capsys):
    from kd.models.torchvision_nets import download_weights, pretrained

    def download(url, file, *_, **__):
        torch.save({"a": torch.ones(1)}, file)

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    entry = pretrained("squeezenet1_1", "imagenet")
    for _ in range(2):
        assert download_weights(entry).keys() == {"a"}
    printed = capsys.readouterr()
    assert printed.err == ""
    (line,) = printed.out.splitlines()
    assert line.startswith(f"downloading {entry} to {tmp_path}")


@pytest.mark.parametrize("flag", ["--output_dir", "--data.cache_dir"])
def test_a_folder_cannot_be_made_below_a_file(train, out, image_folder, flag):
    (out / ".file").write_bytes(NOTES)
    source = ("--data.source", image_folder, "--data.num_train", "null")
    assert_one_line(train(*source, flag, out / ".file" / "below"), ".file")
    assert (out / ".file").read_bytes() == NOTES


def test_output_dir_is_a_file(train, tmp_path):
    (tmp_path / "file").write_bytes(NOTES)
    assert_one_line(train("--output_dir", tmp_path / "file"), "output_dir", "is a file")
    assert (tmp_path / "file").read_bytes() == NOTES


# Teachers


def flip_a_byte(folder: Path) -> None:
    content = bytearray((folder / "model.safetensors").read_bytes())
    content[len(content) // 2] ^= 1
    (folder / "model.safetensors").write_bytes(content)


def truncate(folder: Path) -> None:
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[: len(content) // 2])


def edit_config(folder: Path, **changes) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


DAMAGE = {
    "a flipped byte": flip_a_byte,
    "truncated weights": truncate,
    "empty weights": lambda folder: (folder / "model.safetensors").write_bytes(b""),
    "config.json of garbage": lambda folder: (folder / "config.json").write_bytes(b"\xff{"),
    "truncated config.json": lambda folder: (folder / "config.json").write_text('{"model": "mnist_tea'),
    "config.json of something else": lambda folder: (folder / "config.json").write_text('{"a": 1}'),
    "config.json that is a list": lambda folder: (folder / "config.json").write_text("[]"),
    "config.json of another network": lambda folder: edit_config(folder, model="light_nn"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_run_as_teacher_and_in_evaluate(refused, call, teacher, damage):
    DAMAGE[damage](teacher)
    before = contents(teacher)
    refused(("--teacher", teacher), [str(teacher), "damaged"], script="distill")
    assert_one_line(call("evaluate", teacher, "--latency", "false"), str(teacher), "damaged")
    assert contents(teacher) == before


def leave_only(folder: Path, *names: str) -> None:
    for path in folder.iterdir():
        if path.is_file() and path.name not in names:
            path.unlink()


@pytest.mark.parametrize(
    ("left", "words"),
    [(["config.yaml"], ["is not finished", "run its command again"]), ([], ["is no run folder", "config.json"])],
)
def test_unfinished_run_as_teacher_and_in_evaluate(refused, call, teacher, left, words):
    leave_only(teacher, *left)
    refused(("--teacher", teacher), [str(teacher), *words], script="distill")
    assert_one_line(call("evaluate", teacher), str(teacher), *words)


def test_evaluate_a_missing_run(call, tmp_path):
    assert_one_line(call("evaluate", tmp_path / "nowhere"), "nowhere", "no such folder")


def test_evaluate_without_a_run(call):
    assert_one_line(call("evaluate"), "runs")


def test_evaluate_without_a_summary(call, teacher):
    (teacher / "summary.json").unlink()
    assert_one_line(call("evaluate", teacher), str(teacher), "not finished", "summary.json")


@pytest.mark.parametrize("content", [b"\xff\x80", b"{", b""])
@pytest.mark.parametrize("name", ["summary.json", "config.yaml"])
def test_evaluate_a_run_with_a_damaged_record(call, teacher, name, content):
    (teacher / name).write_bytes(content)
    assert_one_line(call("evaluate", teacher, "--latency", "false"), str(teacher))


def test_evaluate_on_other_classes(call, teacher, image_folder):
    assert_one_line(call("evaluate", teacher, "--source", image_folder), str(teacher), "different classes")


def test_evaluate_on_fewer_images_than_the_run_was_trained_on(call, teacher, tmp_path):
    """What the run's training split was cut to says nothing about another source."""
    for i, split in itertools.product(range(10), ("train", "test")):
        write_image(tmp_path / "few" / split / str(i) / "a.png", (20 * i, 99, 99), size=(8, 8))
    result = call("evaluate", teacher, "--source", tmp_path / "few", "--latency", "false")
    assert result.status == 0, result.err


def test_evaluate_on_a_split_that_is_not_there(call, teacher):
    assert_one_line(call("evaluate", teacher, "--split", "val"), "without a validation split", "--split test")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--corruption", "fog"), ["corruption", "fog", "gaussian_noise", "contrast"]),
        (("--corruption", "blur"), ["corruption blur needs a severity from 1 to 5"]),
        (("--corruption", "blur", "--severity", 6), ["severity: '6'", "one of [1, 2, 3, 4, 5]"]),
        (("--corruption", "all", "--severity", 2), ["severity 2 needs one corruption", "all measures every severity"]),
        (("--severity", 2), ["severity 2 needs one corruption", "--corruption blur"]),
        (("--taps", "[pool]"), ["taps 'pool'", "STUDENT_MODULE:TEACHER_MODULE"]),
        (("--format", "html"), ["format", "html", "markdown"]),
        (("--baseline", "runs/other"), ["unknown baseline 'runs/other'", "one of the runs"]),
    ],
)
def test_evaluate_refuses(call, flags, words):
    assert_one_line(call("evaluate", "runs/x", *flags), *words)


def test_teacher_of_other_classes(refused, teacher, image_folder):
    arguments = ("--data.source", image_folder, "--data.num_train", "null", "--data.crop", 28)
    words = ["other classes than the data", "does not know blue, green, red", "does not have 0, 1, 2, 3, 4 and 5 more"]
    refused((*arguments, "--teacher", teacher), words, script="distill")


def test_teacher_of_the_same_classes_in_another_order(train, teacher, runs):
    """Its logits are put into the data's order by name."""
    order = [3, 1, 4, 0, 5, 9, 2, 6, 8, 7]
    edit_config(teacher, classes=[str(i) for i in order])  # now its output 0 stands for class 3
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (5, 1, 8, 8), dtype=np.uint8))
    classes = [str(i) for i in range(10)]
    raw = load_classifier(runs / "teacher")(images)
    logits = load_teachers(str(teacher), classes, "logits", torch.device("cpu")).logits({"image": images})
    assert not torch.equal(logits, raw)
    for place, name in enumerate(order):
        assert torch.equal(logits[:, name], raw[:, place])
    assert train("--teacher", teacher, script="distill").status == 0


def test_one_bad_teacher_of_several(refused, teacher, tmp_path):
    names = json.dumps([str(teacher), str(tmp_path / "nowhere")])
    refused(("--teacher", names), ["nowhere", "no such folder"], script="distill")


# First weights


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("content", [b"", b"garbage"])
def test_weights_file_of_garbage(refused, tmp_path, suffix, content):
    path = tmp_path / f"weights{suffix}"
    path.write_bytes(content)
    refused(("--weights", path), [f"weights '{path}'"])


def test_weights_file_that_could_run_code(refused, tmp_path):
    torch.save(build_network("mnist_student", 10), tmp_path / "whole.pth")
    refused(("--weights", tmp_path / "whole.pth"), ["whole.pth", "cannot be read"])


@pytest.mark.parametrize(
    "saved",
    [
        pytest.param(lambda state: {}, id="empty"),
        pytest.param(lambda state: {"epoch": 3, "model_state_dict": state}, id="of another layout"),
        pytest.param(lambda state: list(state.values()), id="list"),
        pytest.param(lambda state: next(iter(state.values())), id="one tensor"),
        pytest.param(lambda state: {f"backbone.{name}": tensor for name, tensor in state.items()}, id="prefixed"),
    ],
)
def test_weights_file_that_holds_something_else(refused, tmp_path, saved):
    torch.save(saved(build_network("mnist_student", 10).state_dict()), tmp_path / "weights.pth")
    refused(("--weights", tmp_path / "weights.pth"), ["weights.pth"])


def test_weights_of_another_network(refused, tmp_path):
    safetensors.torch.save_file(build_network("mnist_teacher", 10).state_dict(), tmp_path / "other.safetensors")
    refused(("--weights", tmp_path / "other.safetensors"), ["other.safetensors", "do not fit mnist_student"])


def test_init_from_another_network(refused, teacher):
    refused(("--init_from", teacher), ["init_from", "mnist_teacher", "does not fit mnist_student"])


def test_init_from_other_classes(refused, teacher):
    edit_config(teacher, classes=[f"digit {i}" for i in range(10)])
    refused(("--init_from", teacher, "--model", "mnist_teacher"), ["init_from", "other classes"])


# Training that breaks

BREAKING = '''
import torch
import torch.nn.functional as F

from kd.losses import Loss


class Breaks(Loss):
    """Cross entropy that breaks from a step on, counted from 1: its value, or its gradient alone."""

    needs_teacher = False

    def __init__(self, step: int, gradient_only: bool = False, weight: float = 1.0):
        super().__init__(weight)
        self.step, self.gradient_only, self._calls = step, gradient_only, 0

    def forward(self, student, teacher, batch):
        self._calls += 1
        loss = F.cross_entropy(student.logits, batch.labels)
        if self._calls < self.step:
            return loss
        if self.gradient_only:  # the root of 0: its value is 0, its slope infinite
            return loss + (student.logits * 0).square().sum().sqrt()
        return loss * float("nan")
'''


@pytest.fixture
def breaking(tmp_path, monkeypatch):
    """`--losses` that break at a step."""
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "breaking_loss.py").write_text(BREAKING)
    monkeypatch.syspath_prepend(tmp_path / "modules")
    return lambda step, **more: ("--losses", losses(("breaking_loss.Breaks", {"step": step, **more})))


def all_finite(tensors: dict[str, dict[str, torch.Tensor]]) -> bool:
    return all(tensor.isfinite().all() for named in tensors.values() for tensor in named.values())


def test_a_learning_rate_that_is_too_large(refused):
    arguments = ("--optimizer.name", "sgd", "--optimizer.lr", 1e30, "--max_steps", 4)
    refused(arguments, ["not finite at step 2", "--optimizer.lr", "1e+30", "there is no checkpoint yet"])


def test_the_last_good_checkpoint_stays(refused, out, breaking):
    words = ["not finite at step 4", "--optimizer.clip_norm", "the checkpoint of step 3 is kept"]
    refused((*breaking(4), "--checkpoint_every", 1, "--max_steps", 6, "--log_every", 50), words)
    progress, tensors = load_newest(out / "checkpoints")
    assert progress.step == 3
    assert all_finite(tensors)


@pytest.mark.parametrize("last", [2, 6])
def test_a_gradient_that_is_not_finite_leaves_no_bad_weights(refused, out, breaking, last):
    """The loss of that step is finite, but the weights after it are not: neither a checkpoint nor a result may be."""
    arguments = (*breaking(2, gradient_only=True), "--checkpoint_every", 1, "--max_steps", last)
    refused(arguments, ["not finite", "the checkpoint of step 1 is kept"])
    progress, tensors = load_newest(out / "checkpoints")
    assert progress.step == 1
    assert all_finite(tensors)


def test_no_space_left(train, out, monkeypatch):
    import kd.train.checkpoint

    write, calls = kd.train.checkpoint.write_synced, []

    def full(path, content):
        calls.append(path)
        if len(calls) > 4:  # a checkpoint is three files: this is within the second
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        write(path, content)

    with monkeypatch.context() as patched:
        patched.setattr(kd.train.checkpoint, "write_synced", full)
        result = train("--checkpoint_every", 1)
    assert_one_line(result, "no space left", str(out), "run the same command")
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["step_00000001"]
    assert load_newest(out / "checkpoints")[0].step == 1
    result = train("--checkpoint_every", 1)
    assert result.status == 0, result.err
    assert "resuming after step 1" in result.out


def test_a_damaged_checkpoint_is_passed_over(train, out, breaking):
    arguments = ("--checkpoint_every", 1, "--max_steps", 4)
    assert train(*breaking(4), *arguments).status == 2
    newest = checkpoints(out / "checkpoints")[0]
    flipped = bytearray((newest / "distiller.safetensors").read_bytes())
    flipped[-1] ^= 1
    (newest / "distiller.safetensors").write_bytes(flipped)
    result = train(*breaking(4), *arguments)
    assert f"{newest} is damaged" in result.out
    assert "resuming after step 2" in result.out
    assert result.status == 0, result.err  # the loss counts its calls from 0 again


# Output folders


def test_a_finished_run_is_left_alone(train, finished):
    before = contents(finished)
    result = train()
    assert result.status == 0
    assert "finished already; nothing to do" in result.out
    assert "--overwrite true" in result.out
    assert contents(finished) == before


def test_a_run_of_another_config_is_refused(train, finished):
    before = contents(finished)
    result = train("--optimizer.lr", 0.5, "--seed", 3)
    assert_one_line(result, "optimizer.lr (0.001 there, 0.5 here)", "seed (0 there, 3 here)", "--overwrite true")
    assert contents(finished) == before


def test_fields_that_do_not_change_the_result_may_differ(train, finished, tmp_path):
    assert train("--project", "other", "--checkpoint_every", 7, "--data.cache_dir", tmp_path).status == 0


@pytest.mark.parametrize("config", [b"\xff\x80", b"a: [", b"text", b""])
def test_a_run_whose_config_is_damaged_is_refused(train, out, config):
    (out / "config.yaml").write_bytes(config)
    (out / "summary.json").write_text("{}")
    before = contents(out)
    assert_one_line(train(), str(out))
    assert contents(out) == before


@pytest.mark.parametrize("files", [["notes.txt", "thesis.tex"], ["config.json", "model.safetensors"], ["summary.json"]])
def test_a_folder_of_other_files_is_refused(train, tmp_path, files):
    """Also where the files have names that a run uses: they are another program's."""
    folder = tmp_path / "foreign"
    folder.mkdir()
    for name in files:
        (folder / name).write_bytes(NOTES)
    before = contents(folder)
    assert_one_line(train("--output_dir", folder), str(folder), "no run", files[0])
    assert contents(folder) == before


def test_overwrite_deletes_a_run_and_nothing_else(train, finished):
    (finished / "notes.txt").write_bytes(NOTES)
    assert train("--seed", 3, "--overwrite", "true").status == 0
    assert (finished / "notes.txt").read_bytes() == NOTES
    assert yaml.safe_load((finished / "config.yaml").read_text())["seed"] == 3


@pytest.mark.parametrize(
    "mistake",
    [("--model", "mnist_studnt"), ("--data.source", "digit"), ("--weights", "nowhere.pth"), ("--data.resize", 27)],
)
def test_overwrite_with_a_mistake_deletes_nothing(train, finished, mistake):
    before = contents(finished)
    assert_one_line(train("--overwrite", "true", *mistake))
    assert contents(finished) == before


@pytest.mark.parametrize("mistake", [("--model", "mnist_studnt"), ("--data.source", "digit")])
def test_a_mistake_does_not_take_the_folder(train, mistake):
    """The corrected command works at once: nothing was trained that it could differ from."""
    assert_one_line(train(*mistake))
    result = train()
    assert result.status == 0, result.err


def test_a_folder_in_use_is_refused(train, out):
    with FileLock(out / ".lock"):
        (out / ".owner").write_text("process 123 on node7\n")
        result = train("--overwrite", "true")
    assert_one_line(result, str(out), "in use by process 123 on node7", "output_dir")
    assert (out / ".notes").read_bytes() == NOTES
    assert not (out / "config.yaml").exists()
    assert train().status == 0


def test_a_refused_run_lets_the_folder_go(train, finished):
    assert_one_line(train("--seed", 3), "another config")
    with FileLock(finished / ".lock", timeout=0):
        pass
