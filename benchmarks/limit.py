#!/usr/bin/env python
"""The loop against its limit: the student's forward pass, backward pass and optimizer step on one batch in memory.

    python benchmarks/limit.py                                  # light_nn at batch 128, on a CPU or a GPU
    python benchmarks/limit.py --student resnet20 --image_size 32 --batch_size 128
    python benchmarks/limit.py --student resnet18 --image_size 224 --batch_size 256

The loop is `distill.py` as a user starts it, with KL from the teacher's table, cross entropy, its record every 50 steps
and a checkpoint at each epoch's end; its speed is that of whole epochs, checkpoints counted, the first epoch left out.
The limit is the same network in the same precision and memory order with cross entropy alone: no teacher, no data, no
record. Both alternate; ratio is the loop's speed by the limit's.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from common import about, child, median, spread, write  # noqa: E402


def images_folder(folder: Path, count: int, size: int, num_classes: int = 10) -> str:
    """A folder of Parquet files with `count` random images for training and 10 a class for the test."""
    import numpy as np
    from datasets import ClassLabel, Dataset, Features, Image

    draw = np.random.default_rng(0)
    features = Features({"image": Image(), "label": ClassLabel(names=[f"class {i}" for i in range(num_classes)])})

    def rows(number: int):
        for index in range(number):
            yield {
                "image": draw.integers(0, 256, (size, size, 3), dtype=np.uint8),
                "label": index % num_classes,
            }

    splits = {"train": count, "test": 10 * num_classes}
    for name, number in splits.items():
        made = Dataset.from_generator(rows, features=features, gen_kwargs={"number": number}, cache_dir=folder / "made")
        (folder / "set/data").mkdir(parents=True, exist_ok=True)
        made.to_parquet(folder / f"set/data/{name}-00000-of-00001.parquet")
    return str(folder / "set")


def loop(source: str, teacher: str, student: str, batch_size: int, epochs: int) -> dict:
    """`distill.py`'s images a second in each epoch but the first."""
    from distill import main

    with tempfile.TemporaryDirectory() as folder:
        arguments = ["--student", student, "--teacher", teacher, "--data.source", source, "--data.val_fraction", 0]
        arguments += ["--data.batch_size", batch_size, "--epochs", epochs, "--output_dir", f"{folder}/run"]
        sys.stdout = sys.stderr
        status = main([str(argument) for argument in (*arguments, "--report_to", "none")])
        sys.stdout = sys.__stdout__
        assert status == 0, status
        rows = [json.loads(line) for line in Path(folder, "run/metrics.jsonl").read_text().splitlines()]
    speeds = [row["epoch/images_per_second"] for row in rows if "epoch/images_per_second" in row]
    return {"images_per_second": median(speeds[1:])}


def limit(student: str, image_size: int, num_classes: int, batch_size: int, steps: int) -> dict:
    """Images a second of the bare step, in what `distill.py` chooses for this machine."""
    import torch
    import torch.nn.functional as F

    from kd.config import DistillConfig
    from kd.models import View, build_classifier
    from kd.optim import make_optimizer
    from kd.setup import make_accelerator

    config = DistillConfig(teacher="none", output_dir="unused", report_to="none")
    config.data.batch_size = batch_size
    accelerator = make_accelerator(config)
    torch.manual_seed(0)
    network = build_classifier(student, [str(i) for i in range(num_classes)], View()).network.to(accelerator.device)
    network.train()
    optimizer = make_optimizer(config.optimizer, network, accelerator.device)
    images = torch.randn(batch_size, 3, image_size, image_size, device=accelerator.device)
    if accelerator.device.type == "cpu" or accelerator.mixed_precision != "no":
        images = images.contiguous(memory_format=torch.channels_last)
    labels = torch.arange(batch_size, device=accelerator.device) % num_classes

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


def make_teacher(source: str, folder: Path, student: str) -> str:
    """A run folder of one step: what a teacher says does not change what a step costs."""
    from train_teacher import main

    run = str(folder / "teacher")
    arguments = ["--model", student, "--data.source", source, "--max_steps", 1, "--output_dir", run]
    main([str(argument) for argument in (*arguments, "--report_to", "none", "--data.batch_size", 16)])
    return run


def main(argv: list[str] | None = None) -> int:
    """Measure and write limit.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--student", default="light_nn")
    parser.add_argument("--image_size", type=int, default=32)
    parser.add_argument("--batch_size", type=int, default=128)
    parser.add_argument("--images", type=int, default=12_800, help="training images an epoch")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, help="folder of the JSON file")
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.child:
        side, *given = arguments.child
        if side == "loop":
            print(json.dumps(loop(*given[:3], *map(int, given[3:]))))
        elif side == "limit":
            print(json.dumps(limit(given[0], *map(int, given[1:]))))
        else:
            sys.stdout = sys.stderr
            run = make_teacher(given[0], Path(given[1]), given[2])
            print(json.dumps({"run": run}), file=sys.__stdout__)
        return 0
    machine, batch = about(), arguments.batch_size
    with tempfile.TemporaryDirectory() as folder:
        source = images_folder(Path(folder), arguments.images, arguments.image_size)
        teacher = child("limit.py", "teacher", source, folder, arguments.student)["run"]
        own = {"KD_CACHE": f"{folder}/cache"}
        bare_steps = arguments.images * (arguments.epochs - 1) // batch
        pairs = []
        for round_ in range(arguments.rounds):
            bare = child("limit.py", "limit", arguments.student, arguments.image_size, 10, batch, bare_steps)
            ours = child(
                "limit.py", "loop", source, teacher, arguments.student, batch, arguments.epochs, environment=own
            )
            pairs.append({"limit": bare["images_per_second"], "loop": ours["images_per_second"]})
            print(f"round {round_}: {pairs[-1]}", flush=True)
    shares = [100 * pair["loop"] / pair["limit"] for pair in pairs]
    print(f"{arguments.student} at batch {batch}: the loop reaches {spread(shares)} % of its limit")
    setting = {name: getattr(arguments, name) for name in ("student", "image_size", "batch_size", "images", "epochs")}
    write(f"limit_{arguments.student}", {**machine, **setting, "pairs": pairs, "share_percent": shares}, arguments.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
