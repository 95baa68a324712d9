#!/usr/bin/env python
"""The scripts against the loop that most people write, on the same job: seconds until the last step, and the accuracy.

    python benchmarks/plain.py --teacher runs/cifar10/teacher              # both jobs
    python benchmarks/plain.py --jobs head --stl10 FOLDER --head_images 1000 --rounds 3

The plain loop is a data set class with PIL transforms in a DataLoader with 2 workers, the teacher's forward pass at
each step, fp32, `.item()` at each step. Its images are in memory, decoded. Jobs, on a class-balanced subset of the set:

head    a frozen ImageNet ResNet-18 gets a new head (recipes/stl10/teacher.yaml), 5 epochs
kd      deep_nn teaches light_nn on CIFAR-10 with KL (recipes/cifar10/kd.yaml), 10 epochs

Ours is measured twice: the first run pays for what it asks of the frozen network, the second finds it in the cache.
The sides alternate, each round with its own seed. The clock runs from after the imports to the last step. Images are
decoded before on both sides; the plain loop's networks are loaded before too, ours within.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from pathlib import Path

from common import ROOT, about, child, median, record, seconds_to_last_step, spread, subset

EPOCHS = {"head": 5, "kd": 10}
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def ours(job: str, source: str, seed: int, teacher: str) -> dict:
    """The script's run: seconds and test accuracy."""
    script, recipe = ("train_teacher", "stl10/teacher") if job == "head" else ("distill", "cifar10/kd")
    with tempfile.TemporaryDirectory() as folder:
        arguments = ["--config", ROOT / f"recipes/{recipe}.yaml", "--data.source", source, "--epochs", EPOCHS[job]]
        arguments += ["--seed", seed, "--output_dir", f"{folder}/run"]
        seconds = seconds_to_last_step(script, arguments + (["--teacher", teacher] if job == "kd" else []))
        summary = json.loads(Path(folder, "run/summary.json").read_text())
    return {"seconds": seconds, "accuracy": summary["test_accuracy"]}


def plain(job: str, source: str, seed: int, teacher: str) -> dict:
    """The loop as most people write it: seconds and test accuracy."""
    import torch
    import torch.nn.functional as F
    from PIL import Image
    from torch.utils.data import DataLoader, Dataset
    from torchvision import transforms

    import kd
    from kd.data import load_data
    from kd.models import View, build_classifier
    from kd.run.config import DataConfig

    data = load_data(DataConfig(source=source, val_fraction=0))
    size = [transforms.Resize(256), transforms.CenterCrop(224)] if job == "head" else []
    transform = transforms.Compose([*size, transforms.ToTensor(), transforms.Normalize(MEAN, STD)])

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
    name, weights = ("resnet18", "IMAGENET1K_V1") if job == "head" else ("light_nn", None)
    network = build_classifier(name, data.classes, View(), weights=weights).network.to(device)
    if job == "head":
        for parameter in network.parameters():
            parameter.requires_grad = False
        for parameter in network.fc.parameters():
            parameter.requires_grad = True
        optimizer = torch.optim.SGD(network.fc.parameters(), lr=0.001, momentum=0.9)
    else:
        teacher_network = kd.load(teacher).network.eval().to(device)
        optimizer = torch.optim.Adam(network.parameters(), lr=0.001)
    loader = DataLoader(train, batch_size=64 if job == "head" else 128, shuffle=True, num_workers=2)
    began = time.perf_counter()
    for _ in range(EPOCHS[job]):
        # a frozen backbone's batch statistics must not move
        network.train(job != "head")
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


def measure(job: str, source: str, images: int, test_images: int, teacher: str, rounds: int, out: Path | None) -> dict:
    """Rounds of the sides in alternation; their runs and how many times faster ours are."""
    machine = about()
    sides: dict[str, list[dict]] = {"plain": [], "first run": [], "second run": []}
    with tempfile.TemporaryDirectory() as folder:
        small = subset(source, Path(folder, "set"), images, test_images)
        own = {"KD_CACHE": f"{folder}/cache"}
        for seed in range(rounds):
            for side, runs in sides.items():
                if side == "first run":  # without any table of what is frozen; the decoded images stay
                    shutil.rmtree(f"{folder}/cache/tables", ignore_errors=True)
                kind = "plain" if side == "plain" else "ours"
                runs.append(child("plain.py", kind, job, small, seed, teacher, environment=own))
                print(f"{job:5} {side:10} seed {seed}: {runs[-1]}", flush=True)
            rows = {}
            for side, runs in sides.items():
                ratios = [slow["seconds"] / run["seconds"] for slow, run in zip(sides["plain"], runs, strict=True)]
                rows[side] = {"runs": runs, "ratios": ratios, "times_faster": median(ratios)}
            entry = {**machine, "images": images, "test_images": test_images, "epochs": EPOCHS[job], "sides": rows}
            record("plain", job, entry, out)
    for side, row in rows.items():
        accuracy = spread([run["accuracy"] for run in row["runs"]])
        seconds = spread([run["seconds"] for run in row["runs"]])
        print(
            f"{job:5} {side:10} seconds {seconds}, {row['times_faster']:.2f} times faster, test accuracy {accuracy} %"
        )
    return entry


def main(argv: list[str] | None = None) -> int:
    """Measure the jobs and write plain.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", nargs="+", default=list(EPOCHS), choices=list(EPOCHS))
    parser.add_argument("--cifar10", default="cifar10", help="data.source of the kd job")
    parser.add_argument("--stl10", default="stl10", help="data.source of the head job")
    parser.add_argument("--head_images", type=int, default=500, help="training images")
    parser.add_argument("--kd_images", type=int, default=3000, help="training images")
    parser.add_argument("--head_test_images", type=int, default=500)
    parser.add_argument("--kd_test_images", type=int, default=10_000)
    parser.add_argument("--teacher", default="runs/cifar10/teacher", help="run folder of the kd job's teacher")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, help="folder of the JSON file")
    parser.add_argument("--child", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.child:
        side, job, source, seed, teacher = arguments.child
        print(json.dumps({"plain": plain, "ours": ours}[side](job, source, int(seed), teacher)))
        return 0
    for job in arguments.jobs:
        source = arguments.stl10 if job == "head" else arguments.cifar10
        images, test = (getattr(arguments, f"{job}_{name}") for name in ("images", "test_images"))
        measure(job, source, images, test, arguments.teacher, arguments.rounds, arguments.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
