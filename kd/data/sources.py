"""Where images come from: named sets, the Hub, folders. A source lists its splits; the store decodes them once."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock

from kd.data.decode import UnreadableImage, read_image
from kd.util.errors import UserError, say, unknown

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp", ".gif")
TEST_NAMES, VAL_NAMES = ("test",), ("val", "valid", "validation")
# the named sets, and their files below the download folder
NAMED = {
    "digits": "",
    "mnist": "MNIST/raw/*-ubyte",
    "cifar10": "cifar-10-batches-py/*",
    "cifar100": "cifar-100-python/*",
    "stl10": "stl10_binary/*",
}


@dataclass
class RawSplit:
    """Images of one split before they are in the store; other processes can be given it.

    images: a uint8 array (N, C, H, W), or N encoded images, paths or bytes.
    labels: int64 (N,).
    title: what an image's number follows in a message, where it has no path.
    """

    images: np.ndarray | Sequence
    labels: np.ndarray
    title: str = ""

    @property
    def decoded(self) -> bool:
        """Whether the images are pixels already."""
        return isinstance(self.images, np.ndarray)

    def name(self, place: int) -> str:
        """How an image is called in a message."""
        return f"{self.title} {place}" if self.title else self.images[place]

    def read(
        self, place: int, channels: int, size: tuple[int, int] | None = None, fit: bool = True
    ) -> np.ndarray | UnreadableImage:
        """The pixels of one image as `read_image` gives them, or why it cannot be read."""
        try:
            return read_image(self.images[place], channels, size, fit)
        except UnreadableImage as error:
            return error
        except FileNotFoundError:  # a Parquet row may name a file instead of holding it
            return UnreadableImage("no such file")


@dataclass
class Source:
    """A set of images: its splits are read only when they are asked for.

    open: gives the class names and the raw splits, by names among train, val, test; may be slow.
    fingerprint: changes when the images may have changed; None when they are not on this disk yet.
    notes: what a user should know of how the splits were found; filled by `open`.
    decoded: whether its images are arrays, which keep their size and number of channels.
    """

    name: str
    open: Callable[[], tuple[list[str], dict[str, RawSplit]]]
    fingerprint: str | None = None
    notes: list[str] = field(default_factory=list)
    decoded: bool = False


def find_source(
    source: str, download_dir: Path, image_column: str | None, label_column: str | None, download: bool = True
) -> Source:
    """The source of that name, Hub name or folder.

    Raises:
        UserError: no such source; the known names and forms are listed.
    """
    notes: list[str] = []
    if source == "digits":
        return Source(source, _open_digits, _digest([version("scikit-learn")]), decoded=True)
    if source in NAMED:
        opener = partial(_open_torchvision, source, download_dir, download)
        return Source(source, opener, _downloaded(source, download_dir), decoded=True)
    if source.startswith("hub:"):
        dataset = _load_hub(source[4:])
        prints = [f"{split}:{part._fingerprint}" for split, part in sorted(dataset.items())]
        return Source(
            source,
            lambda: _open_dataset(dataset, source, image_column, label_column, notes),
            _digest([source, *prints]),
            notes,
        )
    folder = Path(source).expanduser()
    if not folder.exists():
        raise unknown("data.source", source, NAMED, "or hub:owner/name, or a folder (there is none of this name)")
    if not folder.is_dir():
        raise UserError(f"data.source {source!r} is a file; give the folder that holds the images")
    files = sorted(_walk(folder))
    if not files:
        raise UserError(f"data.source {source!r} is an empty folder; it should hold train/CLASS/IMAGE or Parquet files")
    listing = [f"{os.sep.join(parts)}:{stat.st_size}:{stat.st_mtime_ns}" for parts, stat in files]
    columns = [f"columns:{image_column}:{label_column}"]
    if any(parts[-1].endswith(".parquet") for parts, _ in files):
        opener = partial(_open_parquet, folder, source, image_column, label_column, notes)
    else:
        images = [parts for parts, _ in files if parts[-1].lower().endswith(IMAGE_SUFFIXES)]
        opener = partial(_open_folder, folder, images, notes)
    return Source(folder.resolve().name, opener, _digest(columns + listing), notes)


def _digest(parts: list[str]) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:20]


def _walk(folder: Path, above: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], os.stat_result]]:
    """The parts of each file's path below a folder, and its state; a Path for each of a million would take half a
    minute."""
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                yield from _walk(Path(entry.path), (*above, entry.name))
            else:
                yield (*above, entry.name), entry.stat()


def _downloaded(source: str, root: Path) -> str | None:
    """The fingerprint of a named set's files; None if they are not there."""
    if not root.is_dir():
        return None
    with FileLock(root / f"{source}.lock"):  # not of half a download
        if _unfinished(source, root).exists():
            return None
        states = [(file.name, file.stat()) for file in sorted(root.glob(NAMED[source]))]
    return _digest([f"{name}:{stat.st_size}:{stat.st_mtime_ns}" for name, stat in states]) if states else None


def _unfinished(source: str, root: Path) -> Path:
    """The file that is there while a named set is downloaded and unpacked, and after whoever did that was killed."""
    return root / f".{source}.unfinished"


def _open_digits():
    """1,797 handwritten digits, 8x8, grey, that come inside scikit-learn
    (https://archive.ics.uci.edu/dataset/80/optical+recognition+of+handwritten+digits)."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = np.round(digits.images * (255 / 16)).astype(np.uint8)[:, None]
    names = [str(name) for name in digits.target_names]
    return names, {"train": RawSplit(images, digits.target.astype(np.int64), "digit")}


def _open_torchvision(source: str, root: Path, download: bool):
    import torchvision.datasets as sets

    where = {
        "mnist": (
            sets.MNIST,
            "MNIST/raw",
            "train-images-idx3-ubyte.gz and the three files beside it",
            sets.MNIST.mirrors[-1],
        ),
        "cifar10": (sets.CIFAR10, "", sets.CIFAR10.filename, sets.CIFAR10.url),
        "cifar100": (sets.CIFAR100, "", sets.CIFAR100.filename, sets.CIFAR100.url),
        "stl10": (sets.STL10, "", sets.STL10.filename, sets.STL10.url),
    }
    builder, subfolder, file, url = where[source]
    root.mkdir(parents=True, exist_ok=True)
    parts, unfinished = {}, _unfinished(source, root)
    with FileLock(root / f"{source}.lock"):  # one process downloads, the others wait and find it there
        if unfinished.exists():  # torchvision checks the archives that it finds, but not what is out of MNIST's
            for file in root.glob(NAMED[source]):
                file.unlink()
        for split in ("train", "test"):
            argument = {"split": split} if source == "stl10" else {"train": split == "train"}
            try:
                try:
                    parts[split] = builder(root, **argument, download=False)
                except RuntimeError:  # "Dataset not found or corrupted"
                    if not download:
                        raise UserError(f"{source} is not in {root}") from None
                    say(f"downloading {source} to {root}")
                    unfinished.touch()
                    parts[split] = builder(root, **argument, download=True)
            except (OSError, RuntimeError) as error:
                raise UserError(
                    f"cannot download {source} ({' '.join(str(error).split())[:120]}); get {file} from {url}, put it "
                    f"in {root / subfolder} and run the same command, or set data.download_dir to a folder that has it"
                ) from None
        unfinished.unlink(missing_ok=True)
    splits = {}
    for split, part in parts.items():
        images = np.asarray(part.data)
        if images.ndim == 3:
            images = images[:, None]
        elif images.shape[-1] == 3:
            images = images.transpose(0, 3, 1, 2)
        labels = np.asarray(part.labels if source == "stl10" else part.targets).astype(np.int64)
        splits[split] = RawSplit(np.ascontiguousarray(images), labels, f"{source} {split}")
    # "0 - zero" to "0": the name that other copies of MNIST use, since classes are matched by name
    return [name.split(" - ")[0] for name in parts["train"].classes], splits


def _load_hub(name: str):
    import datasets

    try:
        return _prepared(datasets.load_dataset_builder(name))
    except Exception as error:  # the hub's errors have many types; all mean that the set is not there
        raise UserError(
            f"cannot load hub:{name} ({' '.join(str(error).split())[:200]}); check the name and the network, or "
            f"download its Parquet files to a folder and give that folder as data.source"
        ) from None


def _prepared(builder) -> dict[str, Any]:
    """The splits of a `datasets` builder, whose files are read if they have not been."""
    from pyarrow.dataset import ParquetFragmentScanOptions

    if hasattr(builder.config, "fragment_scan_options"):  # of Parquet, from datasets 4.2 on: no file is held whole
        builder.config.fragment_scan_options = ParquetFragmentScanOptions(pre_buffer=False)
    builder.download_and_prepare()
    return dict(builder.as_dataset())


def _open_parquet(folder: Path, source: str, image_column: str | None, label_column: str | None, notes: list[str]):
    return _open_dataset(_load_parquet(folder), source, image_column, label_column, notes)


def _load_parquet(folder: Path):
    import datasets

    datasets.disable_progress_bars()
    try:
        return _prepared(datasets.load_dataset_builder(str(folder)))
    except Exception as error:  # a damaged Parquet file raises one of many types
        raise UserError(
            f"data.source {str(folder)!r}: cannot read its Parquet files: {' '.join(str(error).split())[:200]}"
        ) from None


def _open_dataset(dataset: dict, source: str, image_column: str | None, label_column: str | None, notes: list[str]):
    import datasets

    features = next(iter(dataset.values())).features
    image_column = _column(features, datasets.Image, image_column, "image_column", ("image", "img"), source)
    label_column = _column(features, datasets.ClassLabel, label_column, "label_column", ("label", "fine_label"), source)
    splits = {}
    for name, part in dataset.items():
        encoded = part.select_columns([image_column]).cast_column(image_column, datasets.Image(decode=False))
        labels = np.asarray(part.with_format("numpy")[label_column], dtype=np.int64)
        splits[name] = RawSplit(_Column(encoded, image_column), labels, f"{source} {name} row")
    return list(features[label_column].names), _canonical(splits, source, notes)


@dataclass
class _Column:
    """The encoded images of a `datasets.Dataset`."""

    dataset: Any
    column: str

    def __getitem__(self, place: int) -> bytes | str:
        value = self.dataset[place][self.column] or {}
        if value.get("bytes") is None and value.get("path"):
            return value["path"]
        return value.get("bytes") or b""  # a missing image is an unreadable one


def _column(features, kind, asked, field, usual, source) -> str:
    known = [name for name, feature in features.items() if isinstance(feature, kind)]
    if asked is not None and asked not in known:
        raise unknown(f"data.{field}", asked, known, f"these are the {kind.__name__} columns of {source}")
    for name in (asked, *usual, *(known if len(known) == 1 else ())):
        if name in known:
            return name
    if not known:
        raise UserError(f"data.source {source!r} has no {kind.__name__} column; its columns: {', '.join(features)}")
    raise UserError(
        f"data.source {source!r} has several {kind.__name__} columns ({', '.join(known)}); set data.{field}"
    )


def _canonical(splits: dict[str, Any], source: str, notes: list[str]) -> dict[str, Any]:
    """Splits under the names train, val, test; a lone `val` is the test split, as with ImageNet."""
    names = {}
    for name in splits:
        short = "test" if name in TEST_NAMES else "val" if name in VAL_NAMES else name
        if short in ("train", "val", "test"):
            names[short] = name
    if "train" not in names:
        found = ", ".join(splits) or "none"
        raise UserError(
            f"data.source {source!r} has no train split (found: {found}); it needs train/ and test/ or val/"
        )
    if "test" not in names and "val" in names:
        names["test"] = names.pop("val")
        notes.append(f"{source} has no test split; its {names['test']} split is the test split")
    return {short: splits[name] for short, name in names.items()}


def _open_folder(folder: Path, files: list[tuple[str, ...]], notes: list[str]):
    """ImageFolder layout: SPLIT/CLASS/.../IMAGE, or CLASS/IMAGE where there are no split folders."""
    folders = _folders(folder)
    split_names = [name for name in folders if name in ("train", *TEST_NAMES, *VAL_NAMES)]
    if not files:
        raise UserError(
            f"data.source {str(folder)!r} holds no images ({', '.join(IMAGE_SUFFIXES)}) and no Parquet files"
        )
    if not split_names:
        if any(len(parts) != 2 for parts in files):
            raise UserError(
                f"data.source {str(folder)!r} has no train split (found: {', '.join(folders) or 'no folder'}); "
                f"it needs train/CLASS/IMAGE and test/ or val/, or CLASS/IMAGE without splits"
            )
        notes.append(f"{folder} has no split folders; all its images are read as train")
        roots = {"train": folder}
        found = {"train": _by_class(folder, files)}
    else:
        roots = _canonical({name: folder / name for name in split_names}, str(folder), notes)
        parts_of: dict[str, list] = {root.name: [] for root in roots.values()}
        for parts in files:
            if parts[0] in parts_of:
                parts_of[parts[0]].append(parts[1:])
        found = {split: _by_class(root, parts_of[root.name]) for split, root in roots.items()}
    classes = sorted(found["train"])
    if not classes:
        raise UserError(f"data.source {str(folder)!r}: {roots['train']} holds no images; it should hold CLASS/IMAGE")
    for name in _folders(roots["train"]):
        if name not in classes:
            raise UserError(
                f"data.source {str(folder)!r}: class folder {roots['train'] / name} holds no images; "
                f"fill it or remove it"
            )
    splits = {}
    for split, by_class in found.items():
        for name in by_class:
            if name not in classes:
                raise unknown(f"class in {roots[split]}", name, classes, "these are the classes of train")
        labels = [np.full(len(by_class[name]), classes.index(name), np.int64) for name in sorted(by_class)]
        paths = [path for name in sorted(by_class) for path in by_class[name]]
        splits[split] = RawSplit(paths, np.concatenate([np.empty(0, np.int64), *labels]))
    return classes, splits


def _folders(folder: Path) -> list[str]:
    return sorted(child.name for child in folder.iterdir() if child.is_dir() and not child.name.startswith("."))


def _by_class(root: Path, files: list[tuple[str, ...]]) -> dict[str, list[str]]:
    """Paths of the images below each class folder of a split's folder, in the order of `files`."""
    found: dict[str, list[str]] = {}
    for parts in files:
        if len(parts) > 1:
            found.setdefault(parts[0], []).append(os.path.join(root, *parts))
    return found
