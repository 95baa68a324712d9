"""The recipes of the CIFAR comparison: all are written, accepted, and their terms fit their networks."""

from __future__ import annotations

import importlib.util
import sys

import pytest
import torch
import yaml
from conftest import ROOT

from kd.config import DistillConfig, TeacherConfig
from kd.losses import LOSSES
from kd.parse import parse


def load(path):
    """A script outside the packages, as a module."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


comparison = load(ROOT / "recipes/comparison.py")
PAIRS = list(comparison.published())


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    return comparison.write("cifar100", tmp_path_factory.mktemp("recipes"))


def test_every_loss_of_the_library_has_its_method():
    used = {name for _, terms in comparison.METHODS.values() for name, _ in terms}
    plain = {"CosineEmbedding", "DoubleSoftmax", "FeatureDistance", "LogitsMSE", "SoftCrossEntropy", "SoftMAE"}
    assert used == LOSSES.keys() - plain


def test_the_recipes_are_those_of_the_table(written):
    names = {"/".join(path.parts[-2:]) for path in written}
    assert {"networks/resnet56.yaml", "resnet56_resnet20/crd.yaml", "vgg13_cifar_mobilenet_v2_half/kd.yaml"} <= names
    text = next(path for path in written if path.parts[-2:] == ("resnet56_resnet20", "dkd.yaml")).read_text()
    assert "Published: 71.97 % test accuracy of CIFAR-100. Not yet reproduced here." in text
    content = yaml.safe_load(text)
    assert content["losses"][0] == {"class_path": "DKD", "init_args": {"beta": 2.0}}
    assert content["optimizer"]["lr"] == 0.05
    assert content["epochs"] == 240
    mobile = next(path for path in written if path.parts[-2] == "vgg13_cifar_mobilenet_v2_half")
    assert yaml.safe_load(mobile.read_text())["optimizer"]["lr"] == 0.01


@pytest.mark.parametrize("method", comparison.METHODS)
def test_a_recipe_of_every_method_is_accepted(written, method):
    path = next(path for path in written if path.parts[-2:] == ("resnet56_resnet20", f"{method}.yaml"))
    config = parse(DistillConfig, ["--config", str(path)])
    assert [type(loss).__name__ for loss in config.losses] == [name for name, _ in comparison.METHODS[method][1]]
    assert config.output_dir == f"runs/cifar100/resnet56_resnet20/{method}"
    assert config.teacher == "runs/cifar100/networks/resnet56"
    parse(TeacherConfig, ["--config", str(path.parent.parent / "networks/resnet56.yaml")])


@pytest.mark.parametrize("method", comparison.METHODS)
def test_one_step_of_every_method(method):
    job = load(ROOT / "benchmarks/losses.py").Job(method, "resnet20", "resnet8", 4, torch.device("cpu"))
    before = {name: p.clone() for name, p in job.distiller.student.named_parameters()}
    job.step()
    moved = [name for name, p in job.distiller.student.named_parameters() if not torch.equal(p, before[name])]
    assert moved
    assert all(p.isfinite().all() for p in job.distiller.parameters())


@pytest.mark.slow
@pytest.mark.parametrize(("teacher", "student"), PAIRS)
def test_every_method_fits_every_pair(written, teacher, student):
    job = load(ROOT / "benchmarks/losses.py").Job
    for path in written:
        if path.parts[-2] == f"{teacher}_{student}":
            job(path.stem, teacher, student, 2, torch.device("cpu"))
