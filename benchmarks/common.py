"""What the speed benchmarks share: measured children, small data sets, and results as JSON with the hardware named.

Every measured run is a process of its own, so that neither side finds the other's allocator settings or caches, and
has a cache folder that the benchmark makes and deletes: nothing of the user's is read or removed.
"""

from __future__ import annotations

import contextlib
import datetime
import io
import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # kd and the scripts, which are not installed
RESULTS = ROOT / "benchmarks/results"
SHARD = 4096  # images a file: datasets before 4.2 holds a whole file in memory
DISTINCT = 256  # different random images of a made set; the others are copies, which cost a run the same


def child(script: str, *arguments, processes: int = 1, environment: dict | None = None) -> dict:
    """Run a benchmark script's own `--child` mode and return the JSON object that is its last line.

    Raises:
        RuntimeError: the child failed; the end of its output is in the message.
    """
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command += [str(ROOT / "benchmarks" / script), "--child", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env={**os.environ, **(environment or {})})
    if done.returncode:
        output = (done.stdout + done.stderr)[-4000:]
        raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}:\n{output}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def call(script: str, arguments: Iterable) -> None:
    """Run train_teacher.py or distill.py in this process; what it says goes to stderr, as stdout is the child's.

    Raises:
        RuntimeError: it was stopped.
    """
    import importlib

    main = importlib.import_module(script).main
    with contextlib.redirect_stdout(sys.stderr):
        status = main([*map(str, arguments), "--report_to", "none"])
    if status:
        raise RuntimeError(f"{script} ended with {status}")


def seconds_to_last_step(script: str, arguments: Iterable) -> float:
    """Seconds of a script from after its imports until its last step and checkpoint; the test comes after that."""
    import kd.teachers.precompute
    import kd.train.conclude
    import kd.train.fit  # before the clock starts, as the imports of what it is compared with
    import kd.train.setup

    conclude, ended = kd.train.conclude.conclude, []

    def timed(*given):
        ended.append(time.perf_counter())
        return conclude(*given)

    kd.train.conclude.conclude = timed
    try:
        began = time.perf_counter()
        call(script, arguments)
    finally:
        kd.train.conclude.conclude = conclude
    return ended[0] - began


def make_teacher(folder: str | Path, model: str, source: str, *arguments) -> str:
    """A run folder of one step: what a teacher says does not change what a step costs."""
    given = ["--model", model, "--data.source", source, "--max_steps", 1, "--data.batch_size", 16]
    given += ["--data.val_fraction", 0, *arguments]
    call("train_teacher", [*given, "--output_dir", f"{folder}/teacher"])
    return f"{folder}/teacher"


@contextlib.contextmanager
def random_job(script: str, student: str, images: int, image_size: int) -> Iterator[tuple[str, str, dict]]:
    """For a time: a set of random images, the run folder of a teacher like the student, and the environment of children
    whose cache they have to themselves."""
    with tempfile.TemporaryDirectory() as folder:
        own = {"KD_CACHE": f"{folder}/cache"}
        source = random_images(Path(folder, "set"), images, image_size)
        yield source, child(script, "teacher", folder, student, source, environment=own)["run"], own


def _parquet(folder: Path, classes: list[str], **splits: Iterable[tuple[bytes, int]]) -> str:
    """Write image files and labels in the Hugging Face layout: files of `SHARD` rows, in groups of a hundred."""
    import pyarrow
    import pyarrow.parquet
    from datasets import ClassLabel, Features, Image

    schema = Features({"image": Image(), "label": ClassLabel(names=classes)}).arrow_schema
    (folder / "data").mkdir(parents=True)
    for name, rows in splits.items():
        rows, count = iter(rows), itertools.count()
        while block := list(itertools.islice(rows, SHARD)):
            files = [{"bytes": file, "path": None} for file, _ in block]
            table = pyarrow.table({"image": files, "label": [label for _, label in block]}, schema=schema)
            pyarrow.parquet.write_table(table, folder / f"data/{name}-{next(count):05d}.parquet", row_group_size=100)
    return str(folder)


def _png(pixels) -> bytes:
    """A PNG file of bytes (C, H, W)."""
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(pixels.transpose(1, 2, 0)).save(file, "png")
    return file.getvalue()


def random_images(folder: Path, count: int, size: int, num_classes: int = 10) -> str:
    """A data set of `count` random images for training and as many as there are classes for the test."""
    import numpy as np

    draw = np.random.default_rng(0)
    made = [_png(draw.integers(0, 256, (3, size, size), dtype=np.uint8)) for _ in range(min(count, DISTINCT))]

    def rows(number: int):
        return ((made[index % len(made)], index % num_classes) for index in range(number))

    classes = [f"class {i}" for i in range(num_classes)]
    return _parquet(folder, classes, train=rows(count), test=rows(num_classes))


def subset(source: str, folder: Path, train: int, test: int) -> str:
    """A data set of `train` class-balanced and `test` random images of another, the same on each call."""
    import numpy as np

    from kd.data import load_data
    from kd.run.config import DataConfig

    data = load_data(DataConfig(source=source, val_fraction=0, num_train=train))
    some = np.random.default_rng(0).permutation(len(data.test))[:test]

    def rows(split, positions):
        return ((_png(split.store.images[split.places[i]]), int(split.labels[i])) for i in positions)

    return _parquet(folder, data.classes, train=rows(data.train, range(train)), test=rows(data.test, some))


def about() -> dict:
    """The machine and the versions that the numbers belong to."""
    import torch

    from kd.util.machine import device_name, git_commit, versions

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return {
        "device": device_name(device),
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "platform": platform.platform(terse=True),
        "load_before": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "date": datetime.date.today().isoformat(),
        "commit": git_commit(),
        "versions": versions(),
    }


def _processor() -> str:
    """The CPU's name, as the system gives it."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def median(values) -> float:
    """Median of numbers."""
    return statistics.median(values)


def spread(values, digits: int = 2) -> str:
    """Median with the smallest and the largest, for a table."""
    return f"{median(values):,.{digits}f} ({min(values):,.{digits}f} to {max(values):,.{digits}f})"


def record(name: str, key: str, entry: dict, out: Path | None = None) -> None:
    """Put one entry into benchmarks/results/NAME.json, or into that of the folder `out`; the other entries stay.

    Called after each round, so that what was measured is kept when a benchmark is stopped.
    """
    folder = out or RESULTS
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    entries = json.loads(path.read_text()) if path.exists() else {}
    entries[key] = entry
    aside = path.with_suffix(".tmp")
    aside.write_text(json.dumps(entries, indent=1) + "\n")
    aside.replace(path)
