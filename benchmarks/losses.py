#!/usr/bin/env python
"""What one training step costs with each method of the comparison, relative to plain KL.

    python benchmarks/losses.py                      # wrn_40_2 teaches wrn_16_2, batch 64, every method
    python benchmarks/losses.py --methods dkd crd --steps 20

A step is: the teacher's forward pass, the student's forward and backward pass with the method's terms, the optimizer.
Each method's steps alternate with KL's on the same images, and the ratio of the two medians is printed, so that other
work on the machine falls on both. Peak memory is a GPU's; on a CPU it is not measured.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "recipes")]

import comparison  # noqa: E402

from kd import keyed  # noqa: E402
from kd.losses import LOSSES, Setting  # noqa: E402
from kd.models import View, build_classifier  # noqa: E402
from kd.models.reused_head import reuse_head  # noqa: E402
from kd.outputs import Batch  # noqa: E402
from kd.students import Plain  # noqa: E402
from kd.teachers import Teachers  # noqa: E402
from kd.train.distiller import Distiller  # noqa: E402
from kd.util.machine import device_name, versions  # noqa: E402

NUM_CLASSES, NUM_IMAGES = 100, 50_000


class Job:
    """One method's step, ready to be timed: random weights and images, labels of CIFAR-100's numbers."""

    def __init__(self, method: str, teacher: str, student: str, batch_size: int, device: torch.device):
        torch.manual_seed(0)
        classes = [str(i) for i in range(NUM_CLASSES)]
        member = build_classifier(teacher, classes, View())
        network = build_classifier(student, classes, View())
        if method == "simkd":
            network = reuse_head(network, member, (3, 32, 32))
        kind, terms = comparison.METHODS[method]
        losses = []
        for name, arguments in terms:
            given = comparison.taps(kind, teacher, student) if kind and name != "CrossEntropy" else {}
            losses.append(LOSSES[name](**given, **arguments))
        labels = torch.arange(NUM_IMAGES) % NUM_CLASSES
        learner = Plain()
        learner.setup(network.to(device), None)
        self.teachers, setting = Teachers({"teacher": member}, classes).to(device), Setting(labels=labels)
        self.distiller = Distiller(learner, losses, self.teachers, (3, 32, 32), setting).to(device).train()
        trained = [p for p in self.distiller.parameters() if p.requires_grad]
        self.optimizer = torch.optim.SGD(trained, lr=0.001, momentum=0.9)
        index = keyed.permutation(0, NUM_IMAGES)[:batch_size]
        images = torch.randint(0, 256, (batch_size, 3, 32, 32), dtype=torch.uint8)
        tensors = (labels[index], index, keyed.keys(0, index))
        self.batch = Batch({"image": images.to(device)}, *(tensor.to(device) for tensor in tensors))

    def step(self) -> float:
        """Seconds of one step."""
        start = time.perf_counter()
        terms = self.distiller(self.batch, self.teachers(self.batch))
        sum(terms.values()).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.batch.labels.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start


def main(argv: list[str] | None = None) -> int:
    """Time the methods, print the table, write benchmarks/results/losses.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", default="wrn_40_2")
    parser.add_argument("--student", default="wrn_16_2")
    parser.add_argument("--methods", nargs="+", default=list(comparison.METHODS), choices=list(comparison.METHODS))
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--steps", type=int, default=10, help="timed steps of each of the two")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/losses.json")
    arguments = parser.parse_args(argv)
    device = torch.device(arguments.device)
    pair = (arguments.teacher, arguments.student, arguments.batch_size, device)
    plain, rows = Job("kd", *pair), []
    print(f"{arguments.teacher} to {arguments.student}, batch {arguments.batch_size}, {device_name(device)}")
    print(f"{'method':16} {'ms/step':>8} {'KL ms':>8} {'ratio':>6} {'MB':>8}")
    for method in arguments.methods:
        job = Job(method, *pair)
        for _ in range(2):  # allocations, and first-step work such as a bank's constants
            job.step(), plain.step()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        times = [(job.step(), plain.step()) for _ in range(arguments.steps)]
        mine, base = (1000 * statistics.median(column) for column in zip(*times, strict=True))
        ratio = statistics.median(one / other for one, other in times)
        memory = torch.cuda.max_memory_allocated() / 1e6 if device.type == "cuda" else None
        rows.append({"method": method, "ms": mine, "kl_ms": base, "ratio": ratio, "peak_mb": memory})
        print(
            f"{method:16} {mine:8.1f} {base:8.1f} {ratio:6.2f} {f'{memory:8.0f}' if memory else '       -'}", flush=True
        )
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    about = {"teacher": pair[0], "student": pair[1], "batch_size": pair[2], "steps": arguments.steps}
    about |= {"device": device_name(device), "versions": versions()}
    arguments.out.write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n")
    print(f"wrote {arguments.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
