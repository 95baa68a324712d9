"""What the tests share: the scripts called in this process, small runs, and images made on the spot."""

from __future__ import annotations

import gc
import importlib
import itertools
import os
import signal
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import forkserver
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parent.parent
SHARED = ROOT.parent / "shared"

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGALRM)  # that scripts handle

os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session", autouse=True)
def _environment(tmp_path_factory):
    """No login of the user's, no network, a cache of this test session's own; the server of `children`, if needed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NETRC", "/nonexistent")
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("KD_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
        for name in ("WANDB_API_KEY", "WANDB_MODE"):
            patch.delenv(name, raising=False)
        if "children" in sys.modules:
            forkserver.ensure_running()
        yield


@pytest.fixture(autouse=True)
def _clean_process(monkeypatch):
    """No tracker key and no accelerator left by another test."""
    for name in ("WANDB_API_KEY", "WANDB_MODE", "ACCELERATE_USE_CPU", "ACCELERATE_MIXED_PRECISION"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(ROOT)
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    for number, handler in handlers.items():  # run_script leaves its own
        signal.signal(number, handler)
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """What a test's `first_tier(CASES, every=N)` leaves out of the first tier is slow."""
    cases, tests = Counter(), {}
    for item in items:
        if mark := item.get_closest_marker("first_tier"):
            test, order = item.nodeid.partition("[")[0], tests.setdefault(item.path, {})
            cases[test] += 1
            place = order.setdefault(test, len(order))
            if cases[test] > mark.args[0] or place % mark.kwargs.get("every", 1):
                item.add_marker(pytest.mark.slow)


def pytest_collection_finish():
    gc.freeze()  # what is imported lives to the end; the collector looking through it took a tenth of the time


@contextmanager
def interrupted_at(*numbers: int) -> Iterator[None]:
    """Ctrl-C after some of the micro-batches that runs of this process take meanwhile, counted from 1 over all runs."""
    from kd.train.meter import Meter

    add, count = Meter.add, itertools.count(1)

    def interrupted(*arguments):
        if next(count) in numbers:
            raise KeyboardInterrupt
        add(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Meter, "add", interrupted)
        yield


class Result:
    """How a script ended: its exit status and what it printed."""

    def __init__(self, status: int, out: str, err: str):
        self.status, self.out, self.err = status, out, err


@pytest.fixture
def call(capsys):
    """Run a script in this process as its command line would: `call("distill", "--epochs", 2)`."""
    from kd.util.errors import run_script

    def run(script: str, *arguments) -> Result:
        main = importlib.import_module(script).main
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit_info:
            run_script(lambda: main([str(argument) for argument in arguments]))
        out, err = capsys.readouterr()
        return Result(exit_info.value.code, out, err)

    return run


def assert_one_line(result: Result, *words: str) -> None:
    """The script refused with one line on stderr that has all these words, and an exit status of 1 or 2."""
    assert result.status in (1, 2), result.out + result.err
    messages = (
        "data: ",
        "note: ",
        "measure: ",
    )  # evaluate.py says there what it does, since its stdout holds the result alone
    lines = [line for line in result.err.splitlines() if line.strip() and not line.startswith(messages)]
    assert len(lines) == 1, result.err
    assert lines[0].startswith("error: ")
    for word in words:
        assert word in lines[0]


# A run of about a second: 200 digits, 2 epochs of 4 steps.
SMALL = ("--config", "recipes/digits/student.yaml", "--data.num_train", 200, "--epochs", 2, "--log_every", 1)

# 200 digits in batches of 48: 5 steps an epoch, the last of 8 images; dropout and flips are drawn.
UNEVEN = (*SMALL, "--model", "light_nn", "--data.resize", 32, "--data.batch_size", 48, "--data.flip", "true")


@pytest.fixture(scope="session")
def teacher_run(tmp_path_factory) -> Path:
    """The folder of a small finished teacher on the digits."""
    import train_teacher

    folder = tmp_path_factory.mktemp("teacher") / "run"
    arguments = ["--config", "recipes/digits/teacher.yaml", "--data.num_train", "200", "--epochs", "8"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        assert train_teacher.main([*arguments, "--output_dir", str(folder), "--report_to", "none"]) == 0
    return folder


@pytest.fixture(scope="session")
def runs(teacher_run, tmp_path_factory) -> list[Path]:
    """Two seeds of a student alone and of the same student distilled from features, of a few steps each."""
    import distill
    import train_teacher

    folder = tmp_path_factory.mktemp("runs")
    few = ["--data.num_train", "200", "--epochs", "2", "--report_to", "none"]
    taps = "{class_path: CosineEmbedding, init_args: {student_tap: features.3, teacher_tap: features.3}}"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        for seed in ("0", "1"):
            alone = ["--config", "recipes/digits/student.yaml", *few, "--seed", seed]
            assert train_teacher.main([*alone, "--output_dir", str(folder / f"alone{seed}")]) == 0
            kd = ["--config", "recipes/digits/kd.yaml", *few, "--seed", seed, "--teacher", str(teacher_run)]
            assert distill.main([*kd, "--losses+", taps, "--output_dir", str(folder / f"kd{seed}")]) == 0
    return [folder / name for name in ("alone0", "alone1", "kd0", "kd1")]


def write_image(path: Path, colour, size=(12, 10), seed=0) -> None:
    """A noisy picture whose mean colour tells its class; size is (width, height)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed).integers(-40, 40, (size[1], size[0], 3))
    Image.fromarray((np.array(colour) + noise).clip(0, 255).astype(np.uint8)).save(path)


@pytest.fixture
def image_folder(tmp_path) -> Path:
    """An ImageFolder data set: train/ and test/ with classes blue, green, red; 12 and 4 PNG images of 12x10 each."""
    colours = {"red": (200, 60, 60), "green": (60, 200, 60), "blue": (60, 60, 200)}
    for split, count in (("train", 12), ("test", 4)):
        for name, colour in colours.items():
            for i in range(count):
                write_image(tmp_path / "pictures" / split / name / f"{i:02d}.png", colour, seed=i)
    return tmp_path / "pictures"
