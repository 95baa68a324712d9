"""Networks by name, and the classifier that a run folder holds: a network with its preprocessing and class names."""

from __future__ import annotations

import copy
import hashlib
import inspect
import json
import pickle
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from torch import Tensor, nn

from kd.models import torchvision_nets
from kd.models.cifar import CIFAR_NETS
from kd.models.cifar10_resnets import CIFAR10_RESNETS
from kd.models.dropout import use_keyed_dropout
from kd.models.exits import exit_network
from kd.models.fold import folded
from kd.models.frozen import code_hash as code_hash
from kd.models.frozen import freeze as freeze
from kd.models.frozen import freeze_all_but
from kd.models.frozen import state_hash as state_hash
from kd.models.own import accept, import_builder
from kd.models.preprocess import Preprocess, View
from kd.models.reused_head import reuse_head as reuse_head
from kd.models.reused_head import reused_head
from kd.models.small import SMALL_NETS
from kd.models.taps import tap
from kd.outputs import Outputs
from kd.util.contents import read_network
from kd.util.errors import UserError, unknown
from kd.util.own_code import blamed, described
from kd.util.tensors import savable

_OWN_NETS = {**SMALL_NETS, **CIFAR_NETS, **CIFAR10_RESNETS}
_MADE_BY_SCRIPTS = {"exit": exit_network, "reused_head": reused_head}  # known to a run's config.json, not to flags
BACKBONE = "backbone.features"  # the column of what a frozen backbone gives


class Classifier(nn.Module):
    """A network that knows its class names and how its images are prepared.

    Calling it maps uint8 images (B, C, H, W) to logits (B, K).

    Args:
        network: float images (B, C, H, W), prepared by `view`, to logits (B, K).
        classes: K names.
        recipe: `{"model": name, "model_args": {...}}`, by which `build_network` rebuilds the network.
    """

    def __init__(self, network: nn.Module, view: View, classes: Sequence[str], recipe: dict):
        super().__init__()
        self.network = network
        self.preprocess = Preprocess(view)
        self.classes = list(classes)
        self.recipe = recipe
        self._dropouts = use_keyed_dropout(network)
        # A network of the user's own may use `view`, which channels_last breaks.
        model = recipe["model_args"]["student"] if recipe["model"] in _MADE_BY_SCRIPTS else recipe["model"]
        self._any_order = model in _OWN_NETS or _of_torchvision(model)
        self._tapped: set[str] = set()
        self._features: dict[str, Tensor] = {}  # of the forward pass that runs now
        self.head: str | None = None  # the head's dotted name where all else is frozen

    def tap(self, names: Iterable[str]) -> None:
        """Let `outputs` give the outputs of these modules of the network, by dotted name, as features.

        Raises:
            UserError: there is no such module; the known ones are listed.
        """
        new = dict.fromkeys(name for name in names if name not in self._tapped)
        tap(self.network, new, self._features, self.recipe["model"])
        self._tapped.update(new)

    def freeze_backbone(self, head: str | None = None) -> None:
        """Let the head alone, by default the last layer, be trained: all else keeps its weights and statistics."""
        self.head = head or torchvision_nets.head_name(self.network)
        freeze_all_but(self.network, self.head)

    def outputs(self, inputs: dict[str, Tensor], keys: Tensor | None = None) -> Outputs:
        """Logits and tapped features for the columns of a `Batch`; with `keys` (int64 (B,)) dropout draws a function of
        them.

        A column `backbone.features` (B, D) is what a frozen backbone gives, which the head alone turns into logits.
        """
        if (features := inputs.get(BACKBONE)) is not None:
            return Outputs(self.network.get_submodule(self.head)(features))
        images = inputs["image"]
        for dropout in self._dropouts:
            dropout.keys = keys
        self._features.clear()
        prepared = self.preprocess(images)
        if self._any_order and (images.device.type == "cpu" or torch.is_autocast_enabled(images.device.type)):
            # Convolutions follow their input's order in memory; this one is faster on CPUs and in half precision.
            prepared = prepared.contiguous(memory_format=torch.channels_last)
        logits, features = self.network(prepared), dict(self._features)
        self._features.clear()
        return Outputs(logits, features)

    def logits(self, inputs: dict[str, Tensor]) -> Tensor:
        """Logits (B, K) for the columns of a `Batch`."""
        return self.outputs(inputs).logits

    def forward(self, images: Tensor) -> Tensor:
        return self.logits({"image": images})

    @torch.inference_mode()
    def predict(self, images: Sequence, top: int = 1) -> list[list[tuple[str, float]]]:
        """Class names and probabilities of images, best first.

        Args:
            images: files, PIL images, arrays (H, W) or (H, W, C), of any sizes; for arrays that are not uint8 see
                `kd.data.decode.eight_bits`.

        Returns:
            For each image a list of `top` pairs (class name, probability).
        """
        from kd.data.decode import read_image

        if isinstance(images, str | Path):
            raise TypeError("predict takes a list of images; put a single one in brackets")
        view, device = self.preprocess.view, self.preprocess.scale.device
        was_training, results = self.training, []
        self.eval()
        for image in images:
            pixels = torch.from_numpy(np.array(read_image(image, view.channels, view.source_size), order="C"))
            probabilities = self(pixels[None].to(device)).softmax(1)[0]
            best = probabilities.topk(min(top, len(self.classes)))
            results.append([(self.classes[i], p) for i, p in zip(*(part.tolist() for part in best[::-1]), strict=True)])
        self.train(was_training)
        return results

    def twin(self) -> Classifier:
        """The same classifier with random weights, without taps, to be filled with weights."""
        with torch.random.fork_rng(devices=[]):
            network = build_network(self.recipe["model"], len(self.classes), self.recipe["model_args"], trust=True)
        twin = Classifier(network, self.preprocess.view, self.classes, self.recipe)
        twin.head = self.head
        return twin

    def folded(self) -> Classifier:
        """The same classifier in eval mode, for one that is frozen: see `kd.models.fold`. It has the taps there are by
        now, and shares them."""
        twin = copy.copy(self)
        twin._modules = {**self._modules, "network": folded(self.network)}
        return twin.eval()

    def files(self) -> dict[str, bytes]:
        """The content of `model.safetensors` and `config.json`, from which `load_classifier` rebuilds it."""
        weights = safetensors.torch.save(savable(self.network.state_dict()), metadata={"format": "pt"})
        config = {
            **self.recipe,
            "num_classes": len(self.classes),
            "classes": self.classes,
            "preprocess": self.preprocess.view.to_dict(),
            "sha256": hashlib.sha256(weights).hexdigest(),
        }
        return {"model.safetensors": weights, "config.json": (json.dumps(config, indent=2) + "\n").encode()}


def model_names() -> list[str]:
    """All known names: this project's networks and torchvision's."""
    return [*_OWN_NETS, *torchvision_nets.names()]


def build_network(name: str, num_classes: int, model_args: dict | None = None, trust: bool = False) -> nn.Module:
    """A network with random weights.

    Args:
        name: one of `model_names()`, or the import path of your own function or class taking `num_classes`.
        num_classes, model_args: K, and further keyword arguments of the network.
        trust: whether an import path, here or in the arguments, may be run: it came from the user, not from a file.

    Raises:
        UserError: the name or an argument is unknown, or names code that is not trusted.
    """
    arguments = dict(model_args or {})
    if _of_torchvision(name):
        return torchvision_nets.build_torchvision(name, num_classes, **arguments)
    ours = {**_OWN_NETS, **_MADE_BY_SCRIPTS}
    given = {"num_classes": num_classes, **({"trust": trust} if name in _MADE_BY_SCRIPTS else {})}
    if name not in ours and "." not in name:
        raise unknown("model", name, model_names(), "or the import path of your own, as my_package.MyNet")
    builder = ours.get(name) or import_builder(name, trust)
    parameters = inspect.signature(builder).parameters
    if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        for key in arguments:
            if key not in parameters or key in given:
                raise unknown(f"argument of {name}", key, [p for p in parameters if p not in given])
    try:
        with blamed(f"cannot build {name}"):
            network = builder(**given, **arguments)
    except UserError:
        raise
    except Exception as error:  # of any kind, by what the arguments are
        raise UserError(f"cannot build {name}: {described(error)}") from None
    return network if name in ours else accept(network, name)


def _of_torchvision(name: str) -> bool:
    """Whether torchvision builds it; torchvision, which takes a second to import, is only looked at where it may."""
    ours = name in _OWN_NETS or name in _MADE_BY_SCRIPTS or "." in name
    return not ours and name in torchvision_nets.names()


def bare(name: str) -> str:
    """A network's name without its source: `torchvision:resnet18` is `resnet18`; any other is itself.

    Raises:
        UserError: the source or its network is unknown.
    """
    source, colon, rest = name.partition(":")
    if not colon:
        return name
    if source != "torchvision":
        raise unknown("source of networks", source, ["torchvision"], "or a name or an import path without one")
    if rest not in torchvision_nets.names():
        raise unknown("torchvision classifier", rest, torchvision_nets.names())
    return rest


def build_classifier(
    name: str,
    classes: Sequence[str],
    view: View,
    model_args: dict | None = None,
    weights: str | None = None,
    freeze_backbone: bool = False,
) -> Classifier:
    """A network with its first weights, its head sized for the classes, its backbone frozen with `freeze_backbone`.

    Args:
        name: as `build_network` takes it; the user's own word, so an import path is run.
        weights: None for random ones, `imagenet` or the name of a torchvision entry, or a file (.safetensors, or .pth
            holding a state dict). The head is replaced unless the file's has exactly as many classes.
        freeze_backbone: train the head only; all else keeps its weights and its batch statistics.

    Raises:
        UserError: unknown name or argument, weights that are missing, damaged or do not fit.
    """
    name = bare(name)
    if weights is not None:
        network, head = _with_weights(name, read_weights(name, weights), len(classes), model_args, weights)
    elif freeze_backbone:
        raise UserError(f"freeze_backbone would freeze the random weights of {name}; give weights or init_from too")
    else:
        network, head = build_network(name, len(classes), model_args, trust=True), None
    classifier = Classifier(network, view, classes, {"model": name, "model_args": dict(model_args or {})})
    if freeze_backbone:
        classifier.freeze_backbone(head)
    return classifier


def read_weights(name: str, weights: str) -> dict[str, Tensor]:
    """A state dict, by what `build_classifier` takes as weights; without the prefixes of wrappers.

    A training checkpoint's is its `state_dict_ema`, `state_dict` or `model`, the first that is there.

    Raises:
        UserError: there is none, it is damaged, or holds more than tensors.
    """
    path, remedy = Path(weights), "save network.state_dict() alone"
    if path.suffix not in (".safetensors", ".pth", ".pt", ".bin") and _of_torchvision(name):
        return torchvision_nets.download_weights(torchvision_nets.pretrained(name, weights))
    if not path.is_file():
        raise UserError(f"weights {weights!r}: there is no such file; give a .safetensors or .pth file")
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)  # a full pickle could run code
    except pickle.UnpicklingError:
        raise UserError(
            f"weights {weights!r} cannot be read: damaged, or with objects in it that could run code, which are not "
            f"loaded; {remedy}"
        ) from None
    except Exception as error:  # many kinds, by format and by damage; all mean the same to the user
        raise UserError(f"weights {weights!r} cannot be read: {' '.join(str(error).split())[:200]}") from None
    if isinstance(state, dict):
        held = [key for key in ("state_dict_ema", "state_dict", "model") if isinstance(state.get(key), dict)]
        state = state[held[0]] if held else state
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        held = ", ".join(map(str, list(state)[:5])) if isinstance(state, dict) else type(state).__name__
        raise UserError(f"weights {weights!r} hold no state dict of tensors but {held}; {remedy}")
    for prefix in ("module.", "_orig_mod."):  # of DistributedDataParallel and torch.compile
        if state and all(key.startswith(prefix) for key in state):
            state = {key.removeprefix(prefix): tensor for key, tensor in state.items()}
    return state


def _with_weights(name, state, num_classes, model_args, weights) -> tuple[nn.Module, str]:
    """The network with a state dict in it, and the name of its head."""
    with torch.random.fork_rng(devices=[]):  # the head's first weights must not depend on how the rest was filled
        network = build_network(name, num_classes, model_args, trust=True)
        head = torchvision_nets.head_name(network)
        rows = state[f"{head}.weight"].shape[0] if f"{head}.weight" in state else num_classes
        if rows != num_classes:
            network = build_network(name, rows, model_args, trust=True)
    fill(network, state, name, weights)
    if rows != num_classes:
        torchvision_nets.replace_head(network, num_classes)
    return network, head


def fill(network: nn.Module, state: dict[str, Tensor], name: str, weights: str) -> None:
    """Load a state dict, whole and in float32; raises a UserError where it does not fit."""
    state = {key: tensor.float() if tensor.is_floating_point() else tensor for key, tensor in state.items()}
    try:
        network.load_state_dict(state)
    except RuntimeError as error:
        reason = re.sub(r"\s+", " ", str(error))[:300]
        raise UserError(f"weights {weights!r} do not fit {name}: {reason}") from None


def view_of(run: str | Path) -> View:
    """How the network of a finished run prepares images.

    Raises:
        UserError: there is no such run, or its config.json is damaged.
    """
    try:
        return View(**_config_of(Path(run))["preprocess"])
    except (ValueError, TypeError) as error:
        raise UserError(f"run {str(run)!r} is damaged: config.json: {str(error)[:200]}") from None


def _config_of(folder: Path, *needed: str) -> dict:
    """A run's config.json, where that and the other files are there."""
    if not folder.is_dir():
        raise UserError(f"run {str(folder)!r}: there is no such folder; train it first, or correct the path")
    if not all((folder / name).is_file() for name in ("config.json", *needed)):
        known = (folder / "config.yaml").is_file()
        what = "is not finished; run its command again to resume it" if known else "is no run folder (no config.json)"
        raise UserError(f"run {str(folder)!r} {what}")
    return read_network(folder)


def load_classifier(run: str | Path, device: str | torch.device = "cpu", trust: bool = False) -> Classifier:
    """The network of a finished run, in eval mode; see `kd.load`."""
    folder = Path(run)
    config = _config_of(folder, "model.safetensors")
    try:
        weights = (folder / "model.safetensors").read_bytes()
        if hashlib.sha256(weights).hexdigest() != config["sha256"]:
            raise ValueError("model.safetensors does not have the checksum that config.json states")
        state = safetensors.torch.load(weights)
        view, classes = View(**config["preprocess"]), config["classes"]
        recipe = {"model": config["model"], "model_args": config["model_args"]}
        with torch.random.fork_rng(devices=[]):
            network = build_network(recipe["model"], len(classes), recipe["model_args"], trust)
        network.load_state_dict(state)
    except (ValueError, KeyError, TypeError, OSError, RuntimeError, safetensors.SafetensorError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"run {str(run)!r} is damaged: {reason}; train it again with --overwrite true") from None
    except UserError as error:
        raise UserError(f"run {str(run)!r}: {error}") from None
    return Classifier(network, view, classes, recipe).eval().to(device)
