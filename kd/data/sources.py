"""Where images come from: named sets, the Hub, folders. A source lists its splits; the store decodes them once."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path

import numpy as np

from kd.data.listing import MEMORY, contents, digest, listing
from kd.data.parquet import load_hub, open_dataset, open_parquet
from kd.data.raw import TEST_NAMES, VAL_NAMES, RawSplit, canonical
from kd.util.errors import UserError, say, unknown
from kd.util.files import locked, shown

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp", ".gif")
# the named sets, and their files below the download folder
NAMED = {
    "digits": "",
    "mnist": "MNIST/raw/*-ubyte",
    "cifar10": "cifar-10-batches-py/*",
    "cifar100": "cifar-100-python/*",
    "stl10": "stl10_binary/*",
}


@dataclass
class Source:
    """A set of images: its splits are read only by `open`.

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
    source: str,
    cache_dir: Path,
    download_dir: Path,
    image_column: str | None = None,
    label_column: str | None = None,
    download: bool = True,
    hub_dir: Path | None = None,
) -> Source:
    """The source of that name, Hub name or folder.

    Args:
        hub_dir: where sets of the Hub are kept; None for where the Hugging Face libraries keep them.

    Raises:
        UserError: no such source; the known names and forms are listed.
    """
    notes: list[str] = []
    if source == "digits":
        return Source(source, _open_digits, digest([version("scikit-learn")]), decoded=True)
    if source in NAMED:
        opener = partial(_open_torchvision, source, download_dir, download)
        return Source(source, opener, _downloaded(source, download_dir, cache_dir / MEMORY), decoded=True)
    if source.startswith("hub:"):
        dataset, files = load_hub(source[4:], hub_dir, notes)
        prints = [f"{split}:{part._fingerprint}" for split, part in sorted(dataset.items())]
        return Source(
            source,
            lambda: open_dataset(dataset, source, image_column, label_column, notes, files()),
            digest([source, f"{image_column}:{label_column}", "names by file", *prints]),
            notes,
        )
    if shown(source) != source:
        raise UserError(f"data.source {shown(source)!r} has a name that is not UTF-8; rename it")
    folder = Path(source).expanduser()
    if not folder.exists():
        raise unknown("data.source", source, NAMED, "or hub:owner/name, or a folder (there is none of this name)")
    if not folder.is_dir():
        raise UserError(f"data.source {source!r} is a file; give the folder that holds the images")
    files = listing(folder)
    if not files:
        raise UserError(f"data.source {source!r} is an empty folder; it should hold train/CLASS/IMAGE or Parquet files")
    if any(parts[-1].endswith(".parquet") and stat.S_ISREG(state.st_mode) for parts, state in files):
        fingerprint = digest([contents(folder, files, cache_dir / MEMORY), f"{image_column}:{label_column}"])
        copy = cache_dir / "parquet" / fingerprint
        opener = partial(open_parquet, folder, copy, source, image_column, label_column, notes)
    else:
        files = [(parts, state) for parts, state in files if parts[-1].lower().endswith(IMAGE_SUFFIXES)]
        fingerprint = contents(folder, files, cache_dir / MEMORY)
        opener = partial(_open_folder, folder, [parts for parts, _ in files], notes)
    return Source(folder.resolve().name, opener, fingerprint, notes)


def _downloaded(source: str, root: Path, memory: Path) -> str | None:
    """The fingerprint of a named set's files; None if they are not there."""
    if not root.is_dir():
        return None
    with locked(root / f"{source}.lock"):  # not of half a download
        if _unfinished(source, root).exists():
            return None
        files = [(file.relative_to(root).parts, file.stat()) for file in sorted(root.glob(NAMED[source]))]
    return contents(root, files, memory) if files else None


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

    builder = getattr(sets, source.upper())
    if source == "mnist":
        archive, place = "train-images-idx3-ubyte.gz and the three files beside it", root / "MNIST/raw"
    else:
        archive, place = builder.filename, root
    root.mkdir(parents=True, exist_ok=True)
    parts, unfinished = {}, _unfinished(source, root)
    with locked(root / f"{source}.lock"):  # one process downloads, the others wait and find it there
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
                url = builder.mirrors[-1] if source == "mnist" else builder.url
                raise UserError(
                    f"cannot download {source} ({' '.join(str(error).split())[:120]}); get {archive} from {url}, put "
                    f"it in {place} and run the same command, or set data.download_dir to a folder that has it"
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


def _open_folder(folder: Path, files: list[tuple[str, ...]], notes: list[str]):
    """ImageFolder layout: SPLIT/CLASS/.../IMAGE, or CLASS/IMAGE where there are no split folders."""
    folders = _folders(folder)
    split_names = [name for name in folders if name in ("train", *TEST_NAMES, *VAL_NAMES)]
    if not files:
        raise UserError(
            f"data.source {str(folder)!r} holds no images ({', '.join(IMAGE_SUFFIXES)}) and no Parquet files"
        )
    if split_names:
        roots = canonical({name: folder / name for name in split_names}, str(folder), notes)
    elif all(len(parts) == 2 for parts in files):
        notes.append(f"{folder} has no split folders; all its images are read as train")
        roots = {"train": folder}
    else:
        raise UserError(
            f"data.source {str(folder)!r} has no train split (found: {', '.join(folders) or 'no folder'}); "
            f"it needs train/CLASS/IMAGE and test/ or val/, or CLASS/IMAGE without splits"
        )
    found = {split: _by_class(root.relative_to(folder).parts, folder, files) for split, root in roots.items()}
    classes = sorted(found["train"])
    if not classes:
        raise UserError(f"data.source {str(folder)!r}: {roots['train']} holds no images; it should hold CLASS/IMAGE")
    for name in _folders(roots["train"]):
        if shown(name) != name:
            raise UserError(f"class folder {shown(roots['train'] / name)!r} has a name that is not UTF-8; rename it")
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


def _by_class(above: tuple[str, ...], folder: Path, files: list[tuple[str, ...]]) -> dict[str, list[str]]:
    """Paths of the images below each class folder of the split `above`, in the order of `files`."""
    found: dict[str, list[str]] = {}
    for parts in files:
        if parts[: len(above)] == above and len(parts) > len(above) + 1:
            found.setdefault(parts[len(above)], []).append(os.path.join(folder, *parts))
    return found
