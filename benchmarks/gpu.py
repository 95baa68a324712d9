#!/usr/bin/env python
"""On a GPU: the CIFAR-10 tutorial in one command, and a 95 % ResNet-18 teacher with a student distilled from its table.

    python benchmarks/gpu.py --cifar10 cifar10
    python benchmarks/gpu.py --parts teacher95 --rounds 3

tutorial    recipes/cifar10: teacher, student alone and the four distilled students, 10 epochs each, one after the other
            in one process; seconds from its start to its end, imports and tests counted, images decoded before
teacher95   ResNet-18 for 32x32 images (its stem a 3x3 convolution without pooling) with flips and padded crops, then
            resnet20 distilled from its table of views; test accuracies, and images per second of each epoch but the
            first

The loop against its limit on a GPU, and the profile, are limit.py and kernels.py; `run.py` runs them all. Where
there is no GPU this says so and ends.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

from common import ROOT, about, call, child, median, record, spread

STARTED = time.perf_counter()

TUTORIAL = (
    ("teacher", "train_teacher"),
    ("teacher_nodropout", "train_teacher"),
    ("student", "train_teacher"),
    ("student_nodropout", "train_teacher"),
    ("kd", "distill"),
    ("kd_t10", "distill"),
    ("cosine", "distill"),
    ("regressor", "distill"),
)
# the second pair is what kd_t10 starts from; the published time is for the other six
EXTRA = ("teacher_nodropout", "student_nodropout")


def cifar_resnet18(num_classes: int = 10):
    """ResNet-18 for images of 32x32: the usual changes of its first layers.

    Deep Residual Learning for Image Recognition. He et al. CVPR 2016. https://arxiv.org/abs/1512.03385
    """
    from torch import nn
    from torchvision.models import resnet18

    network = resnet18(num_classes=num_classes)
    network.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    network.maxpool = nn.Identity()
    return network


def _run(script: str, arguments: list, folder: str | Path) -> dict:
    """One run in this process: its summary and its images per second."""
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    call(script, [*arguments, "--output_dir", folder])
    rows = [json.loads(line) for line in Path(folder, "metrics.jsonl").read_text().splitlines()]
    speeds = [row["epoch/images_per_second"] for row in rows if "epoch/images_per_second" in row]
    summary = json.loads(Path(folder, "summary.json").read_text())
    speed = median(speeds[1:] or speeds)
    return {"accuracy": summary["test_accuracy"], "seconds": summary["seconds"], "images_per_second": speed}


def tutorial(source: str, epochs: int, seed: int, more: list[str]) -> dict:
    """The tutorial's eight runs: seconds of the process, of its published six, and of each."""
    runs, walls = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        for name, script in TUTORIAL:
            began = time.perf_counter()
            arguments = ["--config", ROOT / f"recipes/cifar10/{name}.yaml", "--data.source", source, "--epochs", epochs]
            if script == "distill":
                pair = "_nodropout" if name == "kd_t10" else ""
                arguments += ["--teacher", f"{folder}/teacher{pair}"]
                arguments += ["--init_from", f"{folder}/student{pair}"] if pair else []
            runs[name] = _run(script, [*arguments, "--seed", seed, *more], f"{folder}/{name}")
            walls[name] = time.perf_counter() - began
    all_seconds = time.perf_counter() - STARTED
    extra = sum(walls[name] for name in EXTRA)
    return {"seconds": all_seconds - extra, "seconds_with_extra": all_seconds, "runs": runs, "wall": walls}


def teacher95(source: str, epochs: int, seed: int, more: list[str]) -> dict:
    """The teacher and the student distilled from its table."""
    views = ["--data.source", source, "--data.val_fraction", 0, "--data.flip", "true", "--data.pad_crop", 4]
    rule = ["--optimizer.name", "sgd", "--optimizer.nesterov", "true", "--optimizer.weight_decay", 5e-4]
    rule += ["--optimizer.schedule", "cosine", "--optimizer.warmup_steps", 400, "--data.batch_size", 128]
    common = [*views, *rule, "--epochs", epochs, "--seed", seed, *more]
    with tempfile.TemporaryDirectory() as folder:
        first = ["--model", "gpu.cifar_resnet18", "--optimizer.lr", 0.1, "--losses", '[{"class_path": "CrossEntropy"}]']
        teacher = _run("train_teacher", [*first, *common], f"{folder}/teacher")
        second = ["--student", "resnet20", "--optimizer.lr", 0.1, "--teacher", f"{folder}/teacher"]
        second += ["--trust_code", "true"]  # the teacher's network is this file's
        student = _run("distill", [*second, *common, "--precompute", "always"], f"{folder}/student")
        again = _run("distill", [*second, *common, "--precompute", "always"], f"{folder}/again")
    return {"teacher": teacher, "student": student, "second_student": again}


PARTS = {"tutorial": (tutorial, 10), "teacher95": (teacher95, 60)}


def measure(part: str, source: str, epochs: int, rounds: int, out: Path | None) -> dict:
    """Rounds of one part, each with its own seed."""
    machine, runs = about(), []
    with tempfile.TemporaryDirectory() as folder:
        child("gpu.py", "decode", source, environment={"KD_CACHE": folder})
        for seed in range(rounds):
            # another seed is another teacher: of what earlier rounds left, only the decoded images are found
            runs.append(child("gpu.py", part, source, epochs, seed, environment={"KD_CACHE": folder}))
            print(f"{part} seed {seed}: {runs[-1]}", flush=True)
            record("gpu", part, {**machine, "epochs": epochs, "runs": runs}, out)
    if part == "tutorial":
        print(f"tutorial: {spread([run['seconds'] for run in runs])} s")
    return {**machine, "epochs": epochs, "runs": runs}


def decode(source: str) -> dict:
    """Decode the set, so that no measured run has to."""
    from kd.data import load_data
    from kd.run.config import DataConfig

    return {"images": len(load_data(DataConfig(source=source, val_fraction=0)).train)}


def main(argv: list[str] | None = None) -> int:
    """Measure and write gpu.json, or say that there is no GPU."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=list(PARTS))
    parser.add_argument("--cifar10", default="cifar10", help="data.source")
    parser.add_argument("--epochs", type=int, help="of each run; 10 for the tutorial and 60 for the teacher by default")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, help="folder of the JSON file")
    parser.add_argument("--child", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.child:
        part, source, *given = arguments.child
        if part == "decode":
            print(json.dumps(decode(source)))
        else:
            print(json.dumps(PARTS[part][0](source, int(given[0]), int(given[1]), given[2:])))
        return 0
    import torch

    if not torch.cuda.is_available():
        print("no GPU: the CIFAR-10 tutorial, the 95 % teacher and the GPU's profile are not measured here")
        return 0
    for part in arguments.parts:
        measure(part, arguments.cifar10, arguments.epochs or PARTS[part][1], arguments.rounds, arguments.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
