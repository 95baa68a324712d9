#!/usr/bin/env python
"""What a run costs as the work grows: images, classes, teachers, taps, processes; and a set larger than memory.

    python benchmarks/growth.py                       # all of it
    python benchmarks/growth.py --axes classes taps
    python benchmarks/growth.py --axes memory --limit_mb 1500      # Linux, as root: a cgroup holds the limit

Each row is one `distill.py` run of light_nn on random images, in a process of its own: milliseconds a step (the median
of its log intervals but the first), seconds from the start of the script to the first step with images decoded and
tables made before, and the peak of resident memory. Rows of an axis are measured in turns, so that other work on the
machine falls on all of them.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from common import about, child, median, write  # noqa: E402
from limit import images_folder, make_teacher  # noqa: E402

AXES = {
    "images": [1_000, 4_000, 16_000, 64_000],
    "classes": [10, 100, 1000],
    "teachers": [1, 2, 3, 4],
    "taps": [0, 1, 2, 3],
    "processes": [1, 2],
}
BASE = {"images": 4_000, "classes": 10, "teachers": 1, "taps": 0, "processes": 1}
TAPPED = ("features.0", "features.2", "features.3")
BATCH, EPOCHS, LOG_EVERY = 128, 3, 5


def one(source: str, teachers: int, taps: int, teacher: str, precompute: str) -> dict:
    """One run: milliseconds a step, seconds to the first step, peak of resident memory in MB."""
    began = time.perf_counter()
    from distill import main

    terms = [{"class_path": "KL", "init_args": {"weight": 0.9}}, {"class_path": "CrossEntropy"}]
    for name in TAPPED[:taps]:
        terms.append({"class_path": "FeatureDistance", "init_args": {"student_tap": name, "teacher_tap": name}})
    rank = int(os.environ.get("RANK", "0"))
    with tempfile.TemporaryDirectory() as folder:
        shared = os.environ.get("KD_BENCH_FOLDER", folder)
        names = json.dumps([teacher] * teachers) if teachers > 1 else teacher
        arguments = ["--student", "light_nn", "--teacher", names, "--data.source", source, "--data.val_fraction", 0]
        arguments += ["--losses", json.dumps(terms), "--data.batch_size", BATCH, "--epochs", EPOCHS]
        arguments += ["--log_every", LOG_EVERY, "--output_dir", f"{shared}/run", "--overwrite", "true"]
        arguments += ["--report_to", "none", "--precompute", precompute]
        import kd.fit

        ready, fit = [], kd.fit.fit

        def timed(*given):
            ready.append(time.perf_counter())
            return fit(*given)

        kd.fit.fit = timed
        sys.stdout = sys.stderr
        status = main([str(argument) for argument in arguments])
        sys.stdout = sys.__stdout__
        assert status == 0, status
        rows = [json.loads(line) for line in Path(shared, "run/metrics.jsonl").read_text().splitlines()]
    speeds = [row["images_per_second"] for row in rows if "images_per_second" in row][1:]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1024 if sys.platform == "linux" else 1024**2)
    result = {"ms_per_step": 1000 * BATCH / median(speeds), "seconds_to_first_step": ready[0] - began, "peak_mb": peak}
    return result if rank == 0 else {}


def measure(axis: str, rounds: int, folder: Path) -> list[dict]:
    """The rows of one axis, in turns."""
    settings = [{**BASE, axis: value} for value in AXES[axis]]
    for setting in settings:
        place = folder / f"{setting['images']}_{setting['classes']}"
        if not place.is_dir():
            place.mkdir(parents=True)
            images_folder(place, setting["images"], 32, setting["classes"])
            child("growth.py", "teacher", place)
        setting.update(source=str(place / "set"), teacher=str(place / "teacher"), runs=[])
    # a live teacher where the teacher's own cost is the question
    precompute = "never" if axis in ("teachers", "taps") else "auto"
    for turn in range(rounds + 1):  # the first one decodes and asks the teacher
        for setting in settings:
            given = ("one", setting["source"], setting["teachers"], setting["taps"], setting["teacher"], precompute)
            own = {"KD_CACHE": str(folder / "cache"), "KD_BENCH_FOLDER": str(folder)}
            run = child("growth.py", *given, processes=setting["processes"], environment=own)
            if turn:
                setting["runs"].append(run)
    rows = []
    for setting in settings:
        runs = setting["runs"]
        row = {axis: setting[axis], **{key: median([run[key] for run in runs]) for key in runs[0]}}
        rows.append(row)
        print(
            f"{axis:10} {setting[axis]:>7,}  {row['ms_per_step']:8.1f} ms/step  "
            f"{row['seconds_to_first_step']:6.1f} s to the first step  {row['peak_mb']:7.0f} MB peak",
            flush=True,
        )
    return rows


def within_memory(limit_mb: int, folder: Path) -> dict:
    """A set whose decoded images exceed a memory limit, decoded and trained on within it.

    The limit is a memory cgroup's: it counts the pages of mapped files too, which the kernel drops when it must.
    """
    side, count = 96, limit_mb * 2**20 * 3 // 2 // (3 * 96 * 96)
    group = Path("/sys/fs/cgroup/memory") / f"kd-benchmark-{os.getpid()}"
    if not group.parent.is_dir() or not os.access(group.parent, os.W_OK):
        raise SystemExit("error: --axes memory needs a writable /sys/fs/cgroup/memory (cgroup 1, as root)")
    source = images_folder(folder / "large", count, side)
    group.mkdir()
    try:
        (group / "memory.limit_in_bytes").write_text(str(limit_mb * 2**20))
        (group / "tasks").write_text(str(os.getpid()))  # children are born in it
        run = child("growth.py", "decode", source, folder / "large/cache", environment={"OMP_NUM_THREADS": "1"})
        peak = int((group / "memory.max_usage_in_bytes").read_text()) / 2**20
    finally:
        (group.parent / "tasks").write_text(str(os.getpid()))
        group.rmdir()
    row = {"limit_mb": limit_mb, "decoded_mb": count * 3 * side * side / 2**20, "images": count, **run}
    print(f"memory: {row['decoded_mb']:.0f} MB of decoded images within {limit_mb} MB (peak {peak:.0f} MB): {run}")
    return {**row, "cgroup_peak_mb": peak}


def decode_and_train(source: str, cache: str) -> dict:
    """Decode the whole set and take 20 steps; seconds of both."""
    from train_teacher import main

    with tempfile.TemporaryDirectory() as folder:
        arguments = ["--model", "light_nn", "--data.source", source, "--data.resize", 32, "--data.cache_dir", cache]
        arguments += ["--max_steps", 20, "--data.batch_size", BATCH, "--output_dir", f"{folder}/run"]
        began = time.perf_counter()
        sys.stdout = sys.stderr
        status = main([str(argument) for argument in (*arguments, "--report_to", "none")])
        sys.stdout = sys.__stdout__
        assert status == 0, status
    return {"seconds": time.perf_counter() - began}


def main(argv: list[str] | None = None) -> int:
    """Measure the axes and write growth.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--axes", nargs="+", default=list(AXES), choices=[*AXES, "memory"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--limit_mb", type=int, default=1500, help="of the axis memory")
    parser.add_argument("--out", type=Path, help="folder of the JSON file")
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.child:
        kind, *given = arguments.child
        if kind == "one":
            result = one(given[0], int(given[1]), int(given[2]), given[3], given[4])
        elif kind == "decode":
            result = decode_and_train(*given)
        else:
            sys.stdout = sys.stderr
            result = {"run": make_teacher(f"{given[0]}/set", Path(given[0]), "light_nn")}
            sys.stdout = sys.__stdout__
        if result:
            print(json.dumps(result), flush=True)
        return 0
    machine, axes = about(), {}
    with tempfile.TemporaryDirectory() as folder:
        for axis in arguments.axes:
            if axis == "memory":
                axes[axis] = within_memory(arguments.limit_mb, Path(folder))
            else:
                axes[axis] = measure(axis, arguments.rounds, Path(folder))
    write("growth", {**machine, "rounds": arguments.rounds, "axes": axes}, arguments.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
