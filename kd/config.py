"""The scripts' configuration: dataclasses, YAML recipes and flags (jsonargparse: default < recipe < flag)."""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import itertools
import math
import os
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml
from jsonargparse import ArgumentParser, set_parsing_settings

from kd.errors import UserError, unknown
from kd.losses import LOSSES, Loss

set_parsing_settings(docstring_parse_attribute_docstrings=True)

# Fields that do not change what a run computes: a run goes on when only these differ.
FREE_FIELDS = (
    "output_dir",
    "overwrite",
    "report_to",
    "project",
    "checkpoint_every",
    "data.cache_dir",
    "data.download_dir",
)


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


@dataclass
class DataConfig:
    """Images and what is done to them."""

    source: str = "digits"
    """digits, mnist, cifar10, cifar100, stl10; hub:owner/name; a folder of images or of Parquet files"""
    batch_size: int = 64
    """images a step, over all processes together"""
    num_train: int | None = None
    """train on a class-balanced subset of this many images"""
    val_fraction: float = 0.1
    """share of train set aside for validation, unless the source has a validation split; 0 for none"""
    test_fraction: float = 0.2
    """share of train set aside as test where the source has no test split"""
    split_seed: int = 0
    """seed of the validation split and the subset; the same for a teacher and its students"""
    resize: int | None = None
    """pixels of the shorter side after an antialiased bilinear resize"""
    crop: int | None = None
    """side of the centre crop in pixels"""
    flip: bool = False
    """flip training images left-right, half of them"""
    pad_crop: int = 0
    """pad training images by this many pixels and crop them back at a random place"""
    channels: Literal[3, 1] = 3
    """3 (grey images are repeated) or 1 (luminance)"""
    mean: list[float] = field(default_factory=lambda: [0.485, 0.456, 0.406])
    """subtracted from each channel, on the scale 0 to 1; the default is ImageNet's"""
    std: list[float] = field(default_factory=lambda: [0.229, 0.224, 0.225])
    """each channel is divided by it; the default is ImageNet's"""
    skip_unreadable: bool = False
    """leave out images that cannot be decoded instead of stopping"""
    image_column: str | None = None
    """column of images in Parquet and Hub data; found by its type if it is the only one"""
    label_column: str | None = None
    """column of labels, likewise"""
    cache_dir: str | None = None
    """where decoded images are kept; default $KD_CACHE or ~/.cache/kd"""
    download_dir: str | None = None
    """where named sets are downloaded to; default CACHE_DIR/downloads"""

    def __post_init__(self):
        for name in ("mean", "std"):
            if len(getattr(self, name)) == 1:
                setattr(self, name, getattr(self, name) * self.channels)
            _require(
                len(getattr(self, name)) == self.channels,
                f"data.{name} {getattr(self, name)} must have one number or data.channels ({self.channels})",
            )
        _require(self.batch_size >= 1, f"data.batch_size {self.batch_size} must be 1 or more")
        _require(0 <= self.val_fraction < 1, f"data.val_fraction {self.val_fraction} must be in [0, 1)")
        _require(0 < self.test_fraction < 1, f"data.test_fraction {self.test_fraction} must be in (0, 1)")
        _require(min(self.std) > 0, f"data.std {self.std} must be above 0")
        for name in ("num_train", "resize", "crop"):
            value = getattr(self, name)
            _require(value is None or value >= 1, f"data.{name} {value} must be 1 or more, or null")
        _require(self.pad_crop >= 0, f"data.pad_crop {self.pad_crop} must be 0 or more")
        _require(
            not (self.crop and self.resize) or self.crop <= self.resize,
            f"data.crop {self.crop} is larger than data.resize {self.resize}",
        )


@dataclass
class OptimizerConfig:
    """The optimizer and its learning rate's course."""

    name: Literal["sgd", "adam", "adamw"] = "adam"
    """torch's optimizer of that name"""
    lr: float = 1e-3
    """learning rate; does not depend on the number of processes"""
    momentum: float = 0.9
    """of sgd"""
    nesterov: bool = False
    """Nesterov's momentum, of sgd"""
    weight_decay: float = 0.0
    """L2 penalty (decoupled in adamw)"""
    clip_norm: float | None = None
    """clip the gradient's norm over all parameters to this"""
    schedule: Literal["constant", "cosine", "multistep"] = "constant"
    """course of the learning rate after warm-up; cosine falls to 0"""
    warmup_steps: int = 0
    """steps over which the learning rate rises linearly from 0"""
    milestones: list[int] = field(default_factory=list)
    """epochs after which multistep multiplies the learning rate by gamma"""
    gamma: float = 0.1
    """factor of multistep"""

    def __post_init__(self):
        _require(0 < self.lr < math.inf, f"optimizer.lr {self.lr} must be a finite number above 0")
        _require(0 <= self.momentum < 1, f"optimizer.momentum {self.momentum} must be in [0, 1)")
        _require(not self.nesterov or self.momentum > 0, "optimizer.nesterov needs optimizer.momentum above 0")
        _require(self.weight_decay >= 0, f"optimizer.weight_decay {self.weight_decay} must be 0 or more")
        _require(
            self.clip_norm is None or self.clip_norm > 0,
            f"optimizer.clip_norm {self.clip_norm} must be above 0 or null",
        )
        _require(self.warmup_steps >= 0, f"optimizer.warmup_steps {self.warmup_steps} must be 0 or more")


@dataclass
class TrainConfig:
    """What both training scripts take."""

    data: DataConfig = field(default_factory=DataConfig)
    model_args: dict[str, Any] = field(default_factory=dict)
    """keyword arguments of the trained network, such as {dropout: 0.0}"""
    weights: str | None = None
    """its first weights: `imagenet` or the name of a torchvision entry, or a file; null for random ones"""
    freeze_backbone: bool = False
    """train its head only; all else keeps its weights and batch statistics"""
    init_from: str | None = None
    """run folder whose network gives the first weights instead"""
    losses: list[Loss] = field(default_factory=list)
    """terms of the objective, summed: class_path (a name below, or the import path of your own) and init_args"""
    precompute: Literal["auto", "never"] = "auto"
    """auto asks what is frozen (a teacher, a backbone) once an image where views are fixed; never asks at each step"""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    epochs: int = 10
    """passes over the training images"""
    max_steps: int | None = None
    """stop after this many steps, if that is earlier"""
    seed: int = 0
    """of first weights, order, views and dropout"""
    output_dir: str = ""
    """the run folder"""
    select: Literal["last", "best"] = "last"
    """which weights become model.safetensors: the last epoch's, or the best on validation"""
    report_to: Literal["auto", "wandb", "tensorboard", "none"] = "auto"
    """tracker; auto is wandb where a key is found or WANDB_MODE=offline is set, else none"""
    project: str = "kd"
    """the tracker's project"""
    mixed_precision: Literal["auto", "no", "bf16", "fp16"] = "auto"
    """auto is what `accelerate launch` was told, else bf16 on a GPU that has it, else no"""
    log_every: int = 50
    """steps between two lines of metrics.jsonl"""
    checkpoint_every: int | None = None
    """steps between two checkpoints; null for one at the end of each epoch"""
    overwrite: bool = False
    """delete what an earlier run left in output_dir and start anew"""
    deterministic: bool = False
    """use only deterministic algorithms on a GPU (slower there; a CPU always does)"""

    def __post_init__(self):
        _require(self.epochs >= 1, f"epochs {self.epochs} must be 1 or more")
        _require(
            self.max_steps is None or self.max_steps >= 1, f"max_steps {self.max_steps} must be 1 or more, or null"
        )
        _require(self.log_every >= 1, f"log_every {self.log_every} must be 1 or more")
        _require(
            self.checkpoint_every is None or self.checkpoint_every >= 1,
            f"checkpoint_every {self.checkpoint_every} must be 1 or more, or null",
        )
        _require(self.output_dir != "", "output_dir is empty; name a folder")
        _require(not (self.init_from and self.weights), "give init_from or weights, not both")
        _require(self.select == "last" or self.data.val_fraction > 0, "select best needs data.val_fraction above 0")


@dataclass
class TeacherConfig(TrainConfig):
    """Train one network on labels: a teacher, or a student alone."""

    model: str = "resnet18"
    """deep_nn, light_nn, deeper_cnn, mnist_teacher, mnist_student, any torchvision classifier, or an import path"""
    output_dir: str = "runs/teacher"
    """the run folder"""


@dataclass
class DistillConfig(TrainConfig):
    """Train a student on what a teacher says and on labels."""

    student: str = "mobilenet_v3_small"
    """deep_nn, light_nn, deeper_cnn, mnist_teacher, mnist_student, any torchvision classifier, or an import path"""
    teacher: str | list[str] = ""
    """run folder of the teacher, or a torchvision classifier with its ImageNet weights; a list for several"""
    teacher_mean: Literal["logits", "probabilities"] = "logits"
    """how several teachers become one: the mean of logits (geometric) or of probabilities (arithmetic)"""
    output_dir: str = "runs/student"
    """the run folder"""

    def __post_init__(self):
        super().__post_init__()
        _require(bool(self.teacher), "teacher is not given; name a run folder (or several) or a torchvision classifier")


@dataclass
class EvaluateConfig:
    """Measure and compare finished runs."""

    split: Literal["test", "val", "train"] = "test"
    """which images, of the split that the run itself was trained with"""
    source: str | None = None
    """other images than the run's own data.source; classes are matched by name"""
    batch_size: int = 256
    """images at once"""
    json: str | None = None
    """write all numbers to this file"""
    report: str | None = None
    """write tables and pictures to this folder"""
    latency: bool = True
    """measure the time of one image on this machine"""
    cache_dir: str | None = None
    """where decoded images are kept; default $KD_CACHE or ~/.cache/kd"""

    def __post_init__(self):
        _require(self.batch_size >= 1, f"batch_size {self.batch_size} must be 1 or more")


DEFAULT_LOSSES = {
    TeacherConfig: [{"class_path": "CrossEntropy"}],
    DistillConfig: [
        {"class_path": "KL", "init_args": {"temperature": 4.0, "weight": 0.9}},
        {"class_path": "CrossEntropy", "init_args": {"weight": 0.1}},
    ],
}


class _Parser(ArgumentParser):
    """jsonargparse's parser whose errors are one line that names what is known."""

    def error(self, message, ex=None):
        raise UserError(_explain(self, str(message)))


def parse(config_class, argv: list[str] | None, positional: str | None = None):
    """A config from a recipe (`--config`) and flags, and its resolved form.

    Args:
        config_class: TeacherConfig, DistillConfig or EvaluateConfig.
        argv: the arguments; None for the command line's.
        positional: name of a list of positional arguments to take too.

    Returns:
        The config; its attribute `resolved` is the same as plain nested values, losses as class_path and init_args.

    Raises:
        UserError: unknown field, wrong type, impossible value.
    """
    if os.getcwd() not in sys.path:  # so that my_losses.MyLoss is found beside the recipe's command
        sys.path.append(os.getcwd())
    parser = _Parser(description=config_class.__doc__, allow_abbrev=False)
    if positional:
        parser.add_argument(positional, nargs="+", type=str, help="run folders")
    else:
        parser.add_argument("--config", action="config", help="YAML recipe; flags win over it")
    parser.add_class_arguments(config_class, nested_key=None)
    argv = _replace_losses(sys.argv[1:] if argv is None else list(argv))
    if config_class in DEFAULT_LOSSES and not _gives_losses(argv):
        parser.set_defaults({"losses": DEFAULT_LOSSES[config_class]})
    try:
        namespace = parser.parse_args(argv)
        values = parser.instantiate(namespace)
        chosen = {key: values[key] for key in [f.name for f in dataclasses.fields(config_class)]}
        config = config_class(**chosen)
    except (ValueError, TypeError, argparse.ArgumentError) as error:
        raise UserError(_explain(parser, str(error))) from None
    if positional:
        setattr(config, positional, values[positional])
    resolved = yaml.safe_load(parser.dump(namespace, skip_unset=False))
    config.resolved = {name: value for name, value in resolved.items() if name in chosen}
    if "overwrite" in chosen:
        config.resolved["overwrite"] = False  # or a run started again from its own config.yaml would delete itself
    return config


def _replace_losses(argv: list[str]) -> list[str]:
    """Put `--losses=[]` before a whole list of losses.

    jsonargparse keeps the arguments of a list's items where the new list has the same length and classes: a recipe's
    weight would stay in a list that does not mention it.
    """
    return [part for word in argv for part in (["--losses=[]", word] if word.split("=")[0] == "--losses" else [word])]


def _gives_losses(argv: list[str]) -> bool:
    """Whether a flag or a recipe gives a whole list of losses."""
    files = [b for a, b in itertools.pairwise(argv) if a == "--config"]
    files += [word.split("=", 1)[1] for word in argv if word.startswith("--config=")]
    recipes = [read_yaml(Path(file)) for file in files if Path(file).is_file()]
    return "--losses=[]" in argv or any("losses" in recipe for recipe in recipes)


def _explain(parser: ArgumentParser, message: str) -> str:
    """jsonargparse's message with the known names and the nearest one, in one line."""
    message = " ".join(message.split())
    flags = sorted({o[2:] for action in parser._actions for o in action.option_strings if o.startswith("--")})
    fields = [flag for flag in flags if "+" not in flag and ".help" not in flag and flag != "help"]
    if message.startswith("unrecognized arguments:"):
        words = message.partition(":")[2].split()
        bad = next((word for word in words if word.startswith("--")), None)
        if bad is None:
            return f"unexpected argument {words[0]!r}; flags are written --name value"
        return str(unknown("field", bad[2:].split("=")[0], fields))
    if "does not accept option" in message or "is not accepted" in message or "not accepted by" in message:
        quoted = message.split("'")[1::2]
        if message.startswith("Group "):
            return str(
                unknown("field", f"{quoted[0]}.{quoted[1]}", [f for f in fields if f.startswith(quoted[0] + ".")])
            )
        if "Problem with given class_path" in message:
            name = quoted[0].rpartition(".")[2]
            return str(unknown(f"argument of {name}", quoted[1], _arguments_of(quoted[0]), "see --losses.help " + name))
        return str(unknown("field", quoted[-1], fields))
    if message.startswith('Parser key "losses"') and "dot import path" in message:
        bad = message.rpartition(":")[2].strip()
        return str(unknown("loss", bad, LOSSES, "or the import path of your own, as my_package.MyLoss"))
    several = re.fullmatch(
        r'Parser key "([\w.]+)": Does not .* Subtypes: \[(.*?)\] Errors.* Given value: (.*)', message
    )
    if several:
        name, kinds, value = several.groups()
        kinds = " or ".join(kind.replace("NoneType", "null") for kind in re.findall(r"<class '(\w+)'>", kinds)) or kinds
        return f"{name}: {value!r} is of the wrong type; it takes {kinds}"
    wrong = re.fullmatch(r'Parser key "([\w.]+)": Expected a (.+)\. Got value: (.*)', message)
    if wrong:
        name, kind, value = wrong.groups()
        kind = re.sub(r"<class '(\w+)'>", r"\1", kind).replace("typing.Literal", "one of ")
        return f"{name}: {value!r} is of the wrong type; it takes {kind}"
    return re.sub(r'^Parser key "([\w.]+)":', r"\1:", message)


def _arguments_of(class_path: str) -> list[str]:
    for loss in _subclasses(Loss):
        if f"{loss.__module__}.{loss.__name__}" == class_path or loss.__name__ == class_path:
            return list(inspect.signature(loss).parameters)
    return []


def _subclasses(cls) -> list[type]:
    return [sub for direct in cls.__subclasses__() for sub in (direct, *_subclasses(direct))]


def differing_fields(old: dict, new: dict) -> list[str]:
    """The fields, dotted, in which two resolved configs differ, those that do not change the result left out."""

    def flat(value, prefix=""):
        if isinstance(value, dict) and value:
            for key, inner in value.items():
                yield from flat(inner, f"{prefix}.{key}" if prefix else key)
        else:
            yield prefix, value

    a, b = dict(flat(old)), dict(flat(new))
    names = [name for name in sorted({*a, *b}) if name not in FREE_FIELDS and a.get(name) != b.get(name)]
    return [f"{name} ({a.get(name)!r} there, {b.get(name)!r} here)" for name in names]


def read_yaml(path: Path) -> dict:
    """A YAML file's fields.

    Raises:
        UserError: it cannot be read, or holds something else.
    """
    try:
        content = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{path} cannot be read: {' '.join(str(error).split())[:200]}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} is damaged or no config: it holds no fields but {str(content)[:60]!r}")
    return content
