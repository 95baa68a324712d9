"""The loss and the learner that CONTRIBUTING.md shows work as it says; the loss passes what every loss must pass."""

from __future__ import annotations

import importlib.util
import re
import sys

import pytest
import test_losses
import torch
from conftest import ROOT

import kd
from kd.losses import LOSSES
from kd.train.checkpoint import load_newest


@pytest.fixture
def example(tmp_path, monkeypatch) -> tuple[object, str]:
    """The example's module, listed in LOSSES, and the source of its test."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    module_source, test_source, _ = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
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
    test_losses.test_every_loss_resumes_exactly_from_its_state("LogitsHuber")
    test_losses.test_every_loss_lists_its_paper("LogitsHuber")


def test_the_example_trains(example, call, teacher_run, tmp_path):
    arguments = ("--student", "mnist_student", "--data.resize", 28, "--data.num_train", 200, "--epochs", 1)
    loss = '[{"class_path": "huber_example.LogitsHuber", "init_args": {"delta": 2.0}}]'
    result = call("distill", *arguments, "--teacher", teacher_run, "--losses", loss, "--output_dir", tmp_path / "run")
    assert result.status == 0, result.err
    assert "1 * LogitsHuber(delta=2.0)" in result.out + result.err
    wrong = loss.replace('"delta"', '"standardise"')
    refused = call("distill", *arguments, "--teacher", teacher_run, "--losses", wrong)
    assert "unknown argument of LogitsHuber 'standardise' (did you mean 'standardize'?); known" in refused.err
    assert "delta, standardize, weight" in refused.err


def test_the_learner_and_its_loss_train_and_resume(call, tmp_path, monkeypatch):
    text = (ROOT / "CONTRIBUTING.md").read_text()
    source, recipe = re.search(r"```python\n(# my_learner\.py.*?)```\n\n```yaml\n(.*?)```", text, re.DOTALL).groups()
    (tmp_path / "my_learner.py").write_text(source)
    (tmp_path / "recipe.yaml").write_text(recipe)
    monkeypatch.syspath_prepend(tmp_path)
    arguments = ("--config", tmp_path / "recipe.yaml", "--student", "mnist_student", "--data.resize", 28)
    arguments = (*arguments, "--data.num_train", 100, "--epochs", 2, "--report_to", "none", "--output_dir")
    result = call("distill", *arguments, tmp_path / "whole")
    assert result.status == 0, result.err
    assert "1 * KL[second<student](temperature=2.0) + 0.1 * Margin[second<student]" in result.out
    assert call("distill", *arguments, tmp_path / "cut", "--max_steps", 2).status == 0
    state = load_newest(tmp_path / "cut" / "checkpoints")[1]
    assert {"learner.head.weight", "learner.head.bias"} <= state["distiller"].keys()
    kd.load(tmp_path / "whole")  # the student alone: what else was trained is not needed
