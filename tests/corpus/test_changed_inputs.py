"""A run remembers what it learned from: data or teachers that have changed since are named, not used in silence."""

from __future__ import annotations

import json
import os
import shutil
import signal

import numpy as np
import pytest
import safetensors.torch
from conftest import assert_one_line, write_image
from PIL import Image
from refusing import (  # noqa: F401 (fixtures)
    QUICK,
    _one_thread,
    during,
    finished,
    out,
    runs,
    stopped,
    teacher,
    train,
)

pytestmark = pytest.mark.first_tier(1, every=5)

COLOURS = {"red": (200, 60, 60), "green": (60, 200, 60), "blue": (60, 60, 200)}


@pytest.fixture
def pictures(image_folder):
    """A folder of images without a test split: 48 of three classes."""
    for path in (image_folder / "test").rglob("*.png"):
        path.rename(image_folder / "train" / path.parent.name / f"more_{path.name}")
    shutil.rmtree(image_folder / "test")
    return image_folder


@pytest.fixture
def on_pictures(pictures):
    """Arguments to train on them."""
    return ("--data.source", pictures, "--data.num_train", "null", "--data.crop", 28, "--data.test_fraction", 0.25)


def evaluate(call, run, *arguments):
    return call("evaluate", run, "--latency", "false", *arguments)


def add(pictures, count: int = 6) -> None:
    for name, colour in COLOURS.items():
        for i in range(count):
            write_image(pictures / "train" / name / f"0_{i}.png", colour, seed=100 + i)


def swap(pictures) -> None:
    """Two classes change their names."""
    for name, other in (("red", "aside"), ("green", "red"), ("aside", "green")):
        (pictures / "train" / name).rename(pictures / "train" / other)


def brighten(file) -> None:
    """Another file, whose image looks the same."""
    pixels = np.asarray(Image.open(file)).astype(int) + 1
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(file)


# evaluate.py


@pytest.mark.slow
def test_a_split_that_is_carved_from_changed_images_is_not_measured_on(train, call, out, pictures, on_pictures):
    """It would hold images that the run was trained on."""
    assert train(*on_pictures).status == 0
    assert evaluate(call, out).status == 0
    add(pictures)
    words = ("the test split differs from that of training (12 images in training, 18 now)", str(pictures), "--source")
    assert_one_line(evaluate(call, out), *words)
    assert evaluate(call, out, "--source", pictures).status == 0


@pytest.mark.slow
def test_labels_that_have_changed_are_not_measured_with(train, call, out, pictures, on_pictures):
    assert train(*on_pictures).status == 0
    swap(pictures)
    assert_one_line(evaluate(call, out), "the test split differs", "other images")
    (pictures / "train" / "blue").rename(pictures / "train" / "brown")
    assert_one_line(evaluate(call, out))
    (pictures / "train" / "brown").rename(pictures / "train" / "blue")
    swap(pictures)
    assert evaluate(call, out).status == 0


def test_other_pixels_and_another_training_split_are_said(train, call, out, image_folder):
    arguments = ("--data.source", image_folder, "--data.num_train", "null", "--data.crop", 28)
    assert train(*arguments).status == 0
    brighten(image_folder / "test" / "red" / "00.png")
    write_image(image_folder / "train" / "red" / "new.png", COLOURS["red"])
    result = evaluate(call, out)
    assert result.status == 0, result.err
    assert "images of the test split are decoded to slightly other pixels than in training" in result.err
    assert "the train split differs from that of training (36 images in training, 37 now)" in result.err


@pytest.mark.slow
def test_no_temperature_is_fitted_on_images_of_training(train, call, out, image_folder, tmp_path):
    arguments = ("--data.source", image_folder, "--data.num_train", "null", "--data.crop", 28)
    assert train(*arguments, "--data.val_fraction", 0.5).status == 0
    for count, wanted in ((1, float), (2, type(None))):
        if count == 2:
            add(image_folder)
        assert evaluate(call, out, "--json", tmp_path / "r.json").status == 0
        row = json.loads((tmp_path / "r.json").read_text())["runs"][0]
        assert isinstance(row["temperature"], wanted)
    assert any("the val split differs" in note for note in row["notes"])


@pytest.mark.slow
def test_a_run_of_an_earlier_version_is_measured_with_a_note(call, teacher):
    (teacher / "inputs.json").unlink()
    summary = json.loads((teacher / "summary.json").read_text())
    del summary["inputs"]
    (teacher / "summary.json").write_text(json.dumps(summary))
    result = evaluate(call, teacher)
    assert result.status == 0, result.err
    assert "does not say on which data" in result.err


@pytest.mark.slow
def test_a_teacher_that_was_replaced_is_not_compared_with(train, call, runs, teacher, out, tmp_path):
    assert train("--teacher", teacher, script="distill").status == 0
    assert "cannot be compared" not in evaluate(call, out).err
    shutil.rmtree(teacher)
    shutil.copytree(runs / "student", teacher)
    result = evaluate(call, out, "--json", tmp_path / "r.json")
    assert result.status == 0, result.err
    assert f"{teacher} has other weights by now" in result.err
    assert json.loads((tmp_path / "r.json").read_text())["runs"][0]["agreement"] is None


# Resume


def test_a_run_does_not_go_on_with_other_images(train, stopped, out, pictures, on_pictures):
    stopped(*on_pictures)
    add(pictures)
    result = train("--max_steps", 4, *on_pictures)
    assert_one_line(result, str(out), "its train split differs", "its test split differs", "--overwrite true")
    assert (out / "checkpoints").is_dir()
    assert train("--max_steps", 4, *on_pictures, "--overwrite", "true").status == 0


def test_a_run_does_not_go_on_with_permuted_labels(train, stopped, out, pictures, on_pictures):
    stopped(*on_pictures)
    swap(pictures)
    assert_one_line(train("--max_steps", 4, *on_pictures), str(out), "its train split differs (other images)")


def test_a_run_does_not_go_on_with_another_teacher(train, during, runs, teacher, out):
    arguments = ("--teacher", teacher, "--max_steps", 4)
    during(lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert train(*arguments, script="distill").status == 128 + signal.SIGTERM
    shutil.rmtree(teacher)
    shutil.copytree(runs / "student", teacher)
    assert_one_line(train(*arguments, script="distill"), f"the weights of '{teacher}' were replaced")


def test_a_run_resumes_with_other_pixels_and_says_so(train, stopped, image_folder):
    arguments = ("--data.source", image_folder, "--data.num_train", "null", "--data.crop", 28)
    stopped(*arguments)
    brighten(image_folder / "train" / "blue" / "00.png")
    result = train("--max_steps", 4, *arguments)
    assert result.status == 0, result.err
    assert "images of the train split are decoded to slightly other pixels than in training" in result.out


def test_a_run_of_an_earlier_version_resumes_with_a_note(train, stopped, out):
    stopped()
    (out / "inputs.json").unlink()
    result = train("--max_steps", 4)
    assert result.status == 0, result.err
    assert "was begun by an earlier version" in result.out


def test_a_run_killed_before_it_wrote_its_inputs_writes_them_later(train, finished, out):
    for name in ("inputs.json", "summary.json"):
        (out / name).unlink()
    shutil.rmtree(out / "checkpoints")
    assert "earlier version" not in train().out
    assert (
        json.loads((out / "inputs.json").read_text())["data"]
        == json.loads((out / "summary.json").read_text())["inputs"]["data"]
    )


# What a teacher has seen


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--data.split_seed", 7), ["of the 50 test images", "data.split_seed 0 (here 7)"]),
        (("--data.test_fraction", 0.3), ["test images", "data.test_fraction 0.03 (here 0.3)"]),
        (("--data.val_fraction", 0.5), ["of the 872 validation images", "data.val_fraction 0.0 (here 0.5)"]),
    ],
)
def test_a_teacher_that_has_seen_the_images_is_said(train, runs, flags, words):
    all_of_it = ("--data.num_train", "null", "--output_dir", runs / "whole", "--model", "mnist_teacher")
    assert train(*all_of_it, "--overwrite", "true").status == 0
    result = train("--teacher", runs / "whole", *flags, script="distill")
    assert result.status == 0, result.err
    (line,) = [line for line in result.out.splitlines() if line.startswith("teacher ")]
    assert "has seen" in line
    for word in words:
        assert word in line


def test_how_many_images_a_teacher_has_seen_is_counted(train, runs):
    from kd.data import load_data
    from kd.run.config import DataConfig

    mine = load_data(DataConfig(split_seed=7, val_fraction=0, test_fraction=0.03))
    theirs = load_data(DataConfig(split_seed=0, val_fraction=0, test_fraction=0.03, num_train=20))
    count = len(np.intersect1d(theirs.train.places, mine.test.places))
    result = train("--teacher", runs / "teacher", "--data.split_seed", 7, script="distill")
    said = f"has seen {count} of the {len(mine.test)} test images"
    assert (said in result.out) == bool(count)


def test_a_teacher_of_the_same_split_or_of_other_images_is_not_said(train, runs, image_folder):
    assert "has seen" not in train("--teacher", runs / "teacher", script="distill").out


def test_first_weights_that_were_replaced_are_noticed(train, runs, tmp_path):
    weights, out = tmp_path / "w.safetensors", ("--output_dir", tmp_path / "run")
    shutil.copy(runs / "teacher/model.safetensors", weights)
    command = ("--model", "mnist_teacher", "--weights", weights, "--freeze_backbone", "true", *out)
    assert train(*command, "--max_steps", 2).status == 0
    content = safetensors.torch.load_file(weights)
    safetensors.torch.save_file({name: tensor + 1 for name, tensor in content.items()}, weights)
    (tmp_path / "run/summary.json").unlink()
    assert_one_line(train(*command, "--max_steps", 2), "began with other inputs", str(weights), "were replaced")


# Records that hold something else


@pytest.mark.parametrize(
    "content", ["{", "[]", '{"data": 5}', '{"data": {"test": {}}, "weights": {}}', '{"weights": 1}']
)
def test_a_damaged_record_of_inputs(train, stopped, out, content):
    stopped()
    (out / "inputs.json").write_text(content)
    assert_one_line(train("--max_steps", 4), str(out), "inputs.json")
