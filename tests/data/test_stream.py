"""Images decoded at each step, and images kept on a device: the same batches as from the store."""

from __future__ import annotations

import gc
import itertools
import multiprocessing
import os
import pickle
import shutil
import signal
import time
import types
from pathlib import Path

import children
import numpy as np
import pytest
import torch
from conftest import SMALL, assert_one_line
from PIL import Image
from test_data import CPU, equal, files_of, load, make_split, noise, smooth, tensors  # noqa: F401 (a fixture)
from test_resume import assert_same_run
from test_views import EVERY, mixed_batches

from kd import data as kd_data
from kd.data import Data, Split, TrainBatches, Views, build, load_data
from kd.data.corrupt import CorruptedSplit
from kd.data.decode import image_size, read_image
from kd.data.store import Store
from kd.data.stream import AHEAD, Encoded, ahead, in_workers
from kd.run.config import DataConfig
from kd.util.errors import UserError

pytestmark = pytest.mark.first_tier(2)

FLIPPED = Views(flip=True, pad_crop=2)
WORKERS = [0, pytest.param(2, marks=pytest.mark.slow)]  # to start processes takes longer than to decode


def photos(folder: Path, sizes=((12, 10),)) -> Path:
    """33 train and 12 test JPEG images of 3 classes, of these sizes (width, height) in turn."""
    for split, count in (("train", 11), ("test", 4)):
        for place, name in enumerate(("blue", "green", "red")):
            for i in range(count):
                width, height = sizes[i % len(sizes)]
                pixels = np.roll(smooth(height, width), i + 20 * place, axis=1)
                path = folder / split / name / f"{i:02d}.jpg"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels).save(path, quality=90)
    return folder


def parts_of(data: Data) -> dict[str, Split]:
    return {name: getattr(data, name) for name in ("train", "val", "test")}


@pytest.mark.parametrize("workers", WORKERS)
@pytest.mark.parametrize(
    ("sizes", "settings"),
    [
        (((12, 10),), {}),
        (((12, 10), (9, 15)), {"resize": 8}),  # several sizes
        (((40, 30),), {"resize": 8}),  # much larger than needed
        (((12, 10),), {"channels": 1, "mean": [0.5], "std": [0.5]}),
    ],
)
def test_streamed_splits_hold_what_stored_ones_hold(tmp_path, load, sizes, settings, workers):  # noqa: F811
    folder = photos(tmp_path / "pictures", sizes)
    streamed = load(folder, store="stream", num_workers=workers, **settings)
    assert not list((tmp_path / "cache" / "store").glob("*/"))
    stored = load(folder, **settings)
    assert isinstance(stored.train.store.images, np.memmap)
    assert streamed.image_shape == stored.image_shape
    for one, other in zip(parts_of(streamed).values(), parts_of(stored).values(), strict=True):
        assert isinstance(one.store.images, Encoded)
        assert np.array_equal(one.places, other.places)
        assert np.array_equal(one.labels, other.labels)
        assert one.store.identity() == other.store.identity()  # so that they share tables
        wheres = [np.arange(len(one))[start : start + 5] for start in range(0, len(one), 5)]
        for mine, theirs in zip(one.batches(wheres, CPU), other.batches(wheres, CPU), strict=True):
            assert mine[0].keys() == theirs[0].keys() == {"image"}
            for a, b in zip((mine[0]["image"], *mine[1:]), (theirs[0]["image"], *theirs[1:]), strict=True):
                assert torch.equal(a, b)


@pytest.mark.parametrize("workers", WORKERS)
@pytest.mark.parametrize("views", [FLIPPED, EVERY])
def test_streamed_batches_are_stored_ones_wherever_a_loop_starts(tmp_path, load, views, workers):  # noqa: F811
    folder = photos(tmp_path / "pictures")
    stored, streamed = load(folder), load(folder, store="stream", num_workers=workers)
    for start, rank, world, accumulate in ((0, 0, 1, 1), (3, 1, 2, 1), (4, 0, 2, 3)):
        ours, theirs = (
            TrainBatches(data.train, 8, 5, rank, world, views, accumulate, num_classes=3) for data in (streamed, stored)
        )
        for step in range(start, start + 6):  # over an epoch's end
            for micro in reversed(range(ours.num_micro(step))):
                (one, weight), (other, same) = ours.read(step, CPU, micro), theirs.read(step, CPU, micro)
                assert equal(one, other)
                assert weight == same
        assert equal(ours.read(1, CPU)[0], theirs.read(1, CPU)[0])  # and at any other step
        ours.close()


def test_a_loop_reads_ahead_no_further_than_is_stated(tmp_path, load):  # noqa: F811
    streamed = load(photos(tmp_path / "pictures"), store="stream", num_workers=2)
    batches, drawn = TrainBatches(streamed.train, 4, 0, 0, 1, FLIPPED), []
    part = batches._part
    batches._part = lambda step, micro: drawn.append(step) or part(step, micro)
    for step in range(10):
        batches.read(step, CPU)
        assert drawn == list(range(len(drawn)))
        assert len(drawn) <= step + 1 + 2 * AHEAD + 1
    assert len(drawn) > 11
    batches.close()


def test_workers_keep_order_and_leave_the_generators_alone():
    torch.manual_seed(0)
    state = torch.get_rng_state()
    results = in_workers(os.path.join, [("a"), ("b"), ("c")], 2)
    assert list(results) == ["a", "b", "c"]
    assert torch.equal(torch.get_rng_state(), state)


def refuse(number: int) -> None:
    raise UserError(f"no {number}")


def test_after_an_error_no_worker_is_left_for_which_python_would_wait():
    before = set(multiprocessing.active_children())
    gc.disable()
    try:
        with pytest.raises(UserError, match=r"^no 0$"):
            list(in_workers(refuse, [0, 1, 2], 2))
        assert set(multiprocessing.active_children()) == before
    finally:
        gc.enable()


def test_a_thread_reads_ahead_in_order_and_hands_on_errors():
    drawn = []
    endless = (drawn.append(i) or i for i in itertools.count())
    values = ahead(lambda i: 10 // (3 - i), endless)
    assert [next(values) for _ in range(3)] == [3, 5, 10]
    assert len(drawn) == 3 + AHEAD
    with pytest.raises(ZeroDivisionError):
        next(values)
    assert list(ahead(str, [1, 2, 3, 4])) == ["1", "2", "3", "4"]


def test_what_workers_are_given_can_be_sent():
    """Where processes cannot be forked."""
    datasets = pytest.importorskip("datasets")
    from kd.data.parquet import _Column
    from kd.data.raw import RawSplit

    bytes_ = [Path(__file__).read_bytes()]
    column = _Column(datasets.Dataset.from_dict({"image": [{"bytes": bytes_[0]}]}), "image")
    for images in (["a.png"], column, noise(1, 3, 4, 4)):
        split = pickle.loads(pickle.dumps(RawSplit(images, np.zeros(1, int), "row")))
        assert split.name(0) == "row 0"
    assert pickle.loads(pickle.dumps(column))[0] == bytes_[0]


# What is wrong with the images


@pytest.mark.parametrize("workers", [0, 2])
def test_an_unreadable_image_ends_in_one_line_when_it_is_met(tmp_path, load, workers):  # noqa: F811
    folder = photos(tmp_path / "pictures")
    bad = folder / "train" / "green" / "03.jpg"
    bad.write_bytes(bad.read_bytes()[:-60])  # its head is whole
    streamed = load(folder, store="stream", num_workers=workers, val_fraction=0)
    with pytest.raises(UserError, match=r"^unreadable image: \S*green/03\.jpg \(.*--data\.skip_unreadable true$"):
        list(streamed.train.batches([np.arange(33)], CPU))


def test_an_image_without_a_head_is_named_at_the_start(tmp_path, load):  # noqa: F811
    folder = photos(tmp_path / "pictures")
    (folder / "test" / "red" / "01.jpg").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"unreadable image: \S*red/01\.jpg \(not an image of a known format"):
        load(folder, store="stream")


@pytest.mark.parametrize("sizes", [((12, 10),), ((12, 10), (9, 15)), ((40, 30),)])
def test_unreadable_images_are_left_out_as_from_the_store(tmp_path, load, capsys, sizes):  # noqa: F811
    folder = photos(tmp_path / "pictures", sizes)
    for name in ("train/green/03.jpg", "test/red/01.jpg"):
        path = folder / name
        path.write_bytes(path.read_bytes()[:-60])
    settings = {"skip_unreadable": True, "resize": 8, "num_workers": 0}
    streamed, said = load(folder, store="stream", **settings), capsys.readouterr().out
    stored = load(folder, **settings)
    for name in ("train", "test"):
        assert f"1 unreadable images of {name} are left out: {folder / name}" in said
        one, other = parts_of(streamed)[name], parts_of(stored)[name]
        assert np.array_equal(one.places, other.places)
        assert np.array_equal(one.store.labels, other.store.labels)
        assert np.array_equal(one.store.images[one.places], other.store.images[other.places])


def test_several_sizes_need_resize_when_streamed_too(tmp_path, load):  # noqa: F811
    folder = photos(tmp_path / "pictures", ((12, 10), (9, 15)))
    for _ in range(2):  # looked at, then known
        with pytest.raises(UserError, match=r"images differ in size: 12x10 and 9x15; set data\.resize"):
            load(folder, store="stream")


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_head_tells_the_size_of_the_upright_image(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    for suffix in ("jpg", "png", "tiff"):
        path = tmp_path / f"a.{suffix}"
        Image.fromarray(noise(6, 4, 3)).save(path, exif=exif)
        assert image_size(str(path)) == image_size(path.read_bytes()) == read_image(path, 3).shape[1:]


# Which way


def small_disk(monkeypatch, free: int) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: types.SimpleNamespace(free=free))


def test_what_would_fill_the_disk_is_streamed_and_said(tmp_path, load, monkeypatch, capsys):  # noqa: F811
    folder, needed = photos(tmp_path / "pictures"), 45 * 3 * 12 * 10
    small_disk(monkeypatch, 2 * needed - 2)
    assert isinstance(load(folder, num_workers=3).train.store.images, Encoded)
    said = capsys.readouterr().out
    assert "ahead of it by 3 processes (stored they would take 1.62e-05 GB, the limit is 1.62e-05: half of" in said
    assert isinstance(load(folder, store="disk").train.store.images, np.memmap)
    assert isinstance(load(folder).train.store.images, np.memmap)  # it is there now
    small_disk(monkeypatch, 2 * needed)
    assert isinstance(load(folder, channels=1, mean=[0.5], std=[0.5]).train.store.images, np.memmap)


def test_the_size_that_images_are_brought_to_counts(tmp_path, load, monkeypatch):  # noqa: F811
    folder = photos(tmp_path / "pictures", ((40, 30), (30, 40)))
    small_disk(monkeypatch, 2 * 45 * 3 * 8 * 8)
    assert isinstance(load(folder, resize=8).train.store.images, np.memmap)
    small_disk(monkeypatch, 2 * 45 * 3 * 20 * 20 - 2)
    assert isinstance(load(folder, resize=20).train.store.images, Encoded)


def test_named_sets_are_stored_whatever_is_asked():
    assert isinstance(load_data(DataConfig(store="stream")).train.store.images, np.memmap)


@pytest.mark.slow
@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("sizes", [((12, 10),), ((12, 10), (9, 15))])
def test_all_cores_build_what_one_builds(tmp_path, load, monkeypatch, sizes, skip):  # noqa: F811
    folder = photos(tmp_path / "pictures", sizes)
    if skip:
        (folder / "train" / "green" / "03.jpg").write_bytes(b"no image")
    settings = {"resize": 8, "skip_unreadable": skip}
    alone = load(folder, **settings)
    monkeypatch.setattr(build, "FEW", 0)
    monkeypatch.setattr(build, "BLOCK_BYTES", 2000)
    together = load_data(DataConfig(source=str(folder), cache_dir=str(tmp_path / "other"), **settings))
    assert np.array_equal(alone.train.store.images, together.train.store.images)
    assert np.array_equal(alone.test.store.images, together.test.store.images)
    assert np.array_equal(alone.train.store.labels, together.train.store.labels)


# On the device


class Untouchable:
    """Images that nobody may read."""

    shape, itemsize = (1, 3, 6, 6), 1

    def __getitem__(self, _places):
        raise AssertionError("read from the disk")


@pytest.mark.parametrize("views", [FLIPPED, EVERY])
@pytest.mark.parametrize("world", [1, 2])
def test_what_is_kept_on_the_device_is_what_is_read(views, world):
    split = make_split(26)
    kept = split.kept_on(CPU)
    assert len(kept.resident[0]["image"]) == 26  # of the store's 29
    kept.store = Store(Untouchable(), split.store.labels)
    for rank in range(world):
        ours, theirs = (TrainBatches(part, 12, 5, rank, world, views, 1, num_classes=4) for part in (kept, split))
        for step in (0, 1, 2, 5):
            assert equal(ours.read(step, CPU)[0], theirs.read(step, CPU)[0])


def test_streamed_images_are_decoded_once_for_the_device(tmp_path, load):  # noqa: F811
    folder = photos(tmp_path / "pictures")
    kept = load(folder, store="stream", num_workers=2).train.kept_on(CPU)
    expected = torch.from_numpy(load(folder).train.store.images[kept.places])
    assert torch.equal(kept.resident[0]["image"], expected)


@pytest.mark.parametrize(
    ("room", "kept", "words"),
    [
        (0, (), ""),
        (9_999, (), "read at each step (1e-05 GB, the limit is 1e-05 GB: data.device_share 0.5 of what is free"),
        (10_000, ("train",), "images of train are kept on the GPU (1e-05 GB"),
        (12_000, ("train", "val"), "images of train and val are kept on the GPU (1.2e-05 GB"),
    ],
)
def test_images_are_kept_on_a_device_that_has_room(monkeypatch, capsys, room, kept, words):
    store = Store(noise(160, 1, 10, 10), np.arange(160) % 4)
    splits = [Split(store, np.arange(*ends)) for ends in ((0, 100), (100, 120), (120, 160))]
    monkeypatch.setattr(kd_data, "free_memory", lambda _device: 2 * room)
    placed = Data(list("abcd"), *splits).on_device(CPU, 0.5)
    assert tuple(name for name, split in parts_of(placed).items() if split.resident is not None) == kept
    said = capsys.readouterr().out
    assert words in said
    assert len(said.splitlines()) == bool(words)


def test_corrupted_images_are_corrupted_ahead_too(tmp_path, load):  # noqa: F811
    folder = photos(tmp_path / "pictures", ((40, 30),))
    stored, streamed = load(folder).test, load(folder, store="stream", num_workers=2).test
    worse = [CorruptedSplit(split.store, split.places, "gaussian_noise", 2) for split in (stored, streamed)]
    wheres = [np.arange(5), np.arange(5, 12)]
    for one, other in zip(*(split.batches(wheres, CPU) for split in worse), strict=True):
        assert torch.equal(one[0]["image"], other[0]["image"])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("resident", [True, False])
def test_a_gpu_sees_the_same_batches_and_is_not_waited_for(resident):
    gpu = torch.device("cuda")
    expected = [mixed_batches(EVERY).read(step, CPU)[0] for step in range(6)]
    source = mixed_batches(EVERY)
    if resident:
        source.split = source.split.kept_on(gpu)
    for step in (0, 1):  # the first allocations wait
        source.read(step, gpu)
    torch.cuda.set_sync_debug_mode("error")
    try:
        batches = [source.read(step, gpu)[0] for step in range(6)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for batch, same in zip(batches, expected, strict=True):
        for name, value in tensors(same).items():
            assert torch.equal(tensors(batch)[name].cpu(), value)


# Runs


def pictures_of_digits(folder: Path) -> Path:
    """240 train and 60 test digits as PNG files."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    for i in range(300):
        path = folder / ("train" if i < 240 else "test") / str(digits.target[i]) / f"{i:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((digits.images[i] * 15).astype(np.uint8)).save(path)
    return folder


VIEWS = ("--data.flip", "true", "--data.pad_crop", 1, "--data.mixup", 0.4)
STREAMED = ("--data.store", "stream", "--data.num_workers", 2)


def arguments(source: Path, *more) -> tuple:
    return (*SMALL, "--data.source", source, "--data.batch_size", 48, "--checkpoint_every", 2, "--report_to", "none",
            *VIEWS, *more)  # fmt: skip


@pytest.mark.slow
def test_a_streamed_run_on_two_processes_killed_in_an_epoch_ends_as_a_stored_one(tmp_path):
    count = 2
    source = pictures_of_digits(tmp_path / "digits")
    stored, streamed = (arguments(source, *more, "--output_dir", tmp_path / more[1]) for more in
                        (("--data.store", "disk"), STREAMED))  # fmt: skip
    run = children.run_several
    assert run("train_teacher", stored, count) == [0] * count
    assert run("train_teacher", streamed, count, ("kd.train.meter.Meter.add", 4)).count(-signal.SIGKILL)
    assert not (tmp_path / "stream" / "summary.json").exists()
    assert run("train_teacher", streamed, count) == [0] * count
    assert_same_run(tmp_path / "disk", tmp_path / "stream")


@pytest.mark.slow
def test_a_teachers_table_serves_stored_and_streamed_images_alike(tmp_path, teacher_run, call):
    source = pictures_of_digits(tmp_path / "digits")
    for name, more in (("disk", ()), ("stream", STREAMED)):
        config = ("--config", "recipes/digits/kd.yaml", "--teacher", teacher_run, "--data.source", source)
        result = call(
            "distill", *config, "--epochs", 2, "--report_to", "none", *more, "--data.cache_dir",
            tmp_path / "cache", "--output_dir", tmp_path / name,
        )  # fmt: skip
        assert result.status == 0, result.err
    assert "teacher: looked up" in result.out
    assert (tmp_path / "disk" / "model.safetensors").read_bytes() == (
        tmp_path / "stream" / "model.safetensors"
    ).read_bytes()


@pytest.mark.slow
def test_ctrl_c_stops_no_worker_before_the_run_is_saved(tmp_path):
    source = pictures_of_digits(tmp_path / "digits")
    stored, streamed = (arguments(source, *more, "--output_dir", tmp_path / more[1]) for more in
                        (("--data.store", "disk"), STREAMED))  # fmt: skip
    assert children.run("train_teacher", stored) == 0
    assert children.run("train_teacher", streamed, sabotage=_interrupt_group) == 128 + signal.SIGINT
    assert children.run("train_teacher", streamed) == 0
    assert_same_run(tmp_path / "disk", tmp_path / "stream")


def _interrupt_group() -> None:
    """At the third step send SIGINT to the process and to its workers, as a terminal does."""
    from kd.train.meter import Meter

    os.setsid()
    add, calls = Meter.add, []

    def wrapped(*args):
        calls.append(1)
        if len(calls) == 3:
            os.killpg(0, signal.SIGINT)
        return add(*args)

    Meter.add = wrapped


def test_a_worker_that_is_killed_ends_the_run_in_one_line(tmp_path, call, monkeypatch):
    folder = photos(tmp_path / "pictures")
    read = Encoded.__getitem__

    def killed(self, places):  # the first process reads some images itself, to know the data again
        if torch.utils.data.get_worker_info() is not None:
            os.kill(os.getpid(), signal.SIGKILL)
        return read(self, places)

    monkeypatch.setattr(Encoded, "__getitem__", killed)
    result = call(
        "train_teacher", *SMALL, "--data.source", folder, "--data.num_train", 12, "--data.resize", 28, "--data.crop",
        28, *STREAMED, "--output_dir", tmp_path / "run",
    )  # fmt: skip
    assert_one_line(result, "a process that decodes images was killed", "data.num_workers", "last checkpoint")


def _die_while_building(folder: str, cache: str, inside) -> None:
    def die(*_):
        inside.set()
        time.sleep(0.3)  # the other one is waiting for the lock
        os.kill(os.getpid(), signal.SIGKILL)

    build._decode = die
    load_data(DataConfig(source=folder, cache_dir=cache))


def _load_meanwhile(folder: str, cache: str, inside) -> None:
    inside.wait()
    assert len(load_data(DataConfig(source=folder, cache_dir=cache, val_fraction=0)).train) == 33


@pytest.mark.slow
def test_when_the_builder_is_killed_the_next_one_takes_over(tmp_path):
    folder, cache, inside = photos(tmp_path / "pictures"), tmp_path / "cache", children.CONTEXT.Event()
    processes = [
        children.CONTEXT.Process(target=target, args=(str(folder), str(cache), inside))
        for target in (_die_while_building, _load_meanwhile)
    ]
    for process in processes:
        process.start()
    assert children.finish(*processes) == [-signal.SIGKILL, 0]
    assert [path.name for path in (cache / "store").glob("*.tmp-*")] == []
