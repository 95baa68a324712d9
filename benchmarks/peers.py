#!/usr/bin/env python
"""The scripts against two packages of the registry on the same job: seconds of training, and images per second.

    pip install --no-deps torchdistill timm        # and what they ask for: scipy, cython, huggingface_hub
    python benchmarks/peers.py --cifar10 cifar10 --stl10 stl10

Each side gets the same networks, images, batch size, optimizer, and 0.9 KL at temperature 4 + 0.1 cross entropy:

ours          distill.py; its own choice of table or live teacher, counted from the first look at the teacher
torchdistill  its DistillationBox with KDLoss, as in its example script: `loss.item()` at each step, 2 workers
timm          its LogitDistillationTask with its loader, as in its train.py with --channels-last, 2 workers

On a GPU timm's precision is that of its --amp with bfloat16. torchdistill keeps no teacher outputs in this form.

Jobs: cifar (resnet20 teaches resnet8, 32x32, padded crop and flip), cifar_fixed (the same without random views) and
224 (ResNet-18 teaches MobileNetV3-small, resized to 256 and cropped to 224). Sides alternate, on a part of the images,
which are decoded before; timm leaves out the last batch unless it is whole.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import shutil
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

from common import (
    about,
    child,
    make_teacher,
    median,
    record,
    seconds_to_last_step,
    spread,
    subset,
)

JOBS = {
    "cifar": {"teacher": "resnet20", "student": "resnet8", "batch_size": 128, "views": "random"},
    "cifar_fixed": {"teacher": "resnet20", "student": "resnet8", "batch_size": 128, "views": "fixed"},
    "224": {"teacher": "resnet18", "student": "mobilenet_v3_small", "batch_size": 64, "views": "fixed"},
}
SIZE = ["--data.resize", 256, "--data.crop", 224]
LOSSES = [
    {"class_path": "KL", "init_args": {"temperature": 4.0, "weight": 0.9}},
    {"class_path": "CrossEntropy", "init_args": {"weight": 0.1}},
]
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def ours(job: dict, source: str, epochs: int, teacher: str) -> float:
    """Seconds of `distill.py` until its last step."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = ["--student", job["student"], "--teacher", teacher, "--data.source", source]
        arguments += ["--data.val_fraction", 0, "--data.batch_size", job["batch_size"], "--epochs", epochs]
        arguments += ["--optimizer.name", "sgd", "--optimizer.lr", 0.05, "--output_dir", f"{folder}/run"]
        arguments += ["--losses", json.dumps(LOSSES)]
        arguments += SIZE if job["teacher"] == "resnet18" else []
        arguments += ["--data.flip", "true", "--data.pad_crop", 4] if job["views"] == "random" else []
        return seconds_to_last_step("distill", arguments)


def _pieces(job: dict, source: str, teacher: str):
    """What both peers take: a data set of PIL images, its transform, the two networks, the device."""
    import torch
    from PIL import Image
    from torchvision import transforms

    import kd
    from kd.data import load_data
    from kd.models import View, build_classifier
    from kd.run.config import DataConfig

    split = load_data(DataConfig(source=source, val_fraction=0)).train
    pixels = split.store.images[split.places].transpose(0, 2, 3, 1).copy()
    steps = [transforms.Resize(256), transforms.CenterCrop(224)] if job["teacher"] == "resnet18" else []
    if job["views"] == "random":
        steps = [transforms.RandomCrop(32, padding=4), transforms.RandomHorizontalFlip()]
    transform = transforms.Compose([*steps, transforms.ToTensor(), transforms.Normalize(MEAN, STD)])

    class Images(torch.utils.data.Dataset):
        def __init__(self):
            self.transform = transform

        def __len__(self):
            return len(pixels)

        def __getitem__(self, index):
            return self.transform(Image.fromarray(pixels[index])), int(split.labels[index])

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    classes = kd.load(teacher).classes
    student = build_classifier(job["student"], classes, View()).network
    return Images(), transform, kd.load(teacher).network, student, device


def torchdistill(job: dict, source: str, epochs: int, teacher: str) -> float:
    """Seconds of torchdistill's box in the loop of its image classification example."""
    import torch
    from torchdistill.core.distillation import DistillationBox

    dataset, _, teacher_network, student, device = _pieces(job, source, teacher)
    loader = {"random_sample": True, "kwargs": {"batch_size": job["batch_size"], "num_workers": 2}}
    sampler = {"class_or_func": torch.utils.data.RandomSampler, "kwargs": {}}
    logits = {"student_module_path": ".", "student_module_io": "output"}
    logits |= {"teacher_module_path": ".", "teacher_module_io": "output"}
    loss = {"key": "KDLoss", "kwargs": {**logits, "temperature": 4.0, "alpha": 0.1, "reduction": "batchmean"}}
    network = {"forward_proc": "forward_batch_only", "sequential": [], "wrapper": None}
    config = {
        "num_epochs": epochs,
        "train_data_loader": {"dataset_id": "train", "sampler": sampler, **loader},
        "val_data_loader": {"dataset_id": "train", "sampler": sampler, **loader},
        "teacher": {**network, "requires_grad": False},
        "student": {**network, "requires_grad": True},
        "optimizer": {"key": "SGD", "kwargs": {"lr": 0.05, "momentum": 0.9}},
        "criterion": {"key": "WeightedSumLoss", "kwargs": {"sub_terms": {"kd": {"criterion": loss, "weight": 1.0}}}},
    }
    box = DistillationBox(
        teacher_network.to(device), student.to(device), {"train": dataset}, config, device, None, False, 1
    )
    began = time.perf_counter()
    for epoch in range(epochs):
        box.pre_epoch_process(epoch=epoch)
        for pixels, labels, extra in box.train_data_loader:
            pixels, labels = pixels.to(device), labels.to(device)
            value = box.forward_process(pixels, labels, extra)
            box.post_forward_process(value)
            value.item()
        box.post_epoch_process()
    return time.perf_counter() - began


def timm(job: dict, source: str, epochs: int, teacher: str) -> float:
    """Seconds of timm's distillation task in the loop of its training script."""
    import torch
    from timm.data import create_loader
    from timm.task import LogitDistillationTask

    dataset, transform, teacher_network, student, device = _pieces(job, source, teacher)
    side = 224 if job["teacher"] == "resnet18" else 32
    for network in (teacher_network, student):
        network.num_classes, network.in_chans = 10, 3
        network.pretrained_cfg = {"mean": MEAN, "std": STD}
        network.to(device=device, memory_format=torch.channels_last)
    prefetch = device.type == "cuda"
    loader = create_loader(
        dataset, (3, side, side), job["batch_size"], is_training=True, no_aug=True, num_workers=2, mean=MEAN, std=STD,
        use_prefetcher=prefetch, device=device,
    )  # fmt: skip
    if not prefetch:
        dataset.transform = transform  # the same view on all sides
    task = LogitDistillationTask(
        student, teacher_network, torch.nn.CrossEntropyLoss(), task_loss_weight=0.1, distill_loss_weight=0.9,
        temperature=4.0, device=device, verbose=False,
    )  # fmt: skip
    optimizer = torch.optim.SGD(student.parameters(), lr=0.05, momentum=0.9)
    began = time.perf_counter()
    for _ in range(epochs):
        task.train()
        for step, (pixels, labels) in enumerate(loader):
            pixels = pixels.to(device, memory_format=torch.channels_last)
            with torch.autocast(device.type, torch.bfloat16, enabled=prefetch):  # its --amp; slower on a CPU
                value = task(pixels, labels.to(device))["loss"]
            value.backward()
            optimizer.step()
            optimizer.zero_grad()
            if step % 50 == 0:
                value.item()
    return time.perf_counter() - began


SIDES = {"ours": ours, "torchdistill": torchdistill, "timm": timm}


def measure(name: str, source: str, images: int, epochs: int, sides: list[str], rounds: int, out: Path | None) -> dict:
    """Rounds of the sides in alternation; seconds of each."""
    job, machine = JOBS[name], about()
    with tempfile.TemporaryDirectory() as folder:
        small = subset(source, Path(folder, "set"), images, 100)
        own = {"KD_CACHE": f"{folder}/cache"}
        size = SIZE if job["teacher"] == "resnet18" else []
        teacher = child("peers.py", "teacher", folder, job["teacher"], small, *size, environment=own)["run"]
        seconds: dict[str, list[float]] = {side: [] for side in sides}
        for _ in range(rounds):
            for side in sides:
                shutil.rmtree(f"{folder}/cache/tables", ignore_errors=True)  # ours asks the teacher anew
                seconds[side].append(child("peers.py", side, name, small, epochs, teacher, environment=own)["seconds"])
                print(f"{name:12} {side:13} {seconds[side][-1]:.2f} s", flush=True)
            entry = {**machine, **job, "images": images, "epochs": epochs, "seconds": seconds}
            entry["packages"] = {side: version(side) for side in sides if side != "ours"}
            record("peers", name, entry, out)
    for side, values in seconds.items():
        ratio = median([value / own for value, own in zip(values, seconds["ours"], strict=True)])
        speed = images * epochs / median(values)
        print(f"{name:12} {side:13} seconds {spread(values)}, {speed:,.0f} images/s, {ratio:.2f} times ours")
    return entry


def main(argv: list[str] | None = None) -> int:
    """Measure the jobs and write peers.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", nargs="+", default=list(JOBS), choices=list(JOBS))
    parser.add_argument("--sides", nargs="+", default=list(SIDES), choices=list(SIDES))
    parser.add_argument("--cifar10", default="cifar10", help="data.source of the jobs at 32x32")
    parser.add_argument("--stl10", default="stl10", help="data.source of the job at 224x224")
    parser.add_argument("--images", type=int, default=2048, help="training images at 32x32")
    parser.add_argument("--large_images", type=int, default=192, help="training images at 224x224")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, help="folder of the JSON file")
    parser.add_argument("--child", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.child:
        side, *given = arguments.child
        if side == "teacher":
            print(json.dumps({"run": make_teacher(*given)}))
        else:
            with contextlib.redirect_stdout(sys.stderr):
                seconds = SIDES[side](JOBS[given[0]], given[1], int(given[2]), given[3])
            print(json.dumps({"seconds": seconds}))
        return 0
    missing = [side for side in arguments.sides if side != "ours" and importlib.util.find_spec(side) is None]
    if missing:
        print(f"error: not installed: {', '.join(missing)}; pip install --no-deps {' '.join(missing)}", file=sys.stderr)
        return 1
    for name in arguments.jobs:
        large = JOBS[name]["teacher"] == "resnet18"
        source, images = (arguments.stl10, arguments.large_images) if large else (arguments.cifar10, arguments.images)
        sides = ["ours", *(side for side in arguments.sides if side != "ours")]
        measure(name, source, images, arguments.epochs, sides, arguments.rounds, arguments.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
