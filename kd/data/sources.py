"""Where images come from: named sets, the Hub, folders. A source lists its splits; the store decodes them once."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock

from kd.errors import UserError, say, unknown

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp", ".gif")
TEST_NAMES, VAL_NAMES = ("test",), ("val", "valid", "validation")
NAMED = ("digits", "mnist", "cifar10", "cifar100", "stl10")


@dataclass
class RawSplit:
    """Images of one split before they are in the store.

    images: a uint8 array (N, C, H, W), or N encoded images: paths, or a function from a place to bytes.
    labels: int64 (N,).
    name: a place to how that image is called in a message.
    """

    images: np.ndarray | Sequence[Path] | Callable[[int], Any]
    labels: np.ndarray
    name: Callable[[int], str]


@dataclass
class Source:
    """A set of images: its splits are read only when they are asked for.

    open: gives the class names and the raw splits, by names among train, val, test; may be slow.
    fingerprint: changes when the images may have changed; None when they are quick to read and need no store.
    notes: what a user should know of how the splits were found; filled by `open`.
    """

    name: str
    open: Callable[[], tuple[list[str], dict[str, RawSplit]]]
    fingerprint: str | None = None
    notes: list[str] = field(default_factory=list)


def find_source(
    source: str, download_dir: Path, image_column: str | None, label_column: str | None, download: bool = True
) -> Source:
    """The source of that name, Hub name or folder.

    Raises:
        UserError: no such source; the known names and forms are listed.
    """
    notes: list[str] = []
    if source in NAMED:
        opener = _open_digits if source == "digits" else lambda: _open_torchvision(source, download_dir, download)
        return Source(source, opener)
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
    listing = [f"{file.relative_to(folder)}:{stat.st_size}:{stat.st_mtime_ns}" for file, stat in files]
    columns = [f"columns:{image_column}:{label_column}"]
    if any(file.suffix == ".parquet" for file, _ in files):
        opener = partial(_open_parquet, folder, source, image_column, label_column, notes)
    else:
        paths = [file for file, _ in files if file.suffix.lower() in IMAGE_SUFFIXES]
        opener = partial(_open_folder, folder, paths, notes)
    return Source(folder.resolve().name, opener, _digest(columns + listing), notes)


def _digest(parts: list[str]) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:20]


def _walk(folder: Path):
    for root, folders, files in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in files:
            if not name.startswith("."):
                path = Path(root, name)
                yield path, path.stat()


def _open_digits():
    """1,797 handwritten digits, 8x8, grey, that come inside scikit-learn
    (https://archive.ics.uci.edu/dataset/80/optical+recognition+of+handwritten+digits)."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = np.round(digits.images * (255 / 16)).astype(np.uint8)[:, None]
    names = [str(name) for name in digits.target_names]
    return names, {"train": RawSplit(images, digits.target.astype(np.int64), lambda i: f"digit {i}")}


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
    parts = {}
    with FileLock(root / f"{source}.lock"):  # one process downloads, the others wait and find it there
        for split in ("train", "test"):
            argument = {"split": split} if source == "stl10" else {"train": split == "train"}
            try:
                try:
                    parts[split] = builder(root, **argument, download=False)
                except RuntimeError:  # "Dataset not found or corrupted"
                    if not download:
                        raise UserError(f"{source} is not in {root}") from None
                    say(f"downloading {source} to {root}")
                    parts[split] = builder(root, **argument, download=True)
            except (OSError, RuntimeError) as error:
                raise UserError(
                    f"cannot download {source} ({' '.join(str(error).split())[:120]}); get {file} from {url}, put it "
                    f"in {root / subfolder} and run the same command, or set data.download_dir to a folder that has it"
                ) from None
    splits = {}
    for split, part in parts.items():
        images = np.asarray(part.data)
        if images.ndim == 3:
            images = images[:, None]
        elif images.shape[-1] == 3:
            images = images.transpose(0, 3, 1, 2)
        labels = np.asarray(part.labels if source == "stl10" else part.targets).astype(np.int64)
        splits[split] = RawSplit(np.ascontiguousarray(images), labels, lambda i, split=split: f"{source} {split} {i}")
    # "0 - zero" to "0": the name that other copies of MNIST use, since classes are matched by name
    return [name.split(" - ")[0] for name in parts["train"].classes], splits


def _load_hub(name: str):
    import datasets

    try:
        return dict(datasets.load_dataset(name))
    except Exception as error:  # the hub's errors have many types; all mean that the set is not there
        raise UserError(
            f"cannot load hub:{name} ({' '.join(str(error).split())[:200]}); check the name and the network, or "
            f"download its Parquet files to a folder and give that folder as data.source"
        ) from None


def _open_parquet(folder: Path, source: str, image_column: str | None, label_column: str | None, notes: list[str]):
    return _open_dataset(_load_parquet(folder), source, image_column, label_column, notes)


def _load_parquet(folder: Path):
    import datasets

    datasets.disable_progress_bars()
    try:
        return dict(datasets.load_dataset(str(folder)))
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

        def read(i, encoded=encoded):
            value = encoded[i][image_column] or {}
            if value.get("bytes") is None and value.get("path"):
                return Path(value["path"])
            return value.get("bytes") or b""  # a missing image is an unreadable one

        labels = np.asarray(part.with_format("numpy")[label_column], dtype=np.int64)
        splits[name] = RawSplit(read, labels, lambda i, name=name: f"{source} {name} row {i}")
    return list(features[label_column].names), _canonical(splits, source, notes)


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


def _open_folder(folder: Path, paths: list[Path], notes: list[str]):
    """ImageFolder layout: SPLIT/CLASS/.../IMAGE, or CLASS/IMAGE where there are no split folders."""
    tops = sorted({path.relative_to(folder).parts[0] for path in paths if path.parent != folder})
    folders = sorted(child.name for child in folder.iterdir() if child.is_dir() and not child.name.startswith("."))
    split_names = [name for name in folders if name in ("train", *TEST_NAMES, *VAL_NAMES)]
    if not paths:
        raise UserError(
            f"data.source {str(folder)!r} holds no images ({', '.join(IMAGE_SUFFIXES)}) and no Parquet files"
        )
    if not split_names:
        if any(len(path.relative_to(folder).parts) != 2 for path in paths) or not tops:
            raise UserError(
                f"data.source {str(folder)!r} has no train split (found: {', '.join(folders) or 'no folder'}); "
                f"it needs train/CLASS/IMAGE and test/ or val/, or CLASS/IMAGE without splits"
            )
        notes.append(f"{folder} has no split folders; all its images are read as train")
        roots = {"train": folder}
    else:
        roots = _canonical({name: folder / name for name in split_names}, str(folder), notes)
    per_split = {split: _by_class(root, paths) for split, root in roots.items()}
    classes = sorted(per_split["train"])
    if not classes:
        raise UserError(f"data.source {str(folder)!r}: {roots['train']} holds no images; it should hold CLASS/IMAGE")
    for split, found in per_split.items():
        for name in sorted({child.name for child in roots[split].iterdir() if child.is_dir()} - set(found)):
            if split == "train" and not name.startswith("."):
                raise UserError(
                    f"data.source {str(folder)!r}: class folder {roots[split] / name} holds no images; "
                    f"fill it or remove it"
                )
        for name in found:
            if name not in classes:
                raise unknown(f"class in {roots[split]}", name, classes, "these are the classes of train")
    splits = {}
    for split, found in per_split.items():
        files = [(path, classes.index(name)) for name in sorted(found) for path in found[name]]
        labels = np.asarray([label for _, label in files], dtype=np.int64)
        images = [path for path, _ in files]
        splits[split] = RawSplit(images, labels, lambda i, images=images: str(images[i]))
    return classes, splits


def _by_class(root: Path, paths: list[Path]) -> dict[str, list[Path]]:
    found: dict[str, list[Path]] = {}
    for path in paths:
        if root in path.parents and path.parent != root:
            found.setdefault(path.relative_to(root).parts[0], []).append(path)
    return found
