#!/usr/bin/env python
"""Where a step's time goes: the share that is spent in kernels, and the operations that take most of it.

    python benchmarks/kernels.py                                            # light_nn from a table, batch 128
    python benchmarks/kernels.py --student resnet18 --image_size 224 --batch_size 256

`distill.py` runs as a user starts it; torch.profiler looks at the steps after the first 20. On a GPU the share is the
time that kernels ran by the time that passed. On a CPU it is the time within torch's operations, each without those
that it calls, by the time that passed; the rest is Python and waiting. The profiler itself slows what it counts.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

from common import about, call, child, make_teacher, random_job, record

WARM_UP, TOP = 20, 10


def profile(source: str, teacher: str, student: str, batch_size: int, steps: int) -> dict:
    """Profile steps of `distill.py`: milliseconds a step, percent of them in kernels, the largest operations."""
    import torch
    from torch.autograd.profiler_util import EventList
    from torch.profiler import ProfilerActivity

    import kd.train.fit

    on_gpu = torch.cuda.is_available()
    profiler = torch.profiler.profile(
        activities=[ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if on_gpu else []), acc_events=True
    )
    read, calls, clock = kd.train.fit.TrainBatches.read, [], []

    def tick() -> None:
        if on_gpu:
            torch.cuda.synchronize()
        clock.append(time.perf_counter())

    def counted(*given, **named):
        if len(calls) == WARM_UP:
            profiler.start()
            tick()
        elif len(calls) == WARM_UP + steps:
            tick()
            profiler.stop()
        calls.append(None)
        return read(*given, **named)

    kd.train.fit.TrainBatches.read = counted
    try:
        _distill(source, teacher, student, batch_size, WARM_UP + steps)
    finally:
        kd.train.fit.TrainBatches.read = read
    microseconds = 1e6 * (clock[1] - clock[0])
    events: EventList = profiler.key_averages()
    kind = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    spent = {}
    for event in events:
        # on a GPU the events of the host carry their kernels' time again
        if on_gpu and event.device_type != torch.autograd.DeviceType.CUDA:
            continue
        spent[event.key] = spent.get(event.key, 0) + getattr(event, kind)
    largest = sorted(spent.items(), key=lambda item: -item[1])[:TOP]
    return {
        "ms_per_step": microseconds / 1000 / steps,
        "kernel_percent": 100 * sum(spent.values()) / microseconds,
        "largest": [{"name": name[:80], "percent": 100 * value / microseconds} for name, value in largest],
    }


def parts(source: str, teacher: str, student: str, batch_size: int, steps: int) -> dict:
    """Milliseconds that the host spends in each part of a step of `distill.py`, without a profiler; on a CPU that is
    the part's own time. What is inside another part is taken out of that one."""
    from kd.data import TrainBatches
    from kd.losses import KL, CrossEntropy
    from kd.models.dropout import KeyedDropout
    from kd.models.preprocess import Preprocess
    from kd.teachers import Teachers
    from kd.train.distiller import Distiller
    from kd.train.engine import Engine

    timed = {
        "read the batch": (TrainBatches, "read"),
        "the teacher's outputs": (Teachers, "forward"),
        "normalise": (Preprocess, "forward"),
        "dropout": (KeyedDropout, "forward"),
        "KL": (KL, "forward"),
        "cross entropy": (CrossEntropy, "forward"),
        "the student's forward pass": (Distiller, "forward"),
        "backward pass": (Engine, "_backward"),
        "optimizer": (Engine, "update"),
    }
    spent, open_, calls, clock = dict.fromkeys(timed, 0.0), [], [], []
    before = {name: getattr(owner, attribute) for name, (owner, attribute) in timed.items()}

    def wrap(name: str):
        def wrapped(*given, **named):
            if name == "read the batch":
                calls.append(None)
                if len(calls) in (WARM_UP, WARM_UP + steps):
                    clock.append(time.perf_counter())
            counts, began, inside = len(clock) == 1, time.perf_counter(), [0.0]
            open_.append(inside)
            try:
                return before[name](*given, **named)
            finally:
                took = time.perf_counter() - began
                open_.pop()
                if open_:
                    open_[-1][0] += took
                if counts:
                    spent[name] += took - inside[0]

        return wrapped

    for name, (owner, attribute) in timed.items():
        setattr(owner, attribute, wrap(name))
    try:
        _distill(source, teacher, student, batch_size, WARM_UP + steps)
    finally:
        for name, (owner, attribute) in timed.items():
            setattr(owner, attribute, before[name])
    whole = clock[1] - clock[0]
    rows = {**spent, "the rest of the loop": whole - sum(spent.values())}
    return {"parts": {name: 1000 * seconds / steps for name, seconds in rows.items()}}


def _distill(source: str, teacher: str, student: str, batch_size: int, steps: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        arguments = ["--student", student, "--teacher", teacher, "--data.source", source, "--data.val_fraction", 0]
        arguments += ["--data.batch_size", batch_size, "--max_steps", steps + 1, "--epochs", 10_000]
        arguments += ["--checkpoint_every", 10_000, "--precompute", "always", "--output_dir", f"{folder}/run"]
        call("distill", arguments)


def measure(student: str, image_size: int, batch_size: int, steps: int, out: Path | None) -> dict:
    """Profile one student; its entry."""
    machine = about()
    with random_job("kernels.py", student, 10 * batch_size, image_size) as (source, teacher, own):
        given = (source, teacher, student, batch_size, steps)
        found = child("kernels.py", "profile", *given, environment=own)
        found.update(child("kernels.py", "parts", *given, environment=own))
    setting = {"student": student, "image_size": image_size, "batch_size": batch_size, "steps": steps}
    entry = {**machine, **setting, **found}
    record("kernels", f"{student}_{image_size}", entry, out)
    print(f"{student}: {found['ms_per_step']:.1f} ms/step, {found['kernel_percent']:.1f} % in kernels", flush=True)
    for row in found["largest"]:
        print(f"  {row['percent']:5.1f} %  {row['name']}")
    for name, milliseconds in found["parts"].items():
        print(f"  {milliseconds:6.3f} ms  {name}")
    return entry


def main(argv: list[str] | None = None) -> int:
    """Profile and write kernels.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--student", default="light_nn")
    parser.add_argument("--image_size", type=int, default=32)
    parser.add_argument("--batch_size", type=int, default=128)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--out", type=Path, help="folder of the JSON file")
    parser.add_argument("--child", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.child:
        kind, *given = arguments.child
        if kind in ("profile", "parts"):
            print(json.dumps({"profile": profile, "parts": parts}[kind](*given[:3], int(given[3]), int(given[4]))))
        else:
            print(json.dumps({"run": make_teacher(*given)}))
        return 0
    measure(arguments.student, arguments.image_size, arguments.batch_size, arguments.steps, arguments.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
