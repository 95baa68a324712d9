#!/usr/bin/env python
"""What a run costs as the work grows: images, classes, teachers, taps, processes; and a set larger than memory.

    python benchmarks/growth.py                       # all of it
    python benchmarks/growth.py --axes classes taps
    python benchmarks/growth.py --axes memory --limit_mb 1200

Each row is one `distill.py` run of light_nn on random images, in a process of its own: milliseconds a step (the median
of its log intervals but the first), seconds from the start of the script to the first step, once with nothing made
before (images decoded, the teacher's table computed) and once with everything found, and the second's peak of resident
memory. The teacher runs at each step in the axes teachers and taps, where its own cost is the question, and has
a table in the others. Rows of an axis are measured in turns, so that other work on the machine falls on all of them.

memory: within a limit on memory a set is decoded, a table of a teacher's features of all its images is made and trained
from, and a table of views is filled and looked up; each of the three is larger than the limit, and so are the Parquet
files. The limit is a memory cgroup's where this user may make one; it counts pages of mapped files too, which the
kernel drops when it must: "held" is what it cannot drop, looked at fifty times a second. Elsewhere the limit is
RLIMIT_DATA, of each process, and what is held is not known. Takes 12 GB of disk at 1,200 MB.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import resource
import sys
import tempfile
import threading
import time
from pathlib import Path

from common import about, call, child, make_teacher, median, random_images, record

AXES = {
    "images": [1_000, 4_000, 16_000, 64_000],
    "classes": [10, 100, 1000],
    "teachers": [1, 2, 3, 4],
    "taps": [0, 1, 2, 3],
    "processes": [1, 2],
}
BASE = {"images": 4_000, "classes": 10, "teachers": 1, "taps": 0, "processes": 1}
TAPPED = ("features.0", "features.2", "features.3")
BATCH, LOG_EVERY = 128, 5
# what is done within the memory limit, in turn, and the arguments of the runs
STAGES = {"store": [], "table": ["--epochs", 1], "views": ["--epochs", 2, "--data.flip", "true"]}


def _peak_mb() -> float:
    """The most resident memory that this process has had, in MB of 10^6 bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1024 if sys.platform == "linux" else 1) / 1e6


def _terms(taps: int) -> str:
    terms = [{"class_path": "KL", "init_args": {"weight": 0.9}}, {"class_path": "CrossEntropy"}]
    for name in TAPPED[:taps]:
        terms.append({"class_path": "FeatureDistance", "init_args": {"student_tap": name, "teacher_tap": name}})
    return json.dumps(terms)


def one(source: str, teachers: int, taps: int, teacher: str, precompute: str, steps: int, folder: str) -> dict:
    """One run: milliseconds a step, seconds to the first step, peak of resident memory; nothing on other ranks."""
    began = time.perf_counter()
    names = json.dumps([teacher] * teachers) if teachers > 1 else teacher
    arguments = ["--student", "light_nn", "--teacher", names, "--data.source", source, "--data.val_fraction", 0]
    arguments += ["--losses", _terms(taps), "--data.batch_size", BATCH, "--max_steps", steps, "--epochs", 10_000]
    arguments += ["--log_every", LOG_EVERY, "--output_dir", f"{folder}/run", "--overwrite", "true"]
    import kd.train.fit

    ready, fit = [], kd.train.fit.fit

    def timed(*given):
        ready.append(time.perf_counter())
        return fit(*given)

    kd.train.fit.fit = timed
    try:
        call("distill", [*arguments, "--precompute", precompute])
    finally:
        kd.train.fit.fit = fit
    if os.environ.get("RANK", "0") != "0":
        return {}
    rows = [json.loads(line) for line in Path(folder, "run/metrics.jsonl").read_text().splitlines()]
    speeds = [row["images_per_second"] for row in rows if "images_per_second" in row][1:]
    waited = ready[0] - began
    return {"ms_per_step": 1000 * BATCH / median(speeds), "seconds_to_first_step": waited, "peak_mb": _peak_mb()}


def measure(axis: str, values: list[int], rounds: int, steps: int, folder: Path, out: Path | None) -> dict:
    """The rows of one axis, in turns."""
    machine, settings = about(), [{**BASE, axis: value} for value in values]
    own = {"KD_CACHE": str(folder / "cache")}
    for setting in settings:
        place = folder / f"{setting['images']}_{setting['classes']}"
        if not place.is_dir():
            random_images(place / "set", setting["images"], 32, setting["classes"])
            child(
                "growth.py", "teacher", place, "light_nn", place / "set", environment={"KD_CACHE": str(place / "own")}
            )
        setting.update(source=str(place / "set"), teacher=str(place / "teacher"), first=None, runs=[])
    precompute = "never" if axis in ("teachers", "taps") else "always"
    for _ in range(rounds + 1):  # the first turn decodes and asks the teacher, where no earlier row has
        for setting in settings:
            given = (setting["source"], setting["teachers"], setting["taps"], setting["teacher"], precompute, steps)
            run = child("growth.py", "one", *given, folder, processes=setting["processes"], environment=own)
            if setting["first"] is None:
                setting["first"] = run
            else:
                setting["runs"].append(run)
    rows = []
    for setting in settings:
        row = {axis: setting[axis], **{key: median([run[key] for run in setting["runs"]]) for key in setting["first"]}}
        # rows that share a set find what the first of them made
        row["cold_seconds"] = setting["first"]["seconds_to_first_step"] if axis in ("images", "classes") else None
        rows.append(row)
        print(
            f"{axis:10} {setting[axis]:>7,}  {row['ms_per_step']:8.1f} ms/step  "
            f"{row['seconds_to_first_step']:6.1f} s to the first step  {row['peak_mb']:7.0f} MB peak",
            flush=True,
        )
    entry = {**machine, "rounds": rounds, "steps": steps, "batch_size": BATCH, "rows": rows}
    record("growth", axis, entry, out)
    return entry


@contextlib.contextmanager
def memory_group(limit_bytes: int):
    """The folder of a new memory cgroup (version 1 or 2) with this limit, or None where none can be made."""
    name = f"kd-benchmark-{os.getpid()}"
    for parent, file in (
        (Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes"),
        (Path("/sys/fs/cgroup"), "memory.max"),
    ):
        group = parent / name
        try:
            group.mkdir()
        except OSError:
            continue
        if (group / file).exists():
            (group / file).write_text(str(limit_bytes))
            try:
                yield group
            finally:
                for _ in range(20):  # a child that was stopped may still be leaving it
                    with contextlib.suppress(OSError):
                        group.rmdir()
                        break
                    time.sleep(0.5)
            return
        group.rmdir()
    yield None


def _held(group: Path) -> int:
    """Bytes that the processes of a memory cgroup hold and the kernel cannot drop: all but pages of files."""
    stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    return int(stat.get("anon") or stat["rss"]) + int(stat["shmem"])  # version 2's name, version 1's


@contextlib.contextmanager
def watched(group: Path | None):
    """A list that gets the most, in MB, that a memory cgroup's processes hold meanwhile; None without a group."""
    seen, ended = [], threading.Event()

    def watch() -> None:
        while group and not ended.wait(0.02):
            seen.append(_held(group) / 1e6)

    most: list[float | None] = []
    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield most
    finally:
        ended.set()
        thread.join()
        most.append(max(seen, default=None))


def within_memory(limit_mb: int, folder: Path, out: Path | None) -> dict:
    """A set, a table of a teacher and a table of views larger than a limit on memory, made and trained on within it."""
    machine, side, folder = about(), 96, folder / "large"
    count = int(1.5 * limit_mb * 1e6 / (3 * side * side))
    source = random_images(folder / "set", count, side)
    # a teacher of a set of its own: the large one is decoded within the limit
    small, own = random_images(folder / "few", 100, side), {"KD_CACHE": str(folder / "own")}
    teacher = child("growth.py", "teacher", folder, "light_nn", small, "--data.crop", 32, environment=own)["run"]
    cache, rows, before = folder / "cache", [], 0
    apart = {"KD_CACHE": str(cache), "HF_DATASETS_CACHE": str(folder / "hf")}
    with memory_group(int(limit_mb * 1e6)) as group:
        for stage in STAGES:
            given = (stage, source, teacher, folder / stage, group or "", int(limit_mb * 1e6))
            with watched(group) as most:
                run = child("growth.py", "large", *given, environment=apart)
            files = (
                sum(file.stat().st_blocks * 512 for file in cache.rglob("*") if file.suffix in (".npy", ".bin")) / 1e6
            )
            rows.append({"stage": stage, **run, "made_mb": files - before, "held_mb": most[0]})
            before = files
            print(f"memory: {rows[-1]}", flush=True)
    entry = {**machine, "limit_mb": limit_mb, "limit": "cgroup" if group else "RLIMIT_DATA", "images": count}
    entry |= {"source_mb": sum(f.stat().st_size for f in Path(source).rglob("*.parquet")) / 1e6, "rows": rows}
    record("growth", "memory", entry, out)
    return entry


def large(stage: str, source: str, teacher: str, folder: str, group: str, limit_bytes: int) -> dict:
    """Within the limit: seconds of a stage, and images per second of its training steps."""
    if group:
        Path(group, "cgroup.procs").write_text(str(os.getpid()))
    else:
        resource.setrlimit(resource.RLIMIT_DATA, (limit_bytes, limit_bytes))
    began = time.perf_counter()
    if stage == "store":
        from kd.data import load_data
        from kd.run.config import DataConfig

        with contextlib.redirect_stdout(sys.stderr):
            load_data(DataConfig(source=source, val_fraction=0))
        return {"seconds": time.perf_counter() - began, "images_per_second": None}
    taps = [{"student_tap": name, "teacher_tap": name} for name in TAPPED[1:]]
    terms = [{"class_path": "FeatureDistance", "init_args": tap} for tap in taps]
    arguments = ["--student", "light_nn", "--teacher", teacher, "--data.source", source, "--data.val_fraction", 0]
    arguments += ["--losses", json.dumps(terms), "--data.batch_size", BATCH, "--data.crop", 32, *STAGES[stage]]
    call("distill", [*arguments, "--precompute", "always", "--output_dir", folder])
    summary = json.loads(Path(folder, "summary.json").read_text())
    shown = summary["epochs"] * summary["images"]["train"]
    return {"seconds": time.perf_counter() - began, "images_per_second": shown / summary["seconds"]}


def main(argv: list[str] | None = None) -> int:
    """Measure the axes and write growth.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--axes", nargs="+", default=[*AXES, "memory"], choices=[*AXES, "memory"])
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--most", type=int, help="leave out rows of the axes above this, for a quick look")
    parser.add_argument("--limit_mb", type=int, default=1200, help="of the axis memory")
    parser.add_argument("--out", type=Path, help="folder of the JSON file")
    parser.add_argument("--child", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.child:
        kind, *given = arguments.child
        if kind == "one":
            result = one(given[0], int(given[1]), int(given[2]), given[3], given[4], int(given[5]), given[6])
        elif kind == "large":
            result = large(*given[:5], int(given[5]))
        else:
            result = {"run": make_teacher(*given)}
        if result:
            print(json.dumps(result), flush=True)
        return 0
    with tempfile.TemporaryDirectory() as folder:
        for axis in arguments.axes:
            if axis == "memory":
                within_memory(arguments.limit_mb, Path(folder), arguments.out)
                continue
            values = [value for value in AXES[axis] if value <= (arguments.most or value)]
            measure(axis, values, arguments.rounds, arguments.steps, Path(folder), arguments.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
