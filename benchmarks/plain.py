#!/usr/bin/env python
"""The scripts against the loop that most people write, on the same job: seconds until the last step, and the accuracy.

    python benchmarks/plain.py                                       # both jobs, full size
    python benchmarks/plain.py --jobs kd --kd_images 10000 --rounds 3

The plain loop is a data set class with PIL transforms in a DataLoader with 2 workers, the teacher's forward pass at
each step, fp32, `.item()` at each step. Its images are in memory, decoded. Jobs:

head    a frozen ImageNet ResNet-18 gets a new head (recipes/stl10/teacher.yaml), 5 epochs
kd      deep_nn teaches light_nn on CIFAR-10 with KL (recipes/cifar10/kd.yaml), 10 epochs; ours once with the teacher's
        pass over the images and once more with its table from the first run

Pairs alternate, each with its own seed. The time is from after the imports to the last step; images are decoded before.
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

EPOCHS = {"head": 5, "kd": 10}


def ours(job: str, source: str, images: int | None, seed: int, teacher: str) -> dict:
    """The script's run; its own time stamp is taken where the training ends and the test begins."""
    import kd.conclude

    measured, conclude, ended = {}, kd.conclude.conclude, []

    def timed(*arguments):
        ended.append(time.perf_counter())
        return conclude(*arguments)

    kd.conclude.conclude = timed
    import torch  # noqa: F401  # before the clock starts, as for the plain loop

    import kd.fit
    import kd.precompute
    import kd.setup

    with tempfile.TemporaryDirectory() as folder:
        arguments = ["--data.source", source, "--epochs", EPOCHS[job], "--seed", seed, "--output_dir", f"{folder}/run"]
        arguments += ["--report_to", "none"] + (["--data.num_train", images] if images else [])
        if job == "head":
            from train_teacher import main

            arguments = ["--config", ROOT / "recipes/stl10/teacher.yaml", *arguments]
        else:
            from distill import main

            arguments = ["--config", ROOT / "recipes/cifar10/kd.yaml", "--teacher", teacher, *arguments]
        began = time.perf_counter()
        sys.stdout = sys.stderr  # the last line of stdout is this benchmark's
        status = main([str(argument) for argument in arguments])
        sys.stdout = sys.__stdout__
        assert status == 0, status
        summary = json.loads(Path(folder, "run/summary.json").read_text())
        measured = {"seconds": ended[0] - began, "accuracy": summary["test_accuracy"]}
    return measured


def plain(job: str, source: str, images: int | None, seed: int, teacher: str) -> dict:
    """The loop as most people write it."""
    import torch
    import torch.nn.functional as F
    from PIL import Image
    from torch.utils.data import DataLoader, Dataset
    from torchvision import transforms

    import kd
    from kd.config import DataConfig
    from kd.data import load_data
    from kd.models import View, build_classifier

    data = load_data(DataConfig(source=source, val_fraction=0, num_train=images))
    size = [transforms.Resize(256), transforms.CenterCrop(224)] if job == "head" else []
    normalise = transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    transform = transforms.Compose([*size, transforms.ToTensor(), normalise])

    class Images(Dataset):
        def __init__(self, split):
            self.pixels = split.store.images[split.places].transpose(0, 2, 3, 1).copy()
            self.labels = split.labels

        def __len__(self):
            return len(self.labels)

        def __getitem__(self, index):
            return transform(Image.fromarray(self.pixels[index])), int(self.labels[index])

    train, test = Images(data.train), Images(data.test)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(seed)
    name = "resnet18" if job == "head" else "light_nn"
    weights = "IMAGENET1K_V1" if job == "head" else None
    network = build_classifier(name, data.classes, View(), weights=weights).network.to(device)
    began = time.perf_counter()
    loader = DataLoader(train, batch_size=64 if job == "head" else 128, shuffle=True, num_workers=2)
    if job == "head":
        head = network.fc
        for parameter in network.parameters():
            parameter.requires_grad = False
        for parameter in head.parameters():
            parameter.requires_grad = True
        optimizer = torch.optim.SGD(head.parameters(), lr=0.001, momentum=0.9)
    else:
        teacher_network = kd.load(teacher).network.eval().to(device)
        optimizer = torch.optim.Adam(network.parameters(), lr=0.001)
    for _ in range(EPOCHS[job]):
        network.train()
        if job == "head":
            network.eval()  # else the frozen backbone's batch statistics move
        running = 0.0
        for pixels, labels in loader:
            pixels, labels = pixels.to(device), labels.to(device)
            optimizer.zero_grad()
            logits = network(pixels)
            loss = F.cross_entropy(logits, labels)
            if job == "kd":
                with torch.no_grad():
                    soft = (teacher_network(pixels) / 2).softmax(1)
                log_soft = (logits / 2).log_softmax(1)
                loss = 0.75 * loss + 0.25 * 4 * F.kl_div(log_soft, soft, reduction="batchmean")
            loss.backward()
            optimizer.step()
            running += loss.item()
    seconds = time.perf_counter() - began
    network.eval()
    right = 0
    with torch.no_grad():
        for pixels, labels in DataLoader(test, batch_size=64, num_workers=2):
            right += (network(pixels.to(device)).argmax(1).cpu() == labels).sum().item()
    return {"seconds": seconds, "accuracy": 100 * right / len(test)}


def measure(job: str, arguments) -> dict:
    """Pairs of the two loops in alternation; times, accuracies and ratios."""
    source = arguments.stl10 if job == "head" else arguments.cifar10
    images = arguments.head_images if job == "head" else arguments.kd_images
    sides: dict[str, list[dict]] = {"plain": [], "first run": []} | ({"second run": []} if job == "kd" else {})
    for seed in range(arguments.rounds):
        given = (job, source, images or 0, seed, arguments.teacher)
        for side in sides:
            if side == "first run":  # without any table of what is frozen; the decoded images stay
                cache = Path(os.environ.get("KD_CACHE", "~/.cache/kd")).expanduser()
                shutil.rmtree(cache / "tables", ignore_errors=True)
            sides[side].append(child("plain.py", "plain" if side == "plain" else "ours", *given))
            print(f"{job:5} {side:10} seed {seed}: {sides[side][-1]}", flush=True)
    rows = []
    for side, runs in sides.items():
        ratios = [slow["seconds"] / run["seconds"] for slow, run in zip(sides["plain"], runs, strict=True)]
        rows.append({"job": job, "side": side, "runs": runs, "times_faster": median(ratios), "ratios": ratios})
        accuracy = spread([run["accuracy"] for run in runs])
        seconds = spread([run["seconds"] for run in runs])
        print(f"{job:5} {side:10} seconds {seconds}, {median(ratios):.2f} times faster, test accuracy {accuracy} %")
    return {"images": images, "epochs": EPOCHS[job], "rows": rows}


def main(argv: list[str] | None = None) -> int:
    """Measure the jobs and write plain.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", nargs="+", default=list(EPOCHS), choices=list(EPOCHS))
    parser.add_argument("--cifar10", default="cifar10", help="data.source of the kd job")
    parser.add_argument("--stl10", default="stl10", help="data.source of the head job")
    parser.add_argument("--head_images", type=int, help="training images; all by default")
    parser.add_argument("--kd_images", type=int, help="training images; all by default")
    parser.add_argument("--teacher", default="runs/cifar10/teacher", help="run folder of the kd job's teacher")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, help="folder of the JSON file")
    parser.add_argument("--child", nargs=6, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.child:
        side, job, source, images, seed, teacher = arguments.child
        run = {"plain": plain, "ours": ours}[side]
        print(json.dumps(run(job, source, int(images) or None, int(seed), teacher)))
        return 0
    machine = about()
    jobs = {job: measure(job, arguments) for job in arguments.jobs}
    write("plain", {**machine, "rounds": arguments.rounds, "jobs": jobs}, arguments.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
