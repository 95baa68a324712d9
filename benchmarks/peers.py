#!/usr/bin/env python
"""The scripts against two packages of the registry on the same job: seconds of training, and images a second.

    pip install --no-deps torchdistill timm        # and what they ask for: scipy, cython, huggingface_hub
    python benchmarks/peers.py --cifar10 cifar10 --stl10 stl10

Each side gets the same networks, images, batch size, optimizer, and 0.9 KL at temperature 4 + 0.1 cross entropy:

ours          distill.py; its own choice of table or live teacher, counted from the first look at the teacher
torchdistill  its DistillationBox with KDLoss, as in its example script: `loss.item()` at each step, 2 workers
timm          its LogitDistillationTask with its loader, as in its train.py with --channels-last, 2 workers

Jobs: cifar (resnet20 teaches resnet8, 32x32, padded crop and flip), cifar_fixed (the same without random views) and
224 (ResNet-18 teaches MobileNetV3-small, resized to 256 and cropped to 224). Sides alternate; the images are decoded
before.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from common import about, child, median, spread, write  # noqa: E402

JOBS = {
    "cifar": {"teacher": "resnet20", "student": "resnet8", "batch_size": 128, "views": "random"},
    "cifar_fixed": {"teacher": "resnet20", "student": "resnet8", "batch_size": 128, "views": "fixed"},
    "224": {"teacher": "resnet18", "student": "mobilenet_v3_small", "batch_size": 64, "views": "fixed"},
}
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def ours(job: dict, source: str, images: int, epochs: int, teacher: str) -> float:
    """Seconds of `distill.py` until its last step."""
    import kd.conclude

    conclude, ended = kd.conclude.conclude, []

    def timed(*arguments):
        ended.append(time.perf_counter())
        return conclude(*arguments)

    kd.conclude.conclude = timed
    import kd.fit  # before the clock starts, as the peers' imports
    import kd.precompute
    import kd.setup
    from distill import main

    with tempfile.TemporaryDirectory() as folder:
        arguments = ["--student", job["student"], "--teacher", teacher, "--data.source", source]
        arguments += ["--data.num_train", images, "--data.val_fraction", 0, "--data.batch_size", job["batch_size"]]
        arguments += ["--epochs", epochs, "--output_dir", f"{folder}/run", "--report_to", "none"]
        arguments += ["--optimizer.name", "sgd", "--optimizer.lr", 0.05]
        if job["teacher"] == "resnet18":
            arguments += ["--data.resize", 256, "--data.crop", 224]
        if job["views"] == "random":
            arguments += ["--data.flip", "true", "--data.pad_crop", 4]
        began = time.perf_counter()
        sys.stdout = sys.stderr
        status = main([str(argument) for argument in arguments])
        sys.stdout = sys.__stdout__
        assert status == 0, status
    return ended[0] - began


def _pieces(job: dict, source: str, images: int, teacher: str):
    """What both peers take: a data set of PIL images, its transform, the two networks, the device."""
    import torch
    from PIL import Image
    from torchvision import transforms

    import kd
    from kd.config import DataConfig
    from kd.data import load_data
    from kd.models import View, build_classifier

    split = load_data(DataConfig(source=source, val_fraction=0, num_train=images)).train
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


def torchdistill(job: dict, source: str, images: int, epochs: int, teacher: str) -> float:
    """Seconds of torchdistill's box in the loop of its image classification example."""
    import torch
    from torchdistill.core.distillation import DistillationBox

    dataset, _, teacher_network, student, device = _pieces(job, source, images, teacher)
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


def timm(job: dict, source: str, images: int, epochs: int, teacher: str) -> float:
    """Seconds of timm's distillation task in the loop of its training script."""
    import torch
    from timm.data import create_loader
    from timm.task import LogitDistillationTask

    dataset, transform, teacher_network, student, device = _pieces(job, source, images, teacher)
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
            value = task(pixels, labels.to(device))["loss"]
            value.backward()
            optimizer.step()
            optimizer.zero_grad()
            if step % 50 == 0:
                value.item()
    return time.perf_counter() - began


SIDES = {"ours": ours, "torchdistill": torchdistill, "timm": timm}


def make_teacher(job: dict, source: str, folder: str) -> str:
    """A run folder of one step: what a teacher says does not change what a step costs."""
    from train_teacher import main

    arguments = ["--model", job["teacher"], "--data.source", source, "--max_steps", 1, "--data.batch_size", 16]
    arguments += ["--output_dir", f"{folder}/teacher", "--report_to", "none"]
    if job["teacher"] == "resnet18":
        arguments += ["--data.resize", 256, "--data.crop", 224]
    main([str(argument) for argument in arguments])
    return f"{folder}/teacher"


def main(argv: list[str] | None = None) -> int:
    """Measure the jobs and write peers.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", nargs="+", default=list(JOBS), choices=list(JOBS))
    parser.add_argument("--sides", nargs="+", default=list(SIDES), choices=list(SIDES))
    parser.add_argument("--cifar10", default="cifar10", help="data.source of the jobs at 32x32")
    parser.add_argument("--stl10", default="stl10", help="data.source of the job at 224x224")
    parser.add_argument("--images", type=int, default=5000, help="training images at 32x32; a tenth of it at 224x224")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, help="folder of the JSON file")
    parser.add_argument("--child", nargs=6, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.child:
        side, job, source, images, epochs, teacher = arguments.child
        if side == "teacher":
            sys.stdout = sys.stderr
            print(json.dumps({"run": make_teacher(JOBS[job], source, teacher)}), file=sys.__stdout__)
        else:
            print(json.dumps({"seconds": SIDES[side](JOBS[job], source, int(images), int(epochs), teacher)}))
        return 0
    machine, jobs = about(), {}
    for name in arguments.jobs:
        large = JOBS[name]["teacher"] == "resnet18"
        source, images = (arguments.stl10, arguments.images // 10) if large else (arguments.cifar10, arguments.images)
        with tempfile.TemporaryDirectory() as folder:
            teacher = child("peers.py", "teacher", name, source, images, arguments.epochs, folder)["run"]
            seconds: dict[str, list[float]] = {side: [] for side in arguments.sides}
            for _ in range(arguments.rounds):
                for side in arguments.sides:
                    cache = Path(os.environ.get("KD_CACHE", "~/.cache/kd")).expanduser()
                    shutil.rmtree(cache / "tables", ignore_errors=True)
                    given = (side, name, source, images, arguments.epochs, teacher)
                    seconds[side].append(child("peers.py", *given)["seconds"])
        jobs[name] = {"images": images, "epochs": arguments.epochs, "seconds": seconds}
        for side, values in seconds.items():
            ratio = median([value / own for value, own in zip(values, seconds["ours"], strict=True)])
            speed = images * arguments.epochs / median(values)
            print(f"{name:12} {side:13} seconds {spread(values)}, {speed:,.0f} images/s, {ratio:.2f} times ours")
    write("peers", {**machine, "rounds": arguments.rounds, "jobs": jobs}, arguments.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
