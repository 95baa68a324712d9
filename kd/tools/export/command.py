"""Export a finished run.

python -m kd.export runs/mine/kd --to onnx --quantize int8
python -m kd.export runs/mine/kd --to torch --out kd.pt2
python -m kd.export runs/mine/kd --to safetensors
python -m kd.export runs/mine/kd_s0 runs/mine/kd_s1 runs/mine/kd_s2 --to hub --license apache-2.0
"""

from __future__ import annotations

import json
import os
import tempfile
from argparse import Namespace
from importlib.metadata import version
from pathlib import Path

import torch

from kd.models import Classifier, load_classifier, state_hash
from kd.report.tables import Table
from kd.run.folder import refuse_runs_file
from kd.tools.export import int8
from kd.tools.export.card import model_card
from kd.tools.export.formats import NUM_CHECKED, check, deployed, describe, require_onnx, to_folder, to_onnx, to_torch
from kd.tools.export.images import RunImages
from kd.util.errors import CommandParser, UserError, say

SUFFIXES = {"onnx": ".onnx", "torch": ".pt2"}
COLUMNS = {  # of what int8 costs and saves
    "": ("name", ""),
    "accuracy %": ("accuracy", ".2f"),
    "bytes": ("bytes", ","),
    "ms/image": ("latency_ms", ".3f"),
}


def main(argv: list[str] | None = None) -> int:
    """Write the export, and print where it is and how well it agrees with the run."""
    arguments = _arguments(argv)
    os.environ["HF_HUB_OFFLINE"] = "1"  # nothing is fetched, not even to check an export
    run, to = Path(arguments.runs[0]), arguments.to
    classifier = load_classifier(run, trust=arguments.trust_code)
    folder, files = _target(arguments, run)
    if (folder / "config.yaml").is_file():  # a folder without it is an earlier export
        for name in files:
            refuse_runs_file(folder / name, "--out")
    there = [name for name in files if (folder / name).exists()]
    if there and not arguments.overwrite:
        raise UserError(f"{folder} holds {', '.join(there)} already; pass --overwrite, or --out another place")
    near = next(parent for parent in (folder, *folder.parents) if parent.is_dir())
    with tempfile.TemporaryDirectory(prefix=".export-", dir=near) as aside:
        if to in SUFFIXES:
            _write_program(arguments, run, classifier, Path(aside) / files[0])
        else:
            _write_folder(arguments, run, classifier, Path(aside))
        folder.mkdir(parents=True, exist_ok=True)
        written = [name for name in files if (Path(aside) / name).exists()]
        for name in written:
            os.replace(Path(aside) / name, folder / name)
        for name in set(files) - set(written):
            (folder / name).unlink(missing_ok=True)  # no part of an earlier export stays beside the new one
    say("wrote " + ", ".join(f"{folder / name} ({(folder / name).stat().st_size:,} bytes)" for name in written))
    if to == "hub":
        say(f"nothing was sent; read {folder / 'README.md'}, then: hf upload OWNER/NAME {folder}")
    return 0


def _target(arguments: Namespace, run: Path) -> tuple[Path, list[str]]:
    """The folder of the export, and the names of the files that it may have there."""
    to, out = arguments.to, Path(arguments.out) if arguments.out else run / "export" / arguments.to
    if to in SUFFIXES:
        is_file = out.suffix == SUFFIXES[to]
        folder, stem = (out.parent, out.stem) if is_file else (out, "model")
        name = stem + SUFFIXES[to]
        files = [name, f"{name}.json", *([f"{stem}.int8.onnx"] if to == "onnx" else [])]
    else:
        folder, files = out, ["model.safetensors", "config.json", *(["README.md"] if to == "hub" else [])]
    links = [place for place in (run / "export", folder) if place.is_symlink()] if not arguments.out else []
    if links:
        raise UserError(f"{str(links[0])!r} is a link, and an export stays in the run's folder; name another by --out")
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--out {str(folder)!r} is a file; name a folder")
    return folder, files


def _arguments(argv: list[str] | None) -> Namespace:
    parser = CommandParser("export", __doc__, "RUN [RUN ...] --to {onnx,torch,safetensors,hub} [options]")
    parser.add_argument("runs", nargs="+", help="a run folder; with --to hub also runs of other seeds, for the spread")
    parser.add_argument("--to", required=True, choices=(*SUFFIXES, "safetensors", "hub"), help="the format")
    out = "a folder, or a file ending in .onnx or .pt2; default RUN/export/FORMAT"
    parser.add_argument("--out", metavar="PATH", help=out)
    parser.add_argument("--quantize", choices=("int8",), help="of onnx: write an int8 file too, and compare the two")
    parser.add_argument("--preprocess", choices=("inside", "outside"),
                        help="of onnx and torch: take uint8 images (inside, the default) or prepared ones")  # fmt: skip
    parser.add_argument("--license", metavar="NAME", help="of hub: the licence of these weights, for the model card")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier export")
    parser.add_argument("--cache_dir", metavar="FOLDER", help="where decoded images are kept; default ~/.cache/kd")
    parser.add_argument("--download_dir", metavar="FOLDER", help="where named sets are; default CACHE_DIR/downloads")
    parser.add_trust()
    arguments = parser.parse_intermixed_args(argv)
    for flag, formats in (("quantize", ("onnx",)), ("preprocess", tuple(SUFFIXES)), ("license", ("hub",))):
        if getattr(arguments, flag) and arguments.to not in formats:
            raise UserError(f"--{flag} goes with --to {' or '.join(formats)}, not with --to {arguments.to}")
    if len(arguments.runs) > 1 and arguments.to != "hub":
        raise UserError(f"--to {arguments.to} takes one run, not {len(arguments.runs)}; --to hub takes several seeds")
    if arguments.to == "onnx":
        require_onnx()
    return arguments


def _write_program(arguments, run: Path, classifier: Classifier, file: Path) -> None:
    """An ONNX file or a torch.export program, and beside it a description with the numbers that are printed."""
    inside = arguments.preprocess != "outside"
    module = deployed(classifier, inside)
    images = RunImages(run, classifier, cache_dir=arguments.cache_dir, download_dir=arguments.download_dir)

    def prepare(batch):
        return batch if inside else classifier.preprocess(batch)

    inputs, of = prepare(images.some("test", NUM_CHECKED)), "test images"
    if images.data is None:
        of = "images of noise"
        say(f"note: the run's images are absent ({images.absent}); the export is checked on noise")
    description = describe(classifier, run, inputs, inside)
    write = {"onnx": to_onnx, "torch": to_torch}[arguments.to]
    exported = write(module, torch.zeros_like(inputs[:2]), description, file)
    found = check(exported, module, inputs, arguments.to, of)
    difference = f"{found['largest_difference']:.1e} (tolerance {found['tolerance']:.1e})"
    checked = f"checked against PyTorch on {found['images']} {of}: largest difference of a logit"
    say(f"{checked} {difference}, the same class for {found['same_class']}")
    packages = ("torch", "onnx", "onnxscript", "onnxruntime") if arguments.to == "onnx" else ("torch",)
    numbers = {"check": found, "versions": {name: version(name) for name in packages}}
    if arguments.quantize:
        numbers["int8"] = _quantize(images, prepare, file)
    file.with_name(f"{file.name}.json").write_text(json.dumps({**description, **numbers}, indent=2) + "\n")


def _quantize(images: RunImages, prepare, file: Path) -> dict:
    """An int8 file beside an ONNX file, and what it costs and saves."""
    if images.data is None:
        raise UserError(f"--quantize int8 needs the run's train images to calibrate on: {images.absent}")
    calibration = images.some("train", int8.NUM_CALIBRATION)
    small = file.with_suffix(".int8.onnx")
    int8.quantize(file, small, prepare(calibration))
    rows = int8.compare({"float32": file, "int8": small}, images.batches("test"), prepare)
    count, threads = len(images.data.test), torch.get_num_threads()
    say(f"int8: calibrated on {len(calibration)} train images; both measured in ONNX Runtime on {count:,} test images,")
    say(f"the time for one image alone, {threads} CPU thread{'s' if threads > 1 else ''}")
    same = rows["int8"].pop("same_class")
    say(Table.of(({"name": name, **row} for name, row in rows.items()), COLUMNS).text())
    say(f"int8 names float32's class for {same:,} of {count:,} images")
    counts = {"calibration_images": len(calibration), "test_images": count, "same_class": same, "num_threads": threads}
    return {**counts, **rows}


def _write_folder(arguments, run: Path, classifier: Classifier, folder: Path) -> None:
    """What `kd.load` reads, and for the Hub a model card."""
    loaded = to_folder(run, folder, arguments.trust_code)
    assert state_hash(loaded.network) == state_hash(classifier.network), "the copy is the run's network"
    if arguments.to == "hub":
        (folder / "README.md").write_text(model_card([Path(name) for name in arguments.runs], arguments.license))
