"""The recipes of the CIFAR comparison: all are written, accepted, and their terms fit their networks."""

from __future__ import annotations

import functools
import importlib.util
import sys

import pytest
import torch
import yaml
from conftest import ROOT

from kd.losses import LOSSES
from kd.run.config import DistillConfig, TeacherConfig
from kd.run.parse import parse

pytestmark = pytest.mark.first_tier(1)


def load(path):
    """A script outside the packages, as a module."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


comparison = load(ROOT / "recipes/comparison.py")
PAIRS = list(comparison.published())


@functools.cache
def config_of(path) -> DistillConfig:
    return parse(DistillConfig, ["--config", str(path)])


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    return comparison.write("cifar100", tmp_path_factory.mktemp("recipes"))


def test_every_loss_of_the_library_has_its_method():
    used = {name for _, terms in comparison.METHODS.values() for name, _ in terms}
    plain = {"CosineEmbedding", "DoubleSoftmax", "FeatureDistance", "LogitsMSE", "SoftCrossEntropy", "SoftMAE"}
    plain |= {"ABKD", "BinaryKL", "HardLabels", "OFA", "WKDF", "WTTM"}  # no published weights for all these pairs
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
    parse(TeacherConfig, ["--config", str(next(path for path in written if path.stem == "resnet56"))])
    mobile = next(path for path in written if path.parts[-2] == "vgg13_cifar_mobilenet_v2_half")
    assert yaml.safe_load(mobile.read_text())["optimizer"]["lr"] == 0.01


# What the published comparison gives each term, in order, for resnet56 to resnet20.
WEIGHTS = {
    **{"kd": [0.9, 0.1], "kd_standardized": [9, 0.1], "ctkd": [0.9, 0.1], "mlkd": [0.9, 0.1], "dkd": [1, 1]},
    **{"fitnet": [100, 1], "at": [1000, 1], "sp": [3000, 1], "cc": [0.02, 1], "vid": [1, 1], "rkd": [1, 1]},
    **{"pkt": [3e4, 1], "ab": [1, 1], "ft": [200, 1], "fsp": [50, 1], "nst": [50, 1], "crd": [0.8, 1]},
    **{"ofd": [1e-3, 1], "reviewkd": [0.6, 1], "ickd": [2.5, 1]},
}
SETTINGS = {
    "kd": {"temperature": 4},
    "kd_standardized": {"temperature": 2, "standardize": True},
    "dkd": {"alpha": 1, "beta": 2, "temperature": 4, "warmup_epochs": 20},
    "dist": {"beta": 2, "gamma": 2, "temperature": 4},
    "ikl": {"alpha": 1, "beta": 4, "temperature": 4, "pair_temperature": 100, "warmup_epochs": 20},
    "rld": {"alpha": 1, "beta": 8, "temperature": 4, "warmup_epochs": 20},
    "rkd": {"distance_weight": 25, "angle_weight": 50},
    "crd": {"negatives": 16384, "temperature": 0.07, "momentum": 0.5, "dimensions": 128},
    "reviewkd": {"warmup_epochs": 20},
}


@pytest.mark.parametrize("method", WEIGHTS | SETTINGS)
def test_weights_and_settings_are_the_published_ones(written, method):
    path = next(path for path in written if path.parts[-2:] == ("resnet56_resnet20", f"{method}.yaml"))
    losses = config_of(path).losses
    assert [loss.weight for loss in losses] == WEIGHTS.get(method, [1, 1])
    assert {name: getattr(losses[0], name) for name in SETTINGS.get(method, {})} == SETTINGS.get(method, {})


def test_weights_that_differ_by_the_pair(written):
    found = {}
    for path in written:
        if path.stem in ("dkd", "ikl", "reviewkd"):
            arguments = yaml.safe_load(path.read_text())["losses"][0]["init_args"]
            found[path.parent.name, path.stem] = arguments.get("beta", arguments.get("weight"))
    assert found["resnet110_resnet32", "dkd"] == 2
    assert found["wrn_40_2_wrn_16_2", "dkd"] == found["vgg13_cifar_mobilenet_v2_half", "dkd"] == 6
    assert found["resnet32x4_resnet8x4", "dkd"] == found["resnet32x4_shufflenet_v2_cifar", "dkd"] == 8
    assert found["resnet110_resnet32", "ikl"] == found["vgg13_cifar_mobilenet_v2_half", "ikl"] == 12
    assert found["resnet32x4_resnet8x4", "ikl"] == 8
    assert found["resnet110_resnet32", "reviewkd"] == 1
    assert found["resnet32x4_shufflenet_v2_cifar", "reviewkd"] == 8
    assert found["resnet32x4_resnet8x4", "reviewkd"] == 5


@pytest.mark.parametrize("method", comparison.METHODS)
def test_a_recipe_of_every_method_is_accepted(written, method):
    path = next(path for path in written if path.parts[-2:] == ("resnet56_resnet20", f"{method}.yaml"))
    config = config_of(path)
    assert [loss.name for loss in config.losses] == [name for name, _ in comparison.METHODS[method][1]]
    assert config.output_dir == f"runs/cifar100/resnet56_resnet20/{method}"
    assert config.teacher == "runs/cifar100/networks/resnet56"


@pytest.mark.parametrize("method", comparison.METHODS)
def test_one_step_of_every_method(method):
    job = load(ROOT / "benchmarks/losses.py").Job(method, "resnet20", "resnet8", 4, torch.device("cpu"))
    before = {name: p.clone() for name, p in job.distiller.learner.student.named_parameters()}
    job.step()
    moved = [name for name, p in job.distiller.learner.student.named_parameters() if not torch.equal(p, before[name])]
    assert moved
    assert all(p.isfinite().all() for p in job.distiller.parameters())


@pytest.mark.slow
@pytest.mark.parametrize(("teacher", "student"), PAIRS)
def test_every_method_fits_every_pair(written, teacher, student):
    job = load(ROOT / "benchmarks/losses.py").Job
    for path in written:
        if path.parts[-2] == f"{teacher}_{student}":
            job(path.stem, teacher, student, 2, torch.device("cpu"))
