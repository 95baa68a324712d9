"""The named data sets, from small files in the formats of the downloads; one download when several start together."""

from __future__ import annotations

import hashlib
import pickle
import struct
import time
from pathlib import Path

import children
import numpy as np
import pytest
import torchvision.datasets as sets
from conftest import SHARED

from kd.data import load_data
from kd.data.sources import find_source
from kd.run.config import DataConfig
from kd.util.errors import UserError


def pixels(*shape) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def md5(path: Path) -> str:
    return hashlib.md5(path.read_bytes()).hexdigest()


def load(source, folder, **settings):
    return load_data(DataConfig(source=source, download_dir=str(folder), val_fraction=0.0, **settings))


def write_mnist(raw: Path, count: int) -> list[Path]:
    """Write MNIST's four files into a new folder, with the images `pixels(count, 28, 28)` in both splits."""
    raw.mkdir(parents=True)
    images, labels, files = pixels(count, 28, 28), np.arange(count, dtype=np.uint8) % 10, []
    for split in ("train", "t10k"):
        files += [raw / f"{split}-images-idx3-ubyte", raw / f"{split}-labels-idx1-ubyte"]
        files[-2].write_bytes(struct.pack(">IIII", 2051, count, 28, 28) + images.tobytes())
        files[-1].write_bytes(struct.pack(">II", 2049, count) + labels.tobytes())
    return files


def test_mnist(tmp_path):
    write_mnist(tmp_path / "MNIST" / "raw", 30)
    images = pixels(30, 28, 28)
    data = load("mnist", tmp_path)
    assert data.classes == [str(digit) for digit in range(10)]
    assert data.image_shape == (1, 28, 28)
    assert np.array_equal(data.train.store.images[:, 0], images)
    assert np.array_equal(data.test.labels, np.arange(30) % 10)


@pytest.mark.parametrize("source", ["cifar10", "cifar100"])
def test_cifar(tmp_path, monkeypatch, source):
    kind = {"cifar10": sets.CIFAR10, "cifar100": sets.CIFAR100}[source]
    folder = tmp_path / kind.base_folder
    folder.mkdir()
    images = pixels(20, 3, 32, 32)
    key, names_key = ("labels", "label_names") if source == "cifar10" else ("fine_labels", "fine_label_names")
    lists = {}
    for attribute, files in (("train_list", kind.train_list), ("test_list", kind.test_list)):
        lists[attribute] = []
        for file, _ in files:
            content = {"data": images.reshape(20, -1), key: [i % 10 for i in range(20)]}
            (folder / file).write_bytes(pickle.dumps(content))
            lists[attribute].append([file, md5(folder / file)])
        monkeypatch.setattr(kind, attribute, lists[attribute])
    meta = folder / kind.meta["filename"]
    meta.write_bytes(pickle.dumps({names_key: [f"name {i}" for i in range(10)]}))
    monkeypatch.setattr(kind, "meta", {**kind.meta, "md5": md5(meta)})
    data = load(source, tmp_path)
    assert data.classes == [f"name {i}" for i in range(10)]
    assert len(data.train) == 20 * len(kind.train_list)
    assert np.array_equal(data.test.store.images, images)


def test_stl10(tmp_path, monkeypatch):
    folder = tmp_path / sets.STL10.base_folder
    folder.mkdir()
    images = pixels(20, 3, 96, 96)
    for split in ("train", "test"):
        # the files hold columns before rows, and labels from 1
        (folder / f"{split}_X.bin").write_bytes(images.transpose(0, 1, 3, 2).tobytes())
        (folder / f"{split}_y.bin").write_bytes((np.arange(20, dtype=np.uint8) % 10 + 1).tobytes())
    (folder / "class_names.txt").write_text("\n".join(f"name {i}" for i in range(10)) + "\n")
    (folder / "fold_indices.txt").write_text("0 1\n")
    (folder / "unlabeled_X.bin").write_bytes(b"")
    for attribute in ("train_list", "test_list"):
        listed = [[file, md5(folder / file)] for file, _ in getattr(sets.STL10, attribute)]
        monkeypatch.setattr(sets.STL10, attribute, listed)
    data = load("stl10", tmp_path, resize=256, crop=224)
    assert data.classes == [f"name {i}" for i in range(10)]
    assert np.array_equal(data.train.store.images, images)
    assert data.test.labels.tolist() == [i % 10 for i in range(20)]


class SlowDownload:
    """Stands for torchvision's CIFAR10: notes each download, which takes a while."""

    filename, url = "archive", "address"
    classes = ("a", "b")

    def __init__(self, root, train, download):
        if not (Path(root) / "whole").exists():
            if not download:
                raise RuntimeError("not found")
            with (Path(root) / "downloads").open("a") as file:
                file.write("x")
            time.sleep(0.5)
            (Path(root) / "whole").touch()
        self.data, self.targets = pixels(6, 8, 8, 3), [0, 1] * 3


def _download(folder):
    sets.CIFAR10 = SlowDownload
    find_source("cifar10", Path(folder) / "cache", Path(folder)).open()


def test_what_cannot_be_downloaded_after_half_a_download_is_named(tmp_path, monkeypatch):
    class Unreachable(SlowDownload):
        def __init__(self, root, train, download):
            raise RuntimeError("no network")

    monkeypatch.setattr(sets, "CIFAR10", Unreachable)
    left = tmp_path / "cifar-10-batches-py" / "data_batch_1"
    left.parent.mkdir()
    left.touch()
    (tmp_path / ".cifar10.unfinished").touch()
    with pytest.raises(UserError, match=rf"\(no network\); get archive from address, put it in {tmp_path} and run"):
        load("cifar10", tmp_path)
    assert not left.exists()


@pytest.mark.slow
def test_several_processes_download_once(tmp_path):
    processes = [children.CONTEXT.Process(target=_download, args=(tmp_path / "d",)) for _ in range(3)]
    for process in processes:
        process.start()
    assert children.finish(*processes) == [0, 0, 0]
    assert (tmp_path / "d" / "downloads").read_text() == "x"


@pytest.mark.slow
@pytest.mark.shared
@pytest.mark.skipif(not (SHARED / "data/imagenette96").is_dir(), reason="needs real images in ../shared/data")
def test_a_real_parquet_folder():
    data = load_data(DataConfig(source=str(SHARED / "data/imagenette96"), num_train=2000))
    assert data.classes[:2] == ["tench", "English springer"]
    assert data.image_shape == (3, 96, 96)
    assert (len(data.train), len(data.test)) == (2000, 3925)
    assert set(np.bincount(data.train.labels)) == {200}
    assert 90 < data.train.store.images[data.train.places[:50]].mean() < 150
