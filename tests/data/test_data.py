"""Data: sources, the store of decoded images, splits, the order of training, random views, preprocessing."""

from __future__ import annotations

import errno
import itertools
import json
import os
import shutil
from pathlib import Path

import children
import numpy as np
import pytest
import torch
from conftest import write_image
from PIL import Image

from kd import keyed
from kd.data import Data, Split, TrainBatches, Views, load_data
from kd.data.decode import UnreadableImage, open_image, read_image
from kd.data.split import balanced_order, carve
from kd.data.store import Store
from kd.data.views.augment import augment, gathered, shifts
from kd.models.preprocess import Preprocess, View, centre_crop, resize_shorter_side
from kd.run.config import DataConfig
from kd.util.errors import UserError

pytestmark = pytest.mark.first_tier(6)

CPU = torch.device("cpu")
CLASSES = ["blue", "green", "red"]


@pytest.fixture
def load(tmp_path):
    """Open a folder with a cache of this test's own: `load(folder, resize=8)`."""

    def run(source, **settings) -> Data:
        return load_data(DataConfig(source=str(source), cache_dir=str(tmp_path / "cache"), **settings))

    return run


def files_of(folder: Path, split: str) -> list[Path]:
    """The images of one split in the order of the store: by class, then by name."""
    return sorted((folder / split).rglob("*.png"))


def rgb(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB")).transpose(2, 0, 1)


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def smooth(height: int, width: int) -> np.ndarray:
    """A picture of slow waves and an edge, (H, W, 3): what a resize should keep."""
    y, x = np.mgrid[:height, :width] / max(height, width)
    waves = [np.sin(7 * x + 3 * y), np.cos(9 * y), np.sin(5 * x * y) * (x > 0.5)]
    return (127.5 + 120 * np.stack(waves, axis=-1)).astype(np.uint8)


# Folders of images


def test_train_and_test_folders(image_folder, load):
    data = load(image_folder)
    assert data.classes == CLASSES
    assert (len(data.train), len(data.val), len(data.test)) == (33, 3, 12)
    assert data.image_shape == (3, 10, 12)
    assert data.test.labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4


@pytest.mark.parametrize("name", ["val", "valid", "validation"])
def test_a_lone_val_folder_is_the_test_split(image_folder, load, capsys, name):
    (image_folder / "test").rename(image_folder / name)
    data = load(image_folder)
    assert f"its {name} split is the test split" in capsys.readouterr().out
    assert (len(data.train), len(data.val), len(data.test)) == (33, 3, 12)


def test_val_folder_beside_test_is_validation(image_folder, load):
    for i, name in enumerate(CLASSES):
        write_image(image_folder / "val" / name / "0.png", (99, 99, 99), seed=i)
    data = load(image_folder)
    assert (len(data.train), len(data.val), len(data.test)) == (36, 3, 12)
    images = data.val.read(np.arange(3), CPU)[0]["image"]
    assert np.array_equal(images, [rgb(path) for path in files_of(image_folder, "val")])


def test_without_a_test_folder_test_is_carved_from_train(image_folder, load, capsys):
    shutil.rmtree(image_folder / "test")
    data = load(image_folder, test_fraction=0.25)
    assert "has no test split; 9 of its 36 images are set aside as test" in capsys.readouterr().out
    assert np.bincount(data.test.labels).tolist() == [3, 3, 3]
    parts = [data.train.places, data.val.places, data.test.places]
    assert sorted(np.concatenate(parts)) == list(range(36))


def test_class_folders_without_split_folders(image_folder, load, capsys):
    data = load(image_folder / "train")
    assert "no split folders; all its images are read as train" in capsys.readouterr().out
    assert data.classes == CLASSES
    assert len(data.train) + len(data.val) + len(data.test) == 36


def test_hidden_files_and_other_files_are_no_images(image_folder, load):
    (image_folder / "train" / "red" / ".00.png").write_bytes(b"left by a file browser")
    (image_folder / "train" / "red" / "readme.txt").write_text("about")
    (image_folder / ".git" / "x").mkdir(parents=True)
    assert len(load(image_folder).train) == 33


def test_folders_below_a_class_belong_to_it(image_folder, load):
    write_image(image_folder / "train" / "red" / "more" / "deep" / "x.png", (200, 60, 60))
    data = load(image_folder, val_fraction=0)
    assert np.bincount(data.train.labels).tolist() == [12, 12, 13]


# Pixels


def test_pixels_are_exactly_those_of_pil(image_folder, load):
    data = load(image_folder, val_fraction=0)
    columns, labels, index = data.train.read(np.arange(36), CPU)
    images = columns["image"]
    paths = files_of(image_folder, "train")
    assert images.dtype == torch.uint8
    assert np.array_equal(images, [rgb(path) for path in paths])
    assert [CLASSES[i] for i in labels] == [path.parent.name for path in paths]
    assert index.tolist() == list(range(36))


def test_one_channel_is_the_luminance_of_pil(image_folder, load):
    data = load(image_folder, val_fraction=0, channels=1, mean=[0.5], std=[0.5])
    assert data.image_shape == (1, 10, 12)
    for image, path in zip(data.test.store.images, files_of(image_folder, "test"), strict=True):
        with Image.open(path) as opened:
            assert np.array_equal(image[0], opened.convert("L"))


def test_grey_images_become_three_equal_channels(image_folder, load):
    for path in [*files_of(image_folder, "train"), *files_of(image_folder, "test")]:
        with Image.open(path) as image:
            grey = image.convert("L")
        grey.save(path)
    data = load(image_folder)
    images = data.train.store.images
    assert data.image_shape == (3, 10, 12)
    assert np.array_equal(images[:, 0], images[:, 1])
    assert np.array_equal(images[:, 0], images[:, 2])


@pytest.mark.parametrize("mode", ["P", "RGBA", "LA", "1", "CMYK"])
def test_every_mode_becomes_rgb(tmp_path, mode):
    Image.fromarray(smooth(9, 7)).convert(mode).save(tmp_path / "a.tiff")
    pixels = read_image(tmp_path / "a.tiff", 3)
    assert pixels.shape == (3, 9, 7)
    assert pixels.std() > 10


def test_16_bit_grey_is_scaled_not_clipped(tmp_path):
    deep = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
    Image.fromarray(deep).save(tmp_path / "deep.png")
    expected = np.arange(256).reshape(16, 16)
    assert abs(read_image(tmp_path / "deep.png", 1)[0].astype(int) - expected).max() <= 1


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation_is_applied(tmp_path, orientation):
    upright = noise(6, 4, 3)
    # what each EXIF orientation does to the stored pixels, undone (EXIF 2.32, tag 0x0112)
    turn = {
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.transpose(1, 0, 2),
        6: lambda a: np.rot90(a, 1),
        7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
        8: lambda a: np.rot90(a, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(np.ascontiguousarray(turn(upright))).save(tmp_path / "a.png", exif=exif)
    assert np.array_equal(read_image(tmp_path / "a.png", 3), upright.transpose(2, 0, 1))


@pytest.mark.parametrize("content", [b"", b"no image", b"\x89PNG\r\n\x1a\n broken", b"GIF89a"])
def test_what_is_no_image_says_so_in_words(tmp_path, content):
    (tmp_path / "x.png").write_bytes(content)
    for image in (content, tmp_path / "x.png"):
        with pytest.raises(UnreadableImage) as caught:
            open_image(image)
        assert "BytesIO" not in str(caught.value)
        assert "''" not in str(caught.value)
        assert str(tmp_path) not in str(caught.value)


# Sizes


def test_several_sizes_need_resize_and_become_squares(image_folder, load, capsys):
    write_image(image_folder / "train" / "red" / "wide.png", (200, 60, 60), size=(20, 10))
    with pytest.raises(UserError, match=r"12x10 and 20x10; set data\.resize"):
        load(image_folder)
    data = load(image_folder, resize=8)
    assert "all are brought to 8x8" in capsys.readouterr().out
    assert data.image_shape == (3, 8, 8)
    assert data.test.store.images.shape == (12, 3, 8, 8)


def test_a_test_split_of_another_size_counts_as_several_sizes(image_folder, load):
    for i, path in enumerate(files_of(image_folder, "test")):
        write_image(path, (60, 60, 60), size=(14, 14), seed=i)
    with pytest.raises(UserError, match=r"images differ in size: .*; set data\.resize"):
        load(image_folder)
    data = load(image_folder, resize=10)
    assert data.train.store.images.shape[1:] == data.test.store.images.shape[1:] == (3, 10, 10)


def test_images_of_one_size_keep_it_where_resize_is_given(image_folder, load):
    assert load(image_folder, resize=8).image_shape == (3, 10, 12)


def test_much_larger_images_are_stored_at_the_size_that_is_needed(image_folder, load):
    assert load(image_folder, resize=4).image_shape == (3, 4, 4)


def test_what_is_in_the_cache_does_not_change_the_images(image_folder, load):
    load(image_folder)  # leaves a store at the images' own size
    assert load(image_folder, resize=4).image_shape == (3, 4, 4)
    assert load(image_folder, resize=8).image_shape == (3, 10, 12)
    assert load(image_folder).image_shape == (3, 10, 12)


# Parquet and the Hub


@pytest.fixture
def parquet(tmp_path, monkeypatch):
    """Write a folder of Parquet files: `parquet(image="img", fine_label=[...names])`; 8 train and 4 test images."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    datasets.disable_progress_bars()

    def write(image: str = "image", missing: int | None = None, **labels: list[str]) -> Path:
        folder = tmp_path / "parquet"
        folder.mkdir()
        kinds = {name: datasets.ClassLabel(names=names) for name, names in labels.items()}
        features = datasets.Features({image: datasets.Image(), **kinds})
        for split, count in (("train", 8), ("test", 4)):
            pictures = [Image.fromarray(noise(6, 5, 3, seed=100 * count + i)) for i in range(count)]
            if missing is not None:
                pictures[missing] = None
            columns = {name: [i % len(names) for i in range(count)] for name, names in labels.items()}
            rows = datasets.Dataset.from_dict({image: pictures, **columns}, features=features)
            rows.to_parquet(folder / f"{split}-00000-of-00001.parquet")
        return folder

    return write


@pytest.mark.parametrize("column", ["image", "img", "picture"])
def test_parquet_folder(parquet, load, column):
    data = load(parquet(image=column, label=["cat", "dog"]), val_fraction=0)
    assert data.classes == ["cat", "dog"]
    assert data.train.labels.tolist() == [0, 1] * 4
    expected = [noise(6, 5, 3, seed=800 + i).transpose(2, 0, 1) for i in range(8)]
    assert np.array_equal(data.train.read(np.arange(8), CPU)[0]["image"], expected)
    assert len(data.test) == 4


def test_parquet_with_two_label_columns(parquet, load):
    folder = parquet(fine_label=["oak", "elm", "cod", "eel"], coarse_label=["tree", "fish"])
    assert load(folder, val_fraction=0).classes == ["oak", "elm", "cod", "eel"]
    assert load(folder, val_fraction=0, label_column="coarse_label").classes == ["tree", "fish"]
    with pytest.raises(UserError, match=r"unknown data\.label_column 'fine'.*coarse_label"):
        load(folder, label_column="fine")


def test_parquet_with_several_unusual_label_columns_asks(parquet, load):
    with pytest.raises(UserError, match=r"several ClassLabel columns \(kind, colour\); set data\.label_column"):
        load(parquet(kind=["cat", "dog"], colour=["red", "blue"]))


def test_parquet_without_labels_lists_its_columns(parquet, load):
    with pytest.raises(UserError, match=r"no ClassLabel column; its columns: picture"):
        load(parquet(image="picture"))


def test_damaged_parquet_is_one_line(parquet, load):
    folder = parquet(label=["cat", "dog"])
    (folder / "test-00000-of-00001.parquet").write_bytes(b"PAR1 and nothing")
    with pytest.raises(UserError, match="cannot read its Parquet files"):
        load(folder)


def test_a_missing_image_in_parquet_is_named(parquet, load):
    folder = parquet(label=["cat", "dog"], missing=2)
    with pytest.raises(UserError, match=r"unreadable image: .*train row 2 .*--data\.skip_unreadable true"):
        load(folder)
    data = load(folder, skip_unreadable=True, val_fraction=0)
    assert (len(data.train), len(data.test)) == (7, 3)


def test_hub_without_network_is_one_line(monkeypatch):
    datasets = pytest.importorskip("datasets")

    def unreachable(name, **_):
        raise ConnectionError(f"Couldn't reach '{name}' on the Hub\n(offline)")

    monkeypatch.setattr(datasets, "load_dataset_builder", unreachable)
    with pytest.raises(UserError) as caught:
        load_data(DataConfig(source="hub:nobody/nothing"))
    line = str(caught.value)
    assert "\n" not in line
    for word in ("hub:nobody/nothing", "Couldn't reach", "check the name and the network", "data.source"):
        assert word in line


# The store


def test_second_open_decodes_nothing(image_folder, load, monkeypatch):
    first = load(image_folder)

    def never(*_, **__):
        raise AssertionError("decoded again")

    monkeypatch.setattr("kd.data.raw.read_image", never)
    second = load(image_folder)
    assert np.array_equal(first.train.store.images, second.train.store.images)
    assert np.array_equal(first.train.labels, second.train.labels)
    assert isinstance(second.train.store.images, np.memmap)


def stores(tmp_path: Path) -> list[Path]:
    return sorted(path for path in (tmp_path / "cache" / "store").iterdir() if path.is_dir())


def test_a_changed_file_is_read_again(image_folder, load, tmp_path):
    load(image_folder)
    before = stores(tmp_path)
    path = files_of(image_folder, "train")[0]
    write_image(path, (1, 2, 3), seed=77)
    os.utime(path, ns=(0, 0))  # a changed time alone is enough, even where the size is the same
    data = load(image_folder, val_fraction=0)
    assert np.array_equal(data.train.store.images[0], rgb(path))
    assert len(stores(tmp_path)) == len(before) + 1


def test_a_new_file_is_seen(image_folder, load):
    load(image_folder, val_fraction=0)
    write_image(image_folder / "train" / "red" / "new.png", (200, 60, 60))
    assert len(load(image_folder, val_fraction=0).train) == 37


def test_what_a_dead_builder_left_is_ignored_and_cleaned(image_folder, load, tmp_path):
    load(image_folder)
    (whole,) = stores(tmp_path)
    left = whole.with_name(f"{whole.name}.tmp-999999")
    whole.rename(left)  # as if it had died just before the rename
    (left / "meta.json").unlink()
    assert len(load(image_folder).train) == 33
    assert stores(tmp_path) == [whole]


@pytest.mark.parametrize("name", ["meta.json", "train-images.npy", "train-labels.npy"])
def test_a_damaged_store_is_rebuilt(image_folder, load, tmp_path, name):
    expected = np.array(load(image_folder).train.store.images)
    (store,) = stores(tmp_path)
    (store / name).write_bytes((store / name).read_bytes()[:40])  # as after a power cut
    assert np.array_equal(load(image_folder).train.store.images, expected)


def test_a_full_disk_is_an_error_before_anything_is_mapped(image_folder, load, tmp_path, monkeypatch):
    """Writing through a memory map to a full disk kills the process: the space must be reserved first."""

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full, raising=False)
    with pytest.raises(
        UserError,
        match=r"no space for the decoded images in .*; free some, set data\.cache_dir .* data\.store to stream",
    ):
        load(image_folder)
    assert stores(tmp_path) == []
    monkeypatch.delattr(os, "posix_fallocate")  # as on systems that do not have it
    assert len(load(image_folder).train) == 33


def _open_counting(folder: str, cache: str, log: str, ready) -> None:
    """Child process: open the data when both are ready, and note a build."""
    from kd.data import store

    build = store.build

    def counting(*arguments):
        with open(log, "a") as file:
            file.write("built\n")
        build(*arguments)

    store.build = counting
    ready.wait()
    data = load_data(DataConfig(source=folder, cache_dir=cache, val_fraction=0))
    with open(log, "a") as file:
        file.write(f"{len(data.train)} {int(data.train.store.images.sum())}\n")


@pytest.mark.slow
def test_two_processes_build_one_store(image_folder, tmp_path):
    context = children.CONTEXT
    ready, log = context.Barrier(2), tmp_path / "log"
    arguments = (str(image_folder), str(tmp_path / "cache"), str(log), ready)
    processes = [context.Process(target=_open_counting, args=arguments) for _ in range(2)]
    for process in processes:
        process.start()
    assert children.finish(*processes) == [0, 0]
    lines = log.read_text().splitlines()
    expected = f"36 {sum(int(rgb(path).sum()) for path in files_of(image_folder, 'train'))}"
    assert sorted(lines) == sorted(["built", expected, expected])


def test_unreadable_images_are_left_out_if_asked_and_said_each_time(image_folder, load, capsys):
    bad = files_of(image_folder, "train")[12]
    bad.write_bytes(bad.read_bytes()[:60])
    with pytest.raises(UserError, match=r"unreadable image: .*00\.png.*--data\.skip_unreadable true"):
        load(image_folder)
    for _ in range(2):  # built, then from the store
        data = load(image_folder, val_fraction=0, skip_unreadable=True)
        said = capsys.readouterr().out
        assert f"1 unreadable images of train are left out: {bad}" in said
        assert np.bincount(data.train.labels).tolist() == [12, 11, 12]
    kept = [rgb(path) for path in files_of(image_folder, "train") if path != bad]
    assert np.array_equal(data.train.store.images, kept)


def test_the_store_states_its_classes(image_folder, load, tmp_path):
    load(image_folder)
    (store,) = stores(tmp_path)
    assert json.loads((store / "meta.json").read_text())["classes"] == CLASSES


# Splits


def random_labels(seed: int) -> np.ndarray:
    """Labels of 1 to 6 classes, some rare and some perhaps without any image."""
    rng = np.random.default_rng(seed)
    shares = rng.dirichlet(np.full(rng.integers(1, 7), 0.5))
    return rng.choice(len(shares), size=rng.integers(1, 80), p=shares)


@pytest.mark.parametrize("seed", range(20))
def test_every_prefix_of_balanced_order_is_as_balanced_as_it_can_be(seed):
    labels = random_labels(seed)
    order = balanced_order(labels, seed)
    assert sorted(order) == list(range(len(labels)))
    sizes = np.bincount(labels)
    for length in range(len(labels) + 1):
        counts = np.bincount(labels[order[:length]], minlength=len(sizes))
        # a class may be behind the largest by more than one image only if it has no more images
        behind = counts < counts.max() - 1
        assert (counts[behind] == sizes[behind]).all()


def test_balanced_order_and_carve_are_frozen():
    """A change here moves the splits of every run ever trained."""
    labels = np.array([0, 0, 0, 0, 1, 1, 2, 2, 2, 2])
    assert balanced_order(labels, 0).tolist() == [9, 0, 4, 3, 6, 5, 7, 1, 8, 2]
    rest, carved = carve(np.repeat([0, 1], 10), 0.2, 0)
    assert carved.tolist() == [2, 3, 16, 17]
    assert rest.tolist() == [0, 1, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 18, 19]


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("fraction", [0.1, 0.2, 0.5])
def test_carve_is_stratified_disjoint_and_whole(seed, fraction):
    labels = random_labels(seed)
    rest, carved = carve(labels, fraction, seed)
    assert sorted(np.concatenate([rest, carved])) == list(range(len(labels)))
    assert np.array_equal(rest, np.sort(rest))
    sizes, taken = (np.bincount(part, minlength=6) for part in (labels, labels[carved]))
    assert taken.tolist() == [round(fraction * size) for size in sizes.tolist()]


def digits(**settings) -> Data:
    return load_data(DataConfig(source="digits", **settings))


def test_splits_are_disjoint_and_cover_everything():
    data = digits()
    parts = [data.train.places, data.val.places, data.test.places]
    assert sorted(np.concatenate(parts)) == list(range(1797))
    for part, share in ((data.test, 0.2), (data.val, 0.08)):
        assert abs(np.bincount(part.labels) / np.bincount(data.train.store.labels) - share).max() < 0.005


def test_splits_are_a_function_of_split_seed():
    first, again, other = digits(), digits(), digits(split_seed=1)
    for name in ("train", "val", "test"):
        mine = getattr(first, name).places
        assert np.array_equal(mine, getattr(again, name).places)
        assert not np.array_equal(mine, getattr(other, name).places)


def test_num_train_is_a_balanced_part_of_train_and_leaves_the_others_alone():
    whole, part = digits(), digits(num_train=205)
    assert sorted(np.bincount(part.train.labels)) == [20] * 5 + [21] * 5
    assert set(part.train.places) < set(whole.train.places)
    assert np.array_equal(part.val.places, whole.val.places)
    assert np.array_equal(part.test.places, whole.test.places)


def test_a_smaller_num_train_is_a_part_of_a_larger_one():
    assert set(digits(num_train=50).train.places) < set(digits(num_train=120).train.places)


def test_num_labels_are_those_of_as_large_a_part_and_leaves_the_other_splits_alone():
    whole, few, both = digits(), digits(num_labels=50), digits(num_train=120, num_labels=50)
    for data in (few, both):
        known = data.train.labelled()
        assert np.array_equal(known.places, digits(num_train=50).train.places)
        assert np.array_equal(known.labels, whole.train.store.labels[known.places])
        assert (data.train.labels < 0).sum() == len(data.train) - 50
        read = data.train.read(np.arange(len(data.train)), CPU)[1]
        assert np.array_equal(read, data.train.labels)
        for name in ("val", "test"):
            assert np.array_equal(getattr(data, name).labels, getattr(whole, name).labels)
    assert np.array_equal(few.train.places, whole.train.places)
    assert np.array_equal(both.train.places, digits(num_train=120).train.places)


@pytest.mark.parametrize("count", [9, 0x7FFFFFFF])
def test_num_train_out_of_range_states_the_range(count):
    with pytest.raises(UserError, match=rf"num_train {count} must be from 10 .* to 1295"):
        digits(num_train=count)


def test_no_validation():
    assert digits(val_fraction=0).val is None


# The order of training


def make_split(count: int, channels: int = 3, side: int = 6) -> Split:
    """`count` noise images in a store of three more, so that positions and places differ."""
    store = Store(noise(count + 3, channels, side, side), np.arange(count + 3) % 4)
    return Split(store, np.arange(3, count + 3))


def batches(split: Split, batch_size: int = 12, seed: int = 5, rank: int = 0, world: int = 1, view: bool = True):
    return TrainBatches(split, batch_size, seed, rank, world, Views(flip=view, pad_crop=2 if view else 0))


@pytest.mark.parametrize(("count", "batch_size"), [(26, 12), (24, 12), (5, 12), (7, 1)])
def test_each_epoch_sees_each_image_once_in_another_order(count, batch_size):
    source = batches(make_split(count), batch_size)
    orders = []
    for epoch in range(3):
        steps = range(epoch * source.steps_per_epoch, (epoch + 1) * source.steps_per_epoch)
        orders.append(np.concatenate([source.positions(step) for step in steps]))
        assert sorted(orders[-1]) == list(range(count))
    assert not any(np.array_equal(a, b) for a, b in itertools.combinations(orders, 2))


def tensors(batch) -> dict[str, torch.Tensor]:
    """What a batch holds of each of its images, by name."""
    return {**batch.inputs, "labels": batch.labels, "index": batch.index, "keys": batch.keys}


def equal(a, b) -> bool:
    one, other = tensors(a), tensors(b)
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_a_batch_is_a_function_of_seed_and_step_alone():
    split = make_split(26)
    source = batches(split)
    first = [source.read(step, CPU)[0] for step in range(9)]
    for step in (7, 2, 8, 0, 5, 2):  # any order of asking, as after a restart
        assert equal(first[step], source.read(step, CPU)[0])
        assert equal(first[step], batches(split).read(step, CPU)[0])
    assert not equal(first[0], batches(split, seed=6).read(0, CPU)[0])


def test_what_a_batch_holds():
    split = make_split(26)
    batch, weight = batches(split, view=False).read(4, CPU)  # the second step of the second epoch
    order = keyed.permutation(keyed.key(5, keyed.Purpose.ORDER, 1), 26).numpy()[12:24]
    assert weight == 1
    assert batch.index.tolist() == (order + 3).tolist()
    assert np.array_equal(batch.inputs["image"], split.store.images[order + 3])
    assert np.array_equal(batch.labels, split.store.labels[order + 3])
    assert torch.equal(batch.keys, keyed.keys(keyed.key(5, keyed.Purpose.DROPOUT, 1), batch.index))


def test_views_are_keyed_by_epoch_and_image():
    split = make_split(26)
    batch, _ = batches(split).read(4, CPU)
    keys = keyed.keys(keyed.key(5, keyed.Purpose.VIEW, 1), batch.index)
    plain = torch.from_numpy(split.store.images[batch.index.numpy()])
    assert torch.equal(batch.inputs["image"], augment(plain, keys, True, 2))


@pytest.mark.parametrize("world", [1, 2, 3, 4])
@pytest.mark.parametrize("step", [0, 1, 2, 5])  # 2 and 5 are last batches of 2 images
def test_parts_concatenate_to_the_same_global_batch(world, step):
    split = make_split(26)
    whole, _ = batches(split).read(step, CPU)
    parts = [batches(split, rank=rank, world=world).read(step, CPU) for rank in range(world)]
    seen = [part for part, weight in parts if weight]
    for name, expected in tensors(whole).items():
        assert torch.equal(torch.cat([tensors(part)[name] for part in seen]), expected)
    for part, weight in parts:
        assert len(part.labels) >= 1
        if not weight:
            assert part.index.tolist() == whole.index[:1].tolist()


@pytest.mark.parametrize("world", [1, 2, 3, 4])
@pytest.mark.parametrize("count", [12, 14, 17, 19, 23])
def test_weights_make_the_mean_over_processes_the_global_mean(world, count):
    split = make_split(count)
    values = np.random.default_rng(0).normal(size=count + 3)
    for step in range(4):
        parts = [batches(split, rank=rank, world=world).read(step, CPU) for rank in range(world)]
        mean = sum(values[part.index].mean() * weight for part, weight in parts) / world
        assert mean == pytest.approx(values[batches(split).positions(step) + 3].mean(), rel=1e-12, abs=1e-12)
        assert sum(weight for _, weight in parts) == pytest.approx(world)


@pytest.mark.parametrize("accumulate", [2, 3, 5, 12])
@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("step", [0, 2])  # the second is a last batch of 2 images
def test_micro_batches_are_the_same_global_batch(world, step, accumulate):
    """Of each process its own part, in order, cut into so many; together they weigh as much as the whole."""
    split = make_split(26)
    values, seen, total = np.random.default_rng(0).normal(size=29), 0, 0.0
    whole = batches(split).positions(step) + 3
    for rank in range(world):
        cut = TrainBatches(split, 12, 5, rank, world, Views(True, 2), accumulate)
        part, weight = batches(split, rank=rank, world=world).read(step, CPU)
        micro = [cut.read(step, CPU, number) for number in range(cut.num_micro(step))]
        assert len(micro) <= accumulate
        assert all(len(each.labels) for each, _ in micro)
        kept = [each for each, share in micro if share]
        if rank == 0:
            assert len(kept) == len(micro)  # its running statistics are those that stay
        if weight:
            for name, expected in tensors(part).items():
                assert torch.equal(torch.cat([tensors(each)[name] for each in kept]), expected)
            seen += sum(len(each.labels) for each in kept)
        total += sum(values[each.index].mean() * share for each, share in micro) / world
        assert all(each.whole == (len(micro) == 1) for each, _ in micro)
    assert seen == len(whole)
    assert total == pytest.approx(values[whole].mean(), rel=1e-12)


# Keyed randomness


def test_keys_are_frozen():
    """A change here changes every run: order, views, dropout and splits."""
    assert keyed.key(0) == -2152535657050944081
    assert keyed.key(1, 2, 3) == 2869315087210772132
    assert keyed.keys(keyed.key(1, 2), torch.arange(3)).tolist() == [
        5803727657181717140,
        2726225660025633217,
        -3220985938101574031,
    ]
    draws = keyed.uniform(keyed.keys(keyed.key(0), torch.arange(3)))
    assert draws.tolist() == [0.6524484753608704, 0.7012121081352234, 0.38712412118911743]
    assert keyed.permutation(keyed.key(0), 10).tolist() == [9, 0, 3, 1, 6, 4, 5, 7, 8, 2]


def test_no_two_purposes_share_draws():
    """The three that share a number end their keys before an epoch would follow."""
    shared = {name for name, purpose in keyed.Purpose.__members__.items() if name != purpose.name}
    assert shared == {"FIRST_WEIGHTS", "SPLIT_ORDER", "CARVED"}
    keys = keyed.keys(keyed.key(0, keyed.Purpose.CORRUPTION), torch.arange(100))
    others = [keyed.keys(keyed.key(0, number), torch.arange(100)) for number in range(6)]
    assert not torch.isin(keys, torch.stack(others)).any()


@pytest.mark.parametrize("base", [(0,), (1, 2), (2**40, 7, 123456789)])
def test_a_key_of_integers_and_of_a_tensor_are_the_same(base):
    index = [0, 1, 2, 1000, 2**31, 2**62]
    expected = [keyed.key(*base, i) for i in index]
    assert keyed.keys(keyed.key(*base), torch.tensor(index)).tolist() == expected


def test_uniform_is_uniform_on_the_half_open_interval():
    draws = keyed.uniform(keyed.keys(keyed.key(3), torch.arange(200_000)))
    assert draws.dtype == torch.float32
    assert draws.min() >= 0
    assert draws.max() < 1
    assert draws.mean().item() == pytest.approx(0.5, abs=0.005)
    counts = torch.histc(draws, 20, 0, 1)
    assert (abs(counts / 10_000 - 1) < 0.06).all()


@pytest.mark.parametrize("extreme", [-1, 0, 2**63 - 1, -(2**63)])
def test_uniform_of_extreme_keys(extreme):
    assert 0 <= keyed.uniform(torch.tensor([extreme])).item() < 1


@pytest.mark.parametrize("length", [0, 1, 2, 10, 1000])
def test_permutation_is_one(length):
    assert sorted(keyed.permutation(keyed.key(4), length).tolist()) == list(range(length))


def test_permutations_of_neighbouring_seeds_are_unrelated():
    first, second = (keyed.permutation(keyed.key(seed), 2000).double() for seed in (0, 1))
    assert abs(torch.corrcoef(torch.stack([first, second]))[0, 1]) < 0.1


# Random views


def augment_slowly(images: np.ndarray, keys: list[int], flip: bool, pad: int) -> np.ndarray:
    """The reference: one image after another, crop of the padded image, then flip."""
    views = []
    for image, key in zip(images, keys, strict=True):
        draws = keyed.uniform(keyed.keys(key, torch.arange(3))).tolist()
        height, width = image.shape[1:]
        padded = np.pad(image, ((0, 0), (pad, pad), (pad, pad)))
        top, left = (int(draw * (2 * pad + 1)) if pad else 0 for draw in draws[1:])
        view = padded[:, top : top + height, left : left + width]
        views.append(view[:, :, ::-1] if flip and draws[0] < 0.5 else view)
    return np.stack(views)


@pytest.mark.parametrize(("flip", "pad"), [(True, 0), (False, 2), (True, 2), (True, 4), (False, 0)])
@pytest.mark.parametrize("shape", [(3, 7, 5), (1, 4, 9)])
def test_augment_equals_a_loop_over_images(flip, pad, shape):
    images = noise(40, *shape)
    keys = keyed.keys(keyed.key(9), torch.arange(40))
    views = augment(torch.from_numpy(images), keys, flip, pad)
    assert views.dtype == torch.uint8
    assert np.array_equal(views, augment_slowly(images, keys.tolist(), flip, pad))
    if flip or pad:  # what a GPU does
        drawn = shifts(keys, flip, pad)
        assert torch.equal(gathered(torch.from_numpy(images), drawn, pad), views)


def test_a_view_does_not_depend_on_the_other_images_of_the_batch():
    images = torch.from_numpy(noise(20, 3, 6, 6))
    keys = keyed.keys(keyed.key(9), torch.arange(20))
    whole = augment(images, keys, True, 2)
    some = torch.tensor([13, 2, 19, 2])
    assert torch.equal(augment(images[some], keys[some], True, 2), whole[some])


def test_half_of_the_views_are_flipped_and_all_shifts_occur():
    images = torch.zeros(4000, 1, 3, 3, dtype=torch.uint8)
    images[:, 0, 1, 1] = 255  # a point in the middle shows the shift, one beside it the flip
    images[:, 0, 1, 2] = 100
    keys = keyed.keys(keyed.key(2), torch.arange(4000))
    flipped = augment(images, keys, True, 0)[:, 0, 1, 0] == 100
    assert flipped.float().mean().item() == pytest.approx(0.5, abs=0.03)
    places = (augment(images, keys, False, 1) == 255).flatten(1).float().argmax(1)
    assert (abs(torch.bincount(places, minlength=9) / 4000 - 1 / 9) < 0.02).all()


# Preprocessing


@pytest.mark.parametrize("size", [(40, 40), (40, 30), (30, 47), (9, 13)])
@pytest.mark.parametrize("side", [8, 17, 28, 64])
def test_resize_is_that_of_pil(size, side):
    picture = smooth(*size)
    short = min(size)
    height, width = side * size[0] // short, side * size[1] // short
    expected = np.asarray(Image.fromarray(picture).resize((width, height), Image.Resampling.BILINEAR))
    resized = resize_shorter_side(torch.from_numpy(picture).permute(2, 0, 1)[None].float(), side)
    assert resized.shape == (1, 3, height, width)
    difference = abs(resized[0].permute(1, 2, 0).numpy() - expected)
    assert difference.mean() <= 1
    assert difference.max() <= 2  # pil rounds after each of its two passes


def test_resize_to_its_own_size_changes_nothing():
    images = torch.from_numpy(noise(2, 3, 8, 12)).float()
    assert torch.equal(resize_shorter_side(images, 8), images)


@pytest.mark.parametrize("size", [(8, 8), (9, 8), (8, 11), (13, 10)])
@pytest.mark.parametrize("side", [3, 4, 7, 8])
def test_centre_crop_is_that_of_torchvision(size, side):
    from torchvision.transforms.functional import center_crop

    images = torch.from_numpy(noise(2, 3, *size))
    assert torch.equal(centre_crop(images, side), center_crop(images, [side, side]))


def test_a_crop_larger_than_the_image_names_the_remedy():
    with pytest.raises(ValueError, match=r"crop 9 is larger than the image, 8x8; set data\.resize to 9"):
        centre_crop(torch.zeros(1, 3, 8, 8), 9)


def test_normalise_is_the_plain_formula():
    view = View(mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.1))
    images = noise(5, 3, 4, 4)
    mean, std = (np.array(value)[:, None, None] for value in (view.mean, view.std))
    expected = (images.astype(np.float64) / 255 - mean) / std
    prepared = Preprocess(view)(torch.from_numpy(images))
    assert prepared.dtype == torch.float32
    assert np.allclose(prepared, expected, rtol=0, atol=2e-6)


def test_a_grey_image_becomes_three_channels():
    grey = torch.from_numpy(noise(2, 1, 5, 5))
    preprocess = Preprocess(View(mean=(0.1, 0.2, 0.3), std=(0.5, 0.5, 0.5)))
    prepared = preprocess(grey)
    assert prepared.shape == (2, 3, 5, 5)
    assert torch.equal(prepared, preprocess(grey.expand(-1, 3, -1, -1)))


def test_colour_becomes_the_luminance_of_pil():
    picture = noise(6, 7, 3)
    prepared = Preprocess(View(channels=1, mean=(0.0,), std=(1.0,)))(torch.from_numpy(picture).permute(2, 0, 1)[None])
    assert prepared.shape == (1, 1, 6, 7)
    expected = np.asarray(Image.fromarray(picture).convert("L"))
    assert abs(prepared[0, 0].numpy() * 255 - expected).max() <= 1


def test_resize_then_crop_then_normalise():
    view = View(resize=8, crop=6, mean=(0.5,) * 3, std=(0.5,) * 3)
    images = torch.from_numpy(noise(2, 3, 16, 20))
    expected = centre_crop(resize_shorter_side(images.float(), 8), 6) / 127.5 - 1
    assert torch.allclose(Preprocess(view)(images), expected, atol=1e-5)


def test_a_view_survives_json():
    view = View(resize=8, crop=6, channels=1, mean=(0.1,), std=(0.2,), source_size=(10, 12))
    assert View(**json.loads(json.dumps(view.to_dict()))) == view
