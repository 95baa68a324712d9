#!/usr/bin/env python
"""The loop against its limit: the student's forward pass, backward pass and optimizer step on one batch in memory.

    python benchmarks/limit.py                                  # light_nn at batch 128, on a CPU or a GPU
    python benchmarks/limit.py --student resnet20 --image_size 32 --batch_size 128 --losses kl
    python benchmarks/limit.py --student resnet18 --image_size 224 --batch_size 256 --losses kl

The loop is `distill.py` as a user starts it, from the teacher's table, with its record every 50 steps and a checkpoint
at each epoch's end; its speed is that of whole epochs without checkpoints, the first epoch left out. `--losses kl` is
KL and cross entropy, `all` adds a relation between images and a feature (light_nn's). The limit is the same network
in the same precision and memory order with cross entropy alone: no teacher, no data, no record. Both alternate; the
share is the loop's speed by the limit's.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

from common import about, call, child, make_teacher, median, random_job, record, spread

LOSSES = {
    "kl": [{"class_path": "KL", "init_args": {"weight": 0.9}}, {"class_path": "CrossEntropy"}],
    "all": [
        {"class_path": "KL", "init_args": {"weight": 0.9}},
        {"class_path": "CrossEntropy"},
        {"class_path": "CosineEmbedding", "init_args": {"student_tap": "features.5", "teacher_tap": "features.5"}},
        {"class_path": "DIST"},
    ],
}


def loop(source: str, teacher: str, student: str, batch_size: int, epochs: int, losses: str) -> dict:
    """`distill.py`'s images per second in each epoch but the first."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = ["--student", student, "--teacher", teacher, "--data.source", source, "--data.val_fraction", 0]
        arguments += ["--data.batch_size", batch_size, "--epochs", epochs, "--losses", json.dumps(LOSSES[losses])]
        call("distill", [*arguments, "--output_dir", f"{folder}/run"])
        rows = [json.loads(line) for line in Path(folder, "run/metrics.jsonl").read_text().splitlines()]
    speeds = [row["epoch/images_per_second"] for row in rows if "epoch/images_per_second" in row]
    return {"images_per_second": median(speeds[1:])}


def limit(student: str, image_size: int, num_classes: int, batch_size: int, steps: int) -> dict:
    """Images a second of the bare step, in what `distill.py` chooses for this machine."""
    import torch
    import torch.nn.functional as F

    from kd.models import View, build_classifier
    from kd.run.config import DistillConfig
    from kd.train.optim import make_optimizer
    from kd.train.setup import make_accelerator

    config = DistillConfig(teacher="none", output_dir="unused", report_to="none")
    config.data.batch_size = batch_size
    accelerator = make_accelerator(config)
    torch.manual_seed(0)
    classifier = build_classifier(student, [str(i) for i in range(num_classes)], View()).to(accelerator.device).train()
    network, given = classifier.network, []
    pixels = torch.randint(0, 256, (batch_size, 3, image_size, image_size), dtype=torch.uint8)
    hook = network.register_forward_pre_hook(lambda _network, inputs: given.append(inputs[0]))
    with accelerator.autocast():  # the batch as the loop hands it to the network, in its order in memory
        classifier(pixels.to(accelerator.device))
    hook.remove()
    images, labels = given[0].detach(), torch.arange(batch_size, device=accelerator.device) % num_classes
    optimizer = make_optimizer(config.optimizer, network, accelerator.device)

    def run(count: int) -> float:
        began = time.perf_counter()
        for _ in range(count):
            with accelerator.autocast():
                logits = network(images)
            F.cross_entropy(logits.float(), labels).backward()
            optimizer.step()
            optimizer.zero_grad()
        if accelerator.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - began

    run(max(3, steps // 10))
    return {"images_per_second": batch_size * steps / run(steps)}


def measure(
    student: str, image_size: int, batch_size: int, images: int, epochs: int, losses: str, rounds: int, out: Path | None
) -> dict:
    """Rounds of the limit and the loop in alternation, and the share that the loop reaches."""
    machine, pairs = about(), []
    setting = {"student": student, "image_size": image_size, "batch_size": batch_size, "losses": losses}
    with random_job("limit.py", student, images, image_size) as (source, teacher, own):
        steps = max(1, images * (epochs - 1) // batch_size)
        for round_ in range(rounds):
            bare = child("limit.py", "limit", student, image_size, 10, batch_size, steps)
            ours = child("limit.py", "loop", source, teacher, student, batch_size, epochs, losses, environment=own)
            pairs.append({"limit": bare["images_per_second"], "loop": ours["images_per_second"]})
            print(f"{student} {losses} round {round_}: {pairs[-1]}", flush=True)
            shares = [100 * pair["loop"] / pair["limit"] for pair in pairs]
            entry = {**machine, **setting, "images": images, "epochs": epochs, "pairs": pairs, "share_percent": shares}
            record("limit", f"{student}_{image_size}_{losses}", entry, out)
    print(f"{student} at {image_size} and batch {batch_size}, {losses}: {spread(shares)} % of the limit")
    return entry


def main(argv: list[str] | None = None) -> int:
    """Measure and write limit.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--student", default="light_nn")
    parser.add_argument("--image_size", type=int, default=32)
    parser.add_argument("--batch_size", type=int, default=128)
    parser.add_argument("--images", type=int, default=25_600, help="training images an epoch")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--losses", nargs="+", default=list(LOSSES), choices=list(LOSSES))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, help="folder of the JSON file")
    parser.add_argument("--child", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.child:
        side, *given = arguments.child
        if side == "loop":
            print(json.dumps(loop(*given[:3], int(given[3]), int(given[4]), given[5])))
        elif side == "limit":
            print(json.dumps(limit(given[0], *map(int, given[1:]))))
        else:
            print(json.dumps({"run": make_teacher(*given)}))
        return 0
    for losses in arguments.losses:
        sizes = (arguments.image_size, arguments.batch_size, arguments.images, arguments.epochs)
        measure(arguments.student, *sizes, losses, arguments.rounds, arguments.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
