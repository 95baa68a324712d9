"""Sets of images in Parquet files, of a folder or of the Hub."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kd.data.raw import VAL_NAMES, RawSplit, canonical, require_one_val
from kd.util.errors import UserError, unknown

_VAL = re.compile(rf"(?<![a-z])({'|'.join(VAL_NAMES)})(?![a-z])")
_PLAIN = re.compile(r"u?int\d+|(large_)?string|bool")  # types of columns that may hold labels, in Arrow's words


def load_hub(
    name: str, folder: Path | None, notes: list[str]
) -> tuple[dict[str, Any], Callable[[], dict[str, list[Path]]]]:
    """A set of the Hub: its splits, and a function that gives each split's Parquet files, downloaded where they are not
    there any more.

    Args:
        folder: below which all lies that is downloaded and read; None for where the Hugging Face libraries put it.

    Raises:
        UserError: there is no such set, or no network.
    """
    import datasets

    @contextmanager
    def hub() -> Iterator[None]:
        try:
            with _kept_below(folder):
                yield
        except Exception as error:  # the hub's errors have many types; all mean that the set is not there
            raise UserError(
                f"cannot load hub:{name} ({' '.join(str(error).split())[:200]}); check the name and the network, or "
                f"download its Parquet files to a folder and give that folder as data.source"
            ) from None

    def files() -> dict[str, list[Path]]:
        if not builder.config.data_files:
            notes.append(
                f"hub:{name} is read from the cache, without a network: in which order each of its files names the "
                f"classes is not known"
            )
            return {}
        with hub():
            found = builder.dl_manager.download(builder.config.data_files)
        return {str(split): [Path(f) for f in some if f.endswith(".parquet")] for split, some in found.items()}

    with hub():
        builder = datasets.load_dataset_builder(name, cache_dir=folder and str(folder))
        return _prepared(builder), files


@contextmanager
def _kept_below(folder: Path | None) -> Iterator[None]:
    """Let what is downloaded lie below a folder: `datasets` does not tell its `cache_dir` to what fetches files."""
    if folder is None:
        yield
        return
    from huggingface_hub import constants

    os.environ.setdefault("HF_XET_CACHE", str(folder / "xet"))  # of the package that fetches large files
    before, constants.HF_HUB_CACHE = constants.HF_HUB_CACHE, str(folder / "hub")
    try:
        yield
    finally:
        constants.HF_HUB_CACHE = before


def _prepared(builder) -> dict[str, Any]:
    """The splits of a `datasets` builder, whose files are read if they have not been."""
    from pyarrow.dataset import ParquetFragmentScanOptions

    if hasattr(builder.config, "fragment_scan_options"):  # of Parquet, from datasets 4.2 on: no file is held whole
        builder.config.fragment_scan_options = ParquetFragmentScanOptions(pre_buffer=False)
    builder.download_and_prepare()
    return dict(builder.as_dataset())


def open_parquet(
    folder: Path, copy: Path, source: str, image_column: str | None, label_column: str | None, notes: list[str]
):
    """Class names and splits of a folder of Parquet files.

    Args:
        copy: the folder where `datasets` puts what it has read.

    Raises:
        UserError: they cannot be read, or their columns are not those of images and labels.
    """
    import datasets

    datasets.disable_progress_bars()
    try:
        builder = datasets.load_dataset_builder(str(folder), cache_dir=str(copy))
        files = {str(split): [Path(file) for file in some] for split, some in builder.config.data_files.items()}
        dataset = _prepared(builder)
    except Exception as error:  # a damaged Parquet file raises one of many types
        raise UserError(
            f"data.source {str(folder)!r}: cannot read its Parquet files: {' '.join(str(error).split())[:200]}"
        ) from None
    paths = (str(file.relative_to(folder.resolve())) for some in files.values() for file in some)
    require_one_val(sorted({found[0] for path in paths if (found := _VAL.search(path))}), source)
    return open_dataset(dataset, source, image_column, label_column, notes, files)


def open_dataset(
    dataset: dict,
    source: str,
    image_column: str | None,
    label_column: str | None,
    notes: list[str],
    files: dict[str, list[Path]],
):
    """Class names and splits of a `datasets` set by split.

    Args:
        files: the Parquet files of each split, whose class names may stand in another order in each.
    """
    import datasets

    features = next(iter(dataset.values())).features
    image_column = _column(features, datasets.Image, image_column, "image_column", ("image", "img"), source)
    label_column = _label_column(features, label_column, source)
    splits, classes = {}, getattr(features[label_column], "names", None)
    for name, part in sorted(dataset.items(), key=lambda item: item[0] != "train"):  # train's labels are the classes
        encoded = part.select_columns([image_column]).cast_column(image_column, datasets.Image(decode=False))
        column = part.select_columns([label_column]).with_format("arrow")[:][label_column]
        title = f"{source} {name} row"
        if column.null_count:
            first = column.is_null().to_pylist().index(True)
            raise UserError(f"data.source {source!r}: {title} {first} has no label; remove the rows without one")
        if isinstance(features[label_column], datasets.ClassLabel):
            labels = _renumbered(column.to_numpy().astype(np.int64), classes, label_column, files.get(name, []))
        else:
            values = column.to_numpy(zero_copy_only=False)
            classes = sorted(set(values.tolist())) if classes is None else classes
            labels = _numbers(values.tolist(), classes, f"{label_column} of {name} in {source}")
        splits[name] = RawSplit(_Column(encoded, image_column), labels, title)
    return [str(name) for name in classes], canonical(splits, source, notes)


def _renumbered(labels: np.ndarray, classes: list[str], column: str, files: list[Path]) -> np.ndarray:
    """Labels int64 (N,) by the order of `classes`, where each file may have an order of its own: `datasets` takes the
    first file's for all."""
    from pyarrow.parquet import ParquetFile

    start = 0
    for path in files:
        with ParquetFile(path) as file:
            count, metadata = file.metadata.num_rows, file.schema_arrow.metadata or {}
        stated = json.loads(metadata.get(b"huggingface", b"{}")).get("info", {}).get("features", {})
        names = stated.get(column, {}).get("names", classes)
        if names != classes:
            some = slice(start, start + count)
            order = np.array(_numbers(names, classes, f"{column} in {path.name}"))
            known = (labels[some] >= 0) & (labels[some] < len(names))
            labels[some][known] = order[labels[some][known]]
        start += count
    return labels


def _numbers(values: list, classes: list, what: str) -> np.ndarray:
    """The place of each value among the classes, int64 (N,)."""
    places = {name: place for place, name in enumerate(classes)}
    for value in values:
        if value not in places:
            raise unknown(what, str(value), map(str, classes), "these are the classes of train")
    return np.array([places[value] for value in values], np.int64)


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


def _label_column(features, asked: str | None, source: str) -> str:
    """The column of labels: of ClassLabels, else of integers or strings that has a usual name or is asked for."""
    import datasets

    named = any(isinstance(feature, datasets.ClassLabel) for feature in features.values())
    for name in (asked,) if named else (asked, "label", "labels", "fine_label"):
        feature = features.get(name)
        if not isinstance(feature, datasets.ClassLabel) and _PLAIN.fullmatch(getattr(feature, "dtype", "")):
            return name
    return _column(features, datasets.ClassLabel, asked, "label_column", ("label", "fine_label"), source)


def _column(features, kind, asked, field, usual, source) -> str:
    known = [name for name, feature in features.items() if isinstance(feature, kind)]
    if asked is not None and asked not in known:
        raise unknown(f"data.{field}", asked, known, f"these are the {kind.__name__} columns of {source}")
    for name in (asked, *usual, *(known if len(known) == 1 else ())):
        if name in known:
            return name
    if not known:
        raise UserError(
            f"data.source {source!r} has no {kind.__name__} column; its columns: {', '.join(features)}; "
            f"set data.{field}"
        )
    raise UserError(
        f"data.source {source!r} has several {kind.__name__} columns ({', '.join(known)}); set data.{field}"
    )
