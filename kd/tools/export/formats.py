"""The formats of an export: how each is written, loaded again, and compared with the run's network."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import logging
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from kd.models import Classifier, load_classifier
from kd.util.contents import read_network
from kd.util.errors import UserError
from kd.util.own_code import described

TOLERANCE = 1e-4  # of the largest logit
NUM_CHECKED = 64  # images


def deployed(classifier: Classifier, inside: bool) -> nn.Module:
    """What is exported: uint8 images to logits where the preprocessing is inside, else prepared images to logits."""
    parts = [classifier.preprocess, classifier.network] if inside else [classifier.network]
    return nn.Sequential(*parts).eval().requires_grad_(False)


@torch.no_grad()
def check(exported: Callable[[Tensor], Tensor], module: nn.Module, inputs: Tensor, what: str, of: str) -> dict:
    """Compare an export with PyTorch, in batches of 1, of 3 and of up to 16; a large difference is a UserError."""
    sizes = [1, 3, *[16] * ((len(inputs) - 4) // 16)] if len(inputs) > 4 else [1]
    batches = [batch for batch in inputs.split([*sizes, len(inputs) - sum(sizes)]) if len(batch)]
    expected = torch.cat([module(batch) for batch in batches])
    given = torch.cat([exported(batch) for batch in batches])
    difference, largest = (given - expected).abs().max().item(), expected.abs().max().item()
    if not difference <= TOLERANCE * largest:  # true of a NaN too
        raise UserError(
            f"the {what} export gives something else than PyTorch: logits differ by {difference:.2g} on {of}, and the "
            f"largest is {largest:.2g}; nothing was written; try another --to"
        )
    return {
        "images": len(given),
        "of": of,
        "largest_difference": difference,
        "tolerance": TOLERANCE * largest,
        "same_class": int((given.argmax(1) == expected.argmax(1)).sum()),
    }


def to_onnx(module: nn.Module, example: Tensor, description: dict, file: Path) -> Callable[[Tensor], Tensor]:
    """Write an ONNX file with any number of `images` in and `logits` out; returns it as `session` does.

    `example` are any two inputs; `description` is kept in the file as `kd`, JSON.
    """
    num_bytes = sum(tensor.numel() * tensor.element_size() for tensor in module.state_dict().values())
    if num_bytes > 1.9e9:
        raise UserError(f"an ONNX file ends at 2 GB, and these weights have {num_bytes / 1e9:.1f} GB; use --to torch")
    names = {"input_names": ["images"], "output_names": ["logits"], "dynamic_shapes": ({0: "batch"},)}
    program = _traced("ONNX", lambda: torch.onnx.export(module, (example,), dynamo=True, verbose=False, **names))
    for node in program.model.graph.all_nodes():  # the exporter notes the lines of code, with their paths here
        node.metadata_props.pop("pkg.torch.onnx.stack_trace", None)
    program.model.metadata_props["kd"] = json.dumps(description)
    program.save(file)
    return session(file)


def session(file: Path) -> Callable[[Tensor], Tensor]:
    """An ONNX file in ONNX Runtime on the CPU, with as many threads as PyTorch has, from images to logits."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3  # errors
    try:
        loaded = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its exceptions have no common class; it lacks operations, as for bf16
        raise UserError(f"ONNX Runtime cannot run the network: {described(error)}; use --to torch") from None
    return lambda images: torch.from_numpy(loaded.run(None, {"images": images.numpy()})[0])


def require_onnx() -> None:
    """Raise a UserError if a package that ONNX needs is not installed."""
    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"--to onnx needs {', '.join(missing)}; run pip install {' '.join(missing)}")


def to_torch(module: nn.Module, example: Tensor, description: dict, file: Path) -> Callable[[Tensor], Tensor]:
    """Write a torch.export program (.pt2) that takes any number of images; returns it loaded again."""
    batch = torch.export.Dim("batch")
    program = _traced("torch.export", lambda: torch.export.export(module, (example,), dynamic_shapes=({0: batch},)))
    for part in program.graph_module.modules():
        for node in part.graph.nodes if isinstance(part, torch.fx.GraphModule) else ():
            node.meta.pop("stack_trace", None)  # lines of code, with their paths on this machine
    torch.export.save(program, file, extra_files={"kd.json": json.dumps(description)})
    return torch.export.load(file).module()


def _traced(what: str, trace: Callable):
    """What `trace` returns; what the tracers print of their own insides, at length where they fail, is not shown."""
    try:
        with quiet_logging(), warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            return trace()
    except Exception as error:  # a network of the user's own can fail in many ways here
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"the network cannot be traced for {what}: {type(error).__name__}: {reason}") from None


@contextlib.contextmanager
def quiet_logging():
    """Nothing is logged below an error, on whatever logger."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(level)


def to_folder(run: Path, folder: Path, trust: bool) -> Classifier:
    """Copy what `kd.load` needs, and load it from there."""
    for name in ("model.safetensors", "config.json"):
        shutil.copyfile(run / name, folder / name)
    return load_classifier(folder, trust=trust)


def describe(classifier: Classifier, run: Path, inputs: Tensor, inside: bool) -> dict:
    """What a program needs to know to use an export, in plain JSON values."""
    kind, where = ("uint8", "inside") if inside else ("float32", "outside")
    return {
        "run": run.resolve().name,
        "model": classifier.recipe["model"],
        "weights_sha256": read_network(run)["sha256"],
        "input": {"name": "images", "type": kind, "shape": ["batch", *inputs.shape[1:]], "preprocess": where},
        "output": {"name": "logits", "type": "float32", "shape": ["batch", len(classifier.classes)]},
        "classes": classifier.classes,
        "preprocess": classifier.preprocess.view.to_dict(),
    }
