"""The loss that CONTRIBUTING.md shows is added as it says, and passes what every loss must pass."""

from __future__ import annotations

import importlib.util
import re
import sys

import pytest
import test_losses
import torch
from conftest import ROOT

from kd.losses import LOSSES


@pytest.fixture
def example(tmp_path, monkeypatch) -> tuple[object, str]:
    """The example's module, listed in LOSSES, and the source of its test."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    module_source, test_source = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    file = tmp_path / "huber_example.py"
    file.write_text(module_source)
    spec = importlib.util.spec_from_file_location("huber_example", file)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "huber_example", module)
    spec.loader.exec_module(module)
    monkeypatch.setitem(LOSSES, "LogitsHuber", module.LogitsHuber)
    return module, test_source


def test_the_example_equals_its_reference(example):
    module, source = example
    names = {"torch": torch, "pytest": pytest, "huber": module.huber}
    exec(source, names)
    names["test_huber_equals_loops"]()


def test_the_example_passes_what_every_loss_must(example):
    for size, num_classes in ((1, 2), (6, 1000)):
        test_losses.test_every_loss_is_finite_far_out_and_in_half_precision("LogitsHuber", num_classes, size)
    test_losses.test_every_loss_is_weighted_and_trains_exactly_what_is_its_own("LogitsHuber")
    test_losses.test_every_loss_goes_on_exactly_from_its_state("LogitsHuber")
    test_losses.test_every_loss_lists_its_paper("LogitsHuber")


def test_the_example_trains(example, call, teacher_run, tmp_path):
    arguments = ("--student", "mnist_student", "--data.resize", 28, "--data.num_train", 200, "--epochs", 1)
    loss = '[{"class_path": "huber_example.LogitsHuber", "init_args": {"delta": 2.0}}]'
    result = call("distill", *arguments, "--teacher", teacher_run, "--losses", loss, "--output_dir", tmp_path / "run")
    assert result.status == 0, result.err
    assert "1 * LogitsHuber(delta=2.0)" in result.out + result.err
