"""Several processes: images and losses as with one, each image evaluated once, resume at another number."""

from __future__ import annotations

import json
import os
from pathlib import Path

import children
import pytest
import torch
import torch.distributed as dist
from conftest import UNEVEN
from learners import alone as learner_of
from test_resume import assert_same_run, rows

from kd.util.errors import run_script

# SGD: Adam divides by the size of tiny gradients and so magnifies rounding. 200 digits in batches of 48: the epoch's
# last batch has 8 images. light_nn has dropout, whose masks do not depend on the number of processes either.
ARGUMENTS = (*UNEVEN, "--optimizer.name", "sgd", "--optimizer.lr", 0.05, "--checkpoint_every", 4, "--report_to", "none")


def close(one: list[dict], other: list[dict], tolerance: float) -> None:
    assert len(one) == len(other)
    for row, same in zip(one, other, strict=True):
        assert row.keys() == same.keys()
        for key, value in row.items():
            # a norm adds up the rounding of all parameters, which the optimizer has enlarged
            allowed = 10 * tolerance if key == "gradient_norm" else tolerance
            assert same[key] == pytest.approx(value, rel=allowed), (row["step"], key)


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("alone") / "run"
    assert children.run("train_teacher", (*ARGUMENTS, "--output_dir", folder)) == 0
    return folder


@pytest.mark.first_tier(1)
@pytest.mark.parametrize("count", [2, 3])
def test_several_processes_give_the_losses_of_one(alone, tmp_path, count):
    assert children.run_several("train_teacher", (*ARGUMENTS, "--output_dir", tmp_path / "run"), count) == [0] * count
    close(rows(alone), rows(tmp_path / "run"), 1e-4)
    one, several = (json.loads((folder / "summary.json").read_text()) for folder in (alone, tmp_path / "run"))
    assert several["num_processes"] == count
    assert several["test_accuracy"] == one["test_accuracy"]
    assert several["test_nll"] == pytest.approx(one["test_nll"], rel=1e-4)


@pytest.mark.first_tier(1)
@pytest.mark.parametrize("accumulate", [5, 2])
def test_accumulation_gives_the_same_losses(alone, tmp_path, call, accumulate):
    command = (*ARGUMENTS, "--output_dir", tmp_path / "run", "--accumulate", accumulate)
    assert call("train_teacher", *command).status == 0
    close(rows(alone), rows(tmp_path / "run"), 1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(("count", "accumulate"), [(2, 3), (4, 1), (4, 3)])
def test_accumulation_on_several_processes_gives_the_same_losses(alone, tmp_path, count, accumulate):
    """The epoch's last 8 images are cut into 2 micro-batches of 1 image on each of 4 processes."""
    command = (*ARGUMENTS, "--output_dir", tmp_path / "run", "--accumulate", accumulate)
    assert (
        children.run_several("train_teacher", command, count, CountReductions(tmp_path / "reductions")) == [0] * count
    )
    close(rows(alone), rows(tmp_path / "run"), 1e-4)
    # gradients are exchanged once a step, however many micro-batches it has: 10 steps, and once before the first
    assert (tmp_path / "reductions").read_text() == "x" * 11


class CountReductions:
    """In the first of several processes: note each time DistributedDataParallel averages gradients."""

    def __init__(self, file: Path):
        self.file = file

    def __call__(self) -> None:
        from torch.nn.parallel import DistributedDataParallel

        first = DistributedDataParallel.forward

        def forward(module, *inputs, **arguments):
            if module.require_backward_grad_sync and os.environ["RANK"] == "0":
                with self.file.open("a") as file:
                    file.write("x")
            return first(module, *inputs, **arguments)

        DistributedDataParallel.forward = forward


def test_the_learning_rate_does_not_depend_on_the_number_of_processes_or_micro_batches(alone):
    assert {row["lr"] for row in rows(alone) if "lr" in row} == {0.05}


@pytest.mark.slow
def test_local_batch_norm_is_measured_as_it_is_saved(tmp_path, call):
    """Each process has running statistics of its own images; those of the first are saved, so all measure with them."""
    command = (*ARGUMENTS, "--model", "resnet8", "--select", "best", "--accumulate", 2)
    command = (*command, "--output_dir", tmp_path / "run")
    assert children.run_several("train_teacher", command, 2) == [0, 0]
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    for split in ("test", "val"):
        evaluate = ("evaluate", tmp_path / "run", "--split", split, "--latency", "false")
        assert call(*evaluate, "--json", tmp_path / "alone.json").status == 0
        measured = json.loads((tmp_path / "alone.json").read_text())["runs"][0]
        assert measured["top1"] == summary[f"{split}_accuracy"]
        if split == "test":
            assert measured["nll"] == pytest.approx(summary["test_nll"], rel=1e-5)


class FakeAccelerator:
    def __init__(self, num_processes: int, device: str):
        self.num_processes, self.device = num_processes, torch.device(device)


@pytest.fixture
def batch_norm():
    """A small network with batch norm, tapped at one of its layers and with another frozen; and how to choose."""
    from kd.losses import CrossEntropy
    from kd.models import View, build_classifier, freeze
    from kd.run.config import TeacherConfig
    from kd.train.distiller import Distiller
    from kd.train.setup import choose_batch_norm

    classifier = build_classifier("resnet8", ["a", "b"], View(channels=3))
    layers = [module for module in classifier.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    freeze(layers[0])
    distiller, seen = Distiller(learner_of(classifier), [CrossEntropy()]), []
    layers[1].register_forward_hook(lambda *_: seen.append(1))

    def choose(world, device, **settings):
        choose_batch_norm(distiller, TeacherConfig(**settings), FakeAccelerator(world, device))
        return distiller, layers, seen

    return choose


@pytest.mark.parametrize(
    ("world", "settings", "said"),
    [
        (1, {}, ""),
        (1, {"sync_batch_norm": True}, ""),
        (1, {"accumulate": 4}, "batch norm: over 16 images at a time\n"),
        (2, {}, "batch norm: local, over each process's own 32 images (--sync_batch_norm true on GPUs)\n"),
        (4, {"accumulate": 2}, "own 8 images at a time (--sync_batch_norm true on GPUs)\n"),
        (2, {"sync_batch_norm": True}, "batch norm: synchronised, over the 2 processes' 32 images\n"),
    ],
)
def test_batch_norms_choice_is_said(batch_norm, capsys, world, settings, said):
    distiller, layers, seen = batch_norm(world, "cuda", **settings)
    out = capsys.readouterr().out
    assert out.endswith(said)
    assert bool(out) == bool(said)
    synchronised = "synchronised" in said
    kinds = {type(layer) for layer in layers[1:]}
    assert kinds == {torch.nn.SyncBatchNorm if synchronised else torch.nn.BatchNorm2d}
    assert type(layers[0]) is torch.nn.BatchNorm2d  # frozen: it has nothing to synchronise
    assert list(distiller.learner.student.modules()).count(layers[1]) == 1
    assert distiller.train().learner.student(torch.zeros(2, 3, 32, 32, dtype=torch.uint8)).isfinite().all()
    assert seen == [1]  # its hook is still there
    assert not layers[0].training


def test_synchronised_batch_norm_on_cpus_is_refused(batch_norm):
    from kd.util.errors import UserError

    with pytest.raises(UserError, match=r"sync_batch_norm true.* runs on GPUs only.*set it to false"):
        batch_norm(2, "cpu", sync_batch_norm=True)


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 4])
def test_a_run_resumes_with_another_number_of_processes(alone, tmp_path, count):
    """Every row is there once and as on one process, so no image was skipped or seen twice."""
    command = (*ARGUMENTS, "--output_dir", tmp_path / "run")
    assert children.run_several("train_teacher", command, 2, ("kd.train.meter.Meter.add:SIGTERM", 3)) == [143, 143]
    if count == 1:
        assert children.run("train_teacher", command) == 0
    else:
        assert children.run_several("train_teacher", command, count) == [0] * count
    close(rows(alone), rows(tmp_path / "run"), 1e-4)


@pytest.mark.slow
def test_a_run_of_four_processes_resumes_exactly(tmp_path):
    """More than two summands are rounded according to their order, and that to the buckets that gradients are in."""
    for name, sabotage in (("whole", None), ("cut", ("kd.train.meter.Meter.add:SIGTERM", 3))):
        command = (*ARGUMENTS, "--model", "resnet8", "--output_dir", tmp_path / name)
        statuses = children.run_several("train_teacher", command, 4, sabotage)
        assert statuses == ([0] * 4 if sabotage is None else [143] * 4)
    assert children.run_several("train_teacher", command, 4) == [0] * 4
    assert_same_run(tmp_path / "cut", tmp_path / "whole")


@pytest.mark.slow
def test_distillation_and_evaluation_on_two_processes(teacher_run, tmp_path):
    command = ("--config", "recipes/digits/kd.yaml", "--data.num_train", 200, "--epochs", 2, "--log_every", 1)
    command = (*command, "--optimizer.name", "sgd", "--teacher", teacher_run, "--report_to", "none", "--output_dir")
    assert children.run("distill", (*command, tmp_path / "one")) == 0
    assert children.run_several("distill", (*command, tmp_path / "two"), 2) == [0, 0]
    close(rows(tmp_path / "one"), rows(tmp_path / "two"), 1e-4)
    for count in (1, 2):
        evaluate = (tmp_path / "one", "--json", tmp_path / f"{count}.json", "--latency", "false")
        evaluate = (*evaluate, "--taps", "[features.3:features.0]", "--corruption", "gaussian_noise", "--severity", 5)
        assert children.run_several("evaluate", evaluate, count) == [0] * count
    numbers = [json.loads((tmp_path / f"{count}.json").read_text())["runs"][0] for count in (1, 2)]
    assert numbers[0]["num_images"] == numbers[1]["num_images"] == 359
    for key in ("top1", "agreement", "confusion", "per_class", "wrong", "only_teacher_right", "images", "experiment"):
        assert numbers[0][key] == numbers[1][key]
    for key in ("nll", "kl", "temperature"):
        assert numbers[0][key] == pytest.approx(numbers[1][key], rel=1e-5)
    assert numbers[0]["cka"][0]["cka"] == pytest.approx(numbers[1]["cka"][0]["cka"], rel=1e-5)


@pytest.mark.parametrize(("rank", "says"), [("0", True), ("1", True), ("2", False)])
def test_a_process_that_meets_no_other_ends_in_one_line(monkeypatch, capsys, rank, says):
    """The first one was refused, say, and has ended before this one was connected to it."""

    def main():
        raise dist.DistNetworkError("Connection reset by peer")

    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setenv("RANK", rank)
    with pytest.raises(SystemExit) as exit_info:
        run_script(main)
    assert exit_info.value.code == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == says
    assert all("no contact with the other processes (Connection reset by peer)" in line for line in lines)


@pytest.mark.slow
def test_a_failure_on_one_process_is_said_and_ends_both(tmp_path, image_folder):
    (image_folder / "train/red/03.png").write_bytes(b"no image")
    command = ("--model", "light_nn", "--data.source", image_folder, "--output_dir", tmp_path / "run")
    statuses = children.run_several("train_teacher", command, 2)
    assert all(status != 0 for status in statuses)
