"""Data sets and images as strangers' tools leave them: read as they are meant, or refused in one line."""

from __future__ import annotations

import dataclasses
import errno
import itertools
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import write_image
from filelock import FileLock
from PIL import Image

from kd.data import load_data
from kd.data.decode import UnreadableImage, open_image, read_image
from kd.models import load_classifier
from kd.models.preprocess import centre_crop, resize_shorter_side
from kd.run.config import DataConfig
from kd.util.errors import UserError

pytestmark = pytest.mark.first_tier(1, every=5)

# Images whose numbers are on another scale than 0 to 255

RAMP = np.arange(256).reshape(16, 16)


@pytest.mark.parametrize(
    ("pixels", "suffix"),
    [
        (RAMP.astype(np.float32) / 255, "tiff"),
        (RAMP.astype(np.float32), "tiff"),
        (RAMP.astype(np.int32), "tiff"),
        (RAMP.astype(np.int32) << 8, "tiff"),
        ((RAMP << 4).astype(np.uint16), "tiff"),
        ((RAMP << 4).astype(np.uint16), "png"),
        ((RAMP << 8).astype(np.uint16), "png"),
    ],
    ids=lambda value: value if isinstance(value, str) else f"{value.dtype} to {value.max():g}",
)
def test_pixels_on_any_usual_scale_become_eight_bits(tmp_path, pixels, suffix):
    Image.fromarray(pixels).save(tmp_path / f"a.{suffix}")
    assert np.array_equal(read_image(tmp_path / f"a.{suffix}", 1)[0], RAMP)
    assert np.array_equal(read_image(pixels, 3), np.stack([RAMP] * 3))


@pytest.mark.parametrize(
    "pixels",
    [RAMP / 255, RAMP.astype(np.float64), RAMP, (RAMP << 8).astype(np.uint16), (RAMP > 127), RAMP[..., None]],
    ids=lambda pixels: f"{pixels.dtype} to {pixels.max():g}",
)
def test_arrays_on_any_usual_scale_become_eight_bits(pixels):
    expected = RAMP if pixels.dtype != bool else 255 * (RAMP > 127)
    assert np.array_equal(read_image(pixels, 1)[0], expected)
    if pixels.ndim == 2:
        assert np.array_equal(read_image(np.stack([pixels] * 3, -1), 3), np.stack([expected] * 3))


@pytest.mark.parametrize(
    ("pixels", "words"),
    [
        (RAMP - 1.0, "pixels of float64 from -1 to 254; known are 0 to 1"),
        (RAMP << 16, r"from 0 to 1.67117e\+07; known"),
        (np.where(RAMP > 3, np.nan, RAMP), "from nan to nan"),
        (np.zeros((0, 4)), "pixels of float64; known"),
        (np.zeros((3, 16, 16), np.uint8), r"an array of shape \(3, 16, 16\), not \(H, W\)"),
        (np.array([["a"]]), "pixels of <U1"),
    ],
    ids=["negative", "32 bits", "nan", "empty", "channels first", "text"],
)
def test_pixels_on_no_known_scale_are_refused(pixels, words):
    with pytest.raises(UnreadableImage, match=words):
        open_image(pixels)


def test_a_pil_image_is_turned_as_its_file_is(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(np.stack([RAMP] * 3, -1).astype(np.uint8)).save(tmp_path / "a.png", exif=exif)
    with Image.open(tmp_path / "a.png") as picture:
        assert np.array_equal(read_image(picture, 3), read_image(tmp_path / "a.png", 3))
    assert np.array_equal(read_image(tmp_path / "a.png", 1)[0], np.rot90(RAMP, -1))


def test_a_pipe_is_no_image(tmp_path):
    os.mkfifo(tmp_path / "x.png")
    with pytest.raises(UnreadableImage, match="not a file"):
        read_image(tmp_path / "x.png", 3)


# Folders


@pytest.fixture
def load(tmp_path):
    """Open a folder with a cache of the test's own."""

    def run(folder, **settings):
        return load_data(DataConfig(source=str(folder), cache_dir=str(tmp_path / "cache"), **settings))

    return run


@pytest.fixture
def refused(load):
    """Open a folder that must be refused in one line with these words."""

    def run(folder, *words: str, **settings) -> None:
        with pytest.raises(UserError) as caught:
            load(folder, **settings)
        for word in words:
            assert word in str(caught.value)
        str(caught.value).encode()  # it can be printed

    return run


def test_a_link_to_nothing_is_an_unreadable_image(image_folder, load, refused):
    (image_folder / "train" / "red" / "00.png").unlink()
    (image_folder / "train" / "red" / "00.png").symlink_to("nowhere.png")
    (image_folder / "train" / "red" / "self.png").symlink_to("self.png")
    (image_folder / "readme").symlink_to("nowhere")
    refused(image_folder, "unreadable image", "red/00.png (no such file)", "red/self.png", "skip_unreadable")
    assert len(load(image_folder, skip_unreadable=True, val_fraction=0).train) == 35


def test_a_link_to_a_folder_that_it_lies_in(image_folder, refused):
    (image_folder / "train" / "red" / "again").symlink_to(image_folder / "train")
    refused(image_folder, "red/again is a link to a folder that it lies in", "remove it")


def test_a_pipe_among_images_is_unreadable(image_folder, load, refused):
    os.mkfifo(image_folder / "train" / "red" / "x.png")
    for settings in ({}, {"store": "stream", "num_workers": 0}):
        refused(image_folder, "unreadable image", "x.png (not a file)", **settings)
    assert len(load(image_folder, skip_unreadable=True, val_fraction=0).train) == 36


@pytest.mark.parametrize("other", ["valid", "validation"])
def test_two_validation_folders(image_folder, refused, other):
    for name in ("val", other):
        shutil.copytree(image_folder / "test", image_folder / name)
    refused(image_folder, f"has val and {other}", "keep one of them")


def test_names_that_are_not_utf8(image_folder, load, refused, capsys):
    name = b"caf\xe9"
    os.rename(image_folder / "train" / "red", os.fsencode(image_folder / "train") + b"/" + name)
    refused(image_folder, "class folder", "caf\N{REPLACEMENT CHARACTER}", "not UTF-8", "rename it")
    os.rename(image_folder, os.fsencode(image_folder) + name)
    refused(os.fsdecode(os.fsencode(image_folder) + name), "data.source", "not UTF-8", "rename it")
    other = image_folder.with_name("other")
    for i in range(8):
        write_image(other / "train" / "ab"[i % 2] / f"{i}.png", (9, 9, 9), seed=i)
    Path(os.fsdecode(os.fsencode(other / "train" / "a") + b"/" + name + b".png")).write_bytes(b"no image")
    assert len(load(other, skip_unreadable=True, val_fraction=0, test_fraction=0.25).train) == 6
    capsys.readouterr().out.encode()


def test_folders_of_equal_names_sizes_and_times_have_stores_of_their_own(tmp_path, load):
    pixels = []
    for name, seed in (("one", 0), ("other", 1)):
        for i in range(8):
            path = tmp_path / name / "data" / "train" / "ab"[i % 2] / f"{i}.bmp"
            write_image(path, (99, 99, 99), seed=10 * seed + i)
            os.utime(path, ns=(0, 0))
        pixels.append(np.array(load(tmp_path / name / "data", val_fraction=0).train.store.images))
    assert not np.array_equal(*pixels)


def test_a_copy_shares_the_store_and_files_are_read_once(image_folder, load, tmp_path, monkeypatch):
    load(image_folder)
    copy = shutil.copytree(image_folder, tmp_path / "copy" / image_folder.name, copy_function=shutil.copy)
    load(copy)
    assert len([path for path in (tmp_path / "cache" / "store").iterdir() if path.is_dir()]) == 1
    monkeypatch.setattr("kd.data.listing.file_sha256", None)
    load(copy)
    load(image_folder)


def test_a_shared_cache_that_may_only_be_read(image_folder, load, monkeypatch):
    expected = np.array(load(image_folder).train.store.images)

    def forbidden(*_arguments, **_named):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(FileLock, "acquire", forbidden)
    monkeypatch.setattr("kd.util.files.write_synced", forbidden)
    assert np.array_equal(load(image_folder).train.store.images, expected)
    (image_folder / "train" / "red" / "00.png").touch()  # another listing of the same contents
    assert np.array_equal(load(image_folder).train.store.images, expected)


def test_padding_that_leaves_nothing_of_an_image(image_folder, refused):
    refused(image_folder, "data.pad_crop 100000", "below the shorter side of the images (10)", pad_crop=100000)


# Parquet files


class Tables:
    """Writes a folder of Parquet files: `write("train-0", names, labels)`, names None for a plain column of labels."""

    def __init__(self, folder: Path):
        self.folder = folder
        folder.mkdir()

    def write(self, name: str, names: list | None, labels: list, column: str = "label") -> Path:
        import datasets

        datasets.disable_progress_bars()
        kind = datasets.Value("string" if isinstance(labels[0], str) else "int64")
        kind = kind if names is None else datasets.ClassLabel(names=names)
        shades = {"cat": 10, "dog": 200, None: 90}
        shown = [names[i] if names and i is not None and i < len(names) else None for i in labels]
        images = [Image.new("L", (6, 5), shades.get(name, 90)) for name in shown]
        features = datasets.Features({"image": datasets.Image(), column: kind})
        rows = datasets.Dataset.from_dict({"image": images, column: labels}, features=features)
        rows.to_parquet(self.folder / f"{name}.parquet")
        return self.folder


@pytest.fixture
def tables(tmp_path, monkeypatch) -> Tables:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "home")
    return Tables(tmp_path / "tables")


def test_class_names_in_another_order_in_each_file(tables, load):
    tables.write("train-00000-of-00002", ["cat", "dog"], [0, 0, 1])
    tables.write("train-00001-of-00002", ["dog", "cat"], [0, 1, 1, 0])
    data = load(tables.write("test-00000-of-00001", ["dog", "cat"], [1, 0]), val_fraction=0)
    assert data.classes == ["cat", "dog"]
    for split in (data.train, data.test):
        columns, labels, _ = split.on_host(np.arange(len(split)))
        assert np.array_equal(labels, columns["image"][:, 0, 0, 0] > 100)
    assert data.train.labels.tolist() == [0, 0, 1, 1, 0, 0, 1]


def test_a_class_name_that_train_does_not_have(tables, refused):
    tables.write("train-0", ["cat", "dog"], [0, 1])
    refused(tables.write("test-0", ["cat", "cow"], [0, 1]), "label in test-0.parquet", "'cow'", "cat, dog")


def test_a_label_that_is_missing(tables, refused):
    refused(tables.write("train-0", ["cat", "dog"], [0, 1, None]), "train row 2 has no label", "remove")


def test_a_label_beyond_the_classes(tables, refused):
    tables.write("train-0", ["cat", "dog"], [0, 1] * 4)
    import datasets

    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    rows = datasets.Dataset.from_dict({"image": [Image.new("L", (6, 5))], "label": [3]}, features=features)
    rows.to_parquet(tables.folder / "test-0.parquet")
    refused(tables.folder, "test has the label 3 and there are 2 classes, 0 to 1")


@pytest.mark.parametrize(
    ("labels", "classes"), [([7, 10, 9, 7], ["7", "9", "10"]), (["b", "a", "b", "c"], ["a", "b", "c"])]
)
def test_labels_that_are_plain_numbers_or_words(tables, load, refused, labels, classes):
    tables.write("train-0", None, labels)
    data = load(tables.write("test-0", None, labels[:2]), val_fraction=0)
    assert data.classes == classes
    assert [classes[i] for i in data.train.labels] == [str(value) for value in labels]
    assert [classes[i] for i in data.test.labels] == [str(value) for value in labels[:2]]
    other = [8] if labels[0] == 7 else ["d"]
    refused(tables.write("test-0", None, other), "unknown label of test", repr(str(other[0])), "classes of train")


def test_plain_labels_under_another_name_are_asked_for(tables, load, refused):
    folder = tables.write("train-0", None, [1, 2] * 5, column="kind")
    refused(folder, "no ClassLabel column; its columns: image, kind; set data.label_column")
    assert load(folder, label_column="kind", val_fraction=0).classes == ["1", "2"]


def test_files_of_two_validation_splits(tables, refused):
    for name in ("train-0", "val-0", "valid-0"):
        tables.write(name, ["cat", "dog"], [0, 1])
    refused(tables.folder, "has val and valid", "keep one")


def test_what_is_read_of_parquet_files_is_copied_to_the_cache_alone(tables, load, tmp_path):
    load(tables.write("train-0", ["cat", "dog"], [0, 1] * 5), val_fraction=0)
    assert not (tmp_path / "home").exists()


def test_a_report_on_parquet_files_reads_the_run_s_columns_and_writes_nothing_elsewhere(tables, load, tmp_path):
    from kd.measure.evaluation import Measured
    from kd.report import _file_name

    tables.write("train-0", ["cat", "dog"], [0, 1] * 5, column="kind")
    folder, here = tables.write("test-0", ["cat", "dog"], [1, 0], column="kind"), set(Path.cwd().iterdir())
    view = load(folder, label_column="kind", val_fraction=0).test
    row, cache = {"source": str(folder), "split": "test"}, str(tmp_path / "cache")
    settings = dataclasses.asdict(DataConfig(source=str(folder), label_column="kind", cache_dir=cache))
    measured = Measured("run", row, torch.zeros(2, 2), torch.zeros(2), view, settings)
    assert _file_name(measured, 1) == f"{folder} test row 1"
    assert set(Path.cwd().iterdir()) == here


def test_a_student_sees_images_that_are_not_square_as_it_does_without_a_larger_teacher(call, tmp_path):
    for split, place in itertools.product(("train", "test"), range(8)):
        pixels = np.random.default_rng(place).integers(0, 256, (40, 60, 3), dtype=np.uint8)
        file = tmp_path / "wide" / split / "ab"[place % 2] / f"{place}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(file)
    common = ("--data.source", tmp_path / "wide", "--data.val_fraction", 0, "--data.cache_dir", tmp_path / "cache")
    common = (*common, "--data.batch_size", 8, "--max_steps", 1, "--report_to", "none")
    seen = {}
    for name, resize, script in (
        ("teacher", 30, "train_teacher"),
        ("alone", 12, "train_teacher"),
        ("kd", 12, "distill"),
    ):
        network = (
            ("--student", "resnet8", "--teacher", tmp_path / "teacher") if name == "kd" else ("--model", "resnet8")
        )
        result = call(script, *network, *common, "--data.resize", resize, "--output_dir", tmp_path / name)
        assert result.status == 0, result.err
        images = torch.from_numpy(pixels).permute(2, 0, 1)[None]
        preprocess = load_classifier(tmp_path / name).preprocess
        if name == "alone":  # its images are stored as squares
            images = centre_crop(resize_shorter_side(images.float(), 12), 12).round().byte()
        seen[name] = preprocess(images)
    assert seen["teacher"].shape == (1, 3, 30, 45)
    assert "of images of 60x40 the network sees the middle square, 12x12" in result.out
    assert seen["kd"].shape == seen["alone"].shape == (1, 3, 12, 12)
    assert (seen["kd"] - seen["alone"]).abs().max() < 0.02  # a level of 255, which is what storing rounds


# What is kept of them


def zeroed(store: Path) -> None:
    np.load(store / "train-images.npy", mmap_mode="r+")[:20] = 0


def reversed_labels(store: Path) -> None:
    np.save(store / "train-labels.npy", np.load(store / "train-labels.npy")[::-1])


def short_labels(store: Path) -> None:
    np.save(store / "train-labels.npy", np.load(store / "train-labels.npy")[:-5])


def other_names(store: Path) -> None:
    text = (store / "meta.json").read_text()
    (store / "meta.json").write_text(text.replace("red", "green", 1).replace("green", "red", 1))


@pytest.mark.parametrize("damage", [zeroed, reversed_labels, short_labels, other_names])
def test_a_damaged_store_is_noticed_and_rebuilt(image_folder, load, tmp_path, capsys, damage):
    before = load(image_folder).train.store
    pixels, labels = np.array(before.images), before.labels
    (store,) = (path for path in (tmp_path / "cache" / "store").iterdir() if path.is_dir())
    damage(store)
    capsys.readouterr()
    after = load(image_folder)
    assert "is damaged (its files do not have their checksum) and is rebuilt" in capsys.readouterr().out
    assert np.array_equal(after.train.store.images, pixels)
    assert np.array_equal(after.train.store.labels, labels)
    assert after.classes == ["blue", "green", "red"]


def test_a_whole_store_is_read_once(image_folder, load, monkeypatch):
    load(image_folder)
    monkeypatch.setattr("kd.data.listing.file_sha256", None)
    load(image_folder)


def test_another_pillow_has_a_store_of_its_own(image_folder, load, monkeypatch):
    first = load(image_folder).train.store.identity()
    monkeypatch.setattr("PIL.__version__", "1.0")
    assert load(image_folder).train.store.identity() != first
