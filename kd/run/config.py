"""The scripts' configuration: dataclasses whose fields are the recipes' keys and the flags."""

from __future__ import annotations

import math
import os
import re
from dataclasses import dataclass, field
from typing import Any, Literal

from jsonargparse.typing import (
    ClosedUnitInterval,
    NonNegativeInt,
    OpenUnitInterval,
    PositiveInt,
    restricted_number_type,
)

from kd.losses import Loss, Term
from kd.students import Learner

# What a number may be is its field's type: jsonargparse refuses all else, and `kd.run.parse` says so in words.
Finite = restricted_number_type("Finite", float, [(">", -math.inf), ("<", math.inf)])
Amount = restricted_number_type("Amount", float, [(">=", 0), ("<", math.inf)])
Positive = restricted_number_type("Positive", float, [(">", 0), ("<", math.inf)])
BelowOne = restricted_number_type("BelowOne", float, [(">=", 0), ("<", 1)])
Seed = restricted_number_type("Seed", int, [(">=", 0), ("<", 2**63)])  # torch takes no larger one
Pixels = restricted_number_type("Pixels", int, [(">=", 1), ("<=", 8192)])
UpTo1024 = restricted_number_type("UpTo1024", int, [(">=", 0), ("<=", 1024)])
Threads = restricted_number_type("Threads", int, [(">=", 1), ("<=", 1024)])
Seconds = restricted_number_type("Seconds", int, [(">=", 1), ("<=", 10**7)])

# Fields that do not change what a run computes: a run resumes when only these differ.
FREE_FIELDS = (
    *("output_dir", "overwrite", "trust_code", "report_to", "project", "group", "tags", "notes", "log_media"),
    *("checkpoint_every", "keep_checkpoints", "num_threads", "peer_timeout"),
    *("data.cache_dir", "data.download_dir", "data.store", "data.num_workers", "data.device_share"),
)

# Those that say where a run ends: with a later end it resumes, also when it is finished, see `kd.run.extend`.
ENDS = ("epochs", "max_time", "patience")
_DURATION = re.compile(r"(\d+(?:\.\d+)?)([smhd])")
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def seconds_of(max_time: str | None) -> float:
    """The seconds of a `max_time` such as `45m`; infinite for None.

    Raises:
        ValueError: it is none, or no time at all.
    """
    if max_time is None:
        return math.inf
    match = _DURATION.fullmatch(max_time)
    if not match or not float(match[1]):
        raise ValueError(f"max_time {max_time!r} must be a number and its unit (s, m, h or d), such as 45m or 1.5h")
    return float(match[1]) * _SECONDS[match[2]]


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


@dataclass
class DataConfig:
    """Images and what is done to them."""

    source: str = "digits"
    """digits, mnist, cifar10, cifar100, stl10; hub:owner/name; a folder of images or of Parquet files"""
    batch_size: PositiveInt = 64
    """images per step, over all processes together"""
    num_train: PositiveInt | None = None
    """train on a class-balanced subset of this many images"""
    num_labels: PositiveInt | None = None
    """train on the labels of a class-balanced subset of this many training images only: the others are shown without
    one, and losses that read labels leave them out"""
    val_fraction: BelowOne = 0.1
    """share of train set aside for validation, unless the source has a validation split; 0 for none"""
    test_fraction: OpenUnitInterval = 0.2
    """share of train set aside as test where the source has no test split"""
    split_seed: Seed = 0
    """seed of the validation split and the subset; the same for a teacher and its students"""
    resize: Pixels | None = None
    """pixels of the shorter side after an antialiased bilinear resize"""
    crop: Pixels | None = None
    """side of the centre crop in pixels"""
    flip: bool = False
    """flip training images left-right, half of them"""
    pad_crop: UpTo1024 = 0
    """pad training images by this many pixels and crop them back at a random place"""
    random_resized_crop: ClosedUnitInterval = 0.0
    """the least share of the area of a training image that a crop at a random place, of a random shape, may have before
    it is enlarged to the image's size, such as 0.08; 0 for none"""
    color_jitter: list[Amount] = field(default_factory=list)
    """by how much brightness, contrast, saturation and hue of training images vary, such as [0.4, 0.4, 0.4, 0.1]"""
    trivial_augment: bool = False
    """TrivialAugment: one random change of shape or colour a training image, of random strength"""
    rand_augment: str | None = None
    """RandAugment as timm writes it, such as rand-m9-mstd0.5-inc1: m for strength (0 to 10), n for operations per image
    (2), mstd for the strength's spread (above 100: uniform up to m), inc1 for operations that all grow with strength"""
    random_erasing: ClosedUnitInterval = 0.0
    """share of training images in which a random rectangle is filled with data.mean"""
    mixup: Amount = 0.0
    """alpha of mixup, which blends a training image and its label with another's; 0 for none"""
    cutmix: Amount = 0.0
    """alpha of CutMix, which puts a rectangle of another image into a training image; with mixup, each for half"""
    views_per_image: NonNegativeInt = 0
    """so many random views per image, shown in turn and the same for all seeds, so that what is frozen is computed once
    for each; 0 for new ones at each epoch"""
    channels: Literal[3, 1] = 3
    """3 (grey images are repeated) or 1 (luminance)"""
    mean: list[Finite] = field(default_factory=lambda: [0.485, 0.456, 0.406])
    """subtracted from each channel, on the scale 0 to 1; the default is ImageNet's"""
    std: list[Positive] = field(default_factory=lambda: [0.229, 0.224, 0.225])
    """each channel is divided by it; the default is ImageNet's"""
    store_size: Pixels | None = None
    """pixels of the shorter side that images of several sizes, or much larger ones, are stored with; null for the
    largest that a network of the run takes"""
    store_channels: Literal[3, 1] | None = None
    """channels that are stored; null for as many as a network of the run takes"""
    skip_unreadable: bool = False
    """leave out images that cannot be decoded instead of stopping"""
    image_column: str | None = None
    """column of images in Parquet and Hub data; found by its type if it is the only one"""
    label_column: str | None = None
    """column of labels, likewise"""
    store: Literal["auto", "disk", "stream"] = "auto"
    """disk decodes all images once and keeps them there; stream decodes them at each step, ahead of it; auto streams if
    the decoded images would take more than half of the free disk"""
    num_workers: UpTo1024 | None = None
    """processes that decode what is streamed, for each training process; 0 for none beside it; null for its share of
    the cores"""
    device_share: ClosedUnitInterval = 0.4
    """on a GPU, images are kept in its memory if they take at most this share of what is free there; 0 for never"""
    cache_dir: str | None = None
    """where decoded images are kept, and sets of the Hub; default $KD_CACHE or ~/.cache/kd, for sets of the Hub the
    Hugging Face caches (HF_HOME)"""
    download_dir: str | None = None
    """where named sets are downloaded to; default CACHE_DIR/downloads"""

    def __post_init__(self):
        for name in ("mean", "std"):
            values = getattr(self, name) * (self.channels if len(getattr(self, name)) == 1 else 1)
            setattr(self, name, values)
            right = len(values) == self.channels
            _require(right, f"data.{name} {values} must have one number or data.channels ({self.channels})")
        for name in ("source", "cache_dir", "download_dir"):
            path, more = getattr(self, name), " or a known set" if name == "source" else ""
            _require(path != "", f"data.{name} is empty; name a folder{more}")
            known = path is None or not os.path.expanduser(path).startswith("~")
            _require(known, f"data.{name} {path!r}: there is no user of this name here")
        shapes, colours = (self.flip, self.pad_crop, self.random_resized_crop), (self.color_jitter, self.random_erasing)
        some = any((*shapes, *colours, self.trivial_augment, self.rand_augment, self.mixup, self.cutmix))
        what = f"data.views_per_image {self.views_per_image}"
        _require(some or not self.views_per_image, f"{what}: no view is random; set data.flip or another, or 0")
        both = self.pad_crop and self.random_resized_crop
        _require(not both, "data.pad_crop and data.random_resized_crop both crop; set one of them to 0")
        _require(
            not (self.num_labels and (self.mixup or self.cutmix)),
            f"data.num_labels {self.num_labels} leaves images without a label, which data.mixup and data.cutmix would "
            "blend with others'; leave out the one or the others",
        )
        if self.rand_augment is not None:
            from kd.data.views.rand import RandAugment  # few need it

            RandAugment.of(self.rand_augment)
        _require(
            not (self.trivial_augment and self.rand_augment),
            "data.trivial_augment and data.rand_augment are two ways to do one thing; leave one of them out",
        )
        jitter = self.color_jitter
        _require(
            len(jitter) in (0, 4) and max([0, *jitter[3:]]) <= 0.5,
            f"data.color_jitter {jitter} must have four numbers (brightness, contrast, saturation, hue; the "
            "last up to 0.5), or none",
        )
        fits = not (self.crop and self.resize) or self.crop <= self.resize
        _require(fits, f"data.crop {self.crop} is larger than data.resize {self.resize}")


@dataclass
class OptimizerConfig:
    """The optimizer and its learning rate's course."""

    name: str = "adam"
    """sgd, adam, adamw, or the import path of another, such as torch.optim.RMSprop"""
    args: dict[str, Any] = field(default_factory=dict)
    """further keyword arguments of the optimizer, such as {betas: [0.9, 0.95]}"""
    lr: Positive = 1e-3
    """learning rate; does not depend on the number of processes"""
    momentum: BelowOne = 0.9
    """of sgd"""
    nesterov: bool = False
    """Nesterov's momentum, of sgd"""
    weight_decay: Amount = 0.0
    """L2 penalty (decoupled in adamw)"""
    decay_norms_and_biases: bool = True
    """false: no weight decay for parameters of one dimension, which are the scales of norms and the biases"""
    clip_norm: Positive | None = None
    """clip the gradient's norm over all parameters to this"""
    schedule: Literal["constant", "cosine", "multistep"] = "constant"
    """course of the learning rate after warm-up; cosine falls to min_lr"""
    min_lr: Amount = 0.0
    """where cosine ends"""
    warmup_steps: NonNegativeInt = 0
    """steps over which the learning rate rises linearly from 0"""
    warmup_epochs: Amount = 0.0
    """the same in epochs, instead of warmup_steps; may be a part of one"""
    milestones: list[PositiveInt] = field(default_factory=list)
    """epochs after which multistep multiplies the learning rate by gamma"""
    gamma: Positive = 0.1
    """factor of multistep"""

    def __post_init__(self):
        _require(not self.nesterov or self.momentum > 0, "optimizer.nesterov needs optimizer.momentum above 0")
        _require(
            self.name in ("sgd", "adam", "adamw") or "." in self.name,
            f"optimizer.name {self.name!r} must be sgd, adam, adamw or an import path, such as torch.optim.RMSprop",
        )
        fields = ("lr", "weight_decay", *(("momentum", "nesterov") if self.name == "sgd" else ()))
        for name in fields:
            _require(name not in self.args, f"optimizer.args: {name} has a field of its own; set optimizer.{name}")
        _require(
            not (self.warmup_steps and self.warmup_epochs),
            "optimizer.warmup_steps and optimizer.warmup_epochs are one thing; leave one of them out",
        )
        _require(
            not self.min_lr or (self.schedule == "cosine" and self.min_lr <= self.lr),
            f"optimizer.min_lr {self.min_lr:g} is where cosine ends: it needs optimizer.schedule cosine and an "
            f"optimizer.lr ({self.lr:g}) that is not below it",
        )


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
    learner: Learner | None = None
    """what is trained around the network: class_path (a name below, or the import path of your own) and init_args; null
    for the network alone"""
    precompute: Literal["auto", "always", "never"] = "auto"
    """auto computes what is frozen (a teacher, a backbone) once for each view of an image, and keeps that for later
    runs, where views repeat within the epochs and the disk has room; always does so even if they hardly repeat; never
    computes it at each step"""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    epochs: PositiveInt = 10
    """passes over the training images"""
    max_steps: PositiveInt | None = None
    """stop after this many steps, if that is earlier"""
    max_time: str | None = None
    """stop when training, over all starts, has taken so long: a number and its unit (s, m, h, d), such as 45m or 1.5h;
    the run is then measured and written, and with a larger max_time the same command resumes it"""
    patience: NonNegativeInt = 0
    """early stopping: stop after so many epochs in which no network that is kept had a better validation accuracy than
    before; 0 for never. select best takes the best epoch's weights"""
    seed: Seed = 0
    """of first weights, order, views and dropout"""
    output_dir: str = ""
    """the run folder; $NAME in it is the environment's, $$ is a dollar"""
    select: Literal["last", "best"] = "last"
    """which weights become model.safetensors: the last epoch's, or the best on validation"""
    report_to: Literal["auto", "wandb", "tensorboard", "trackio", "none"] = "auto"
    """tracker; auto is wandb where a key is found or WANDB_MODE=offline is set, else none"""
    project: str = "kd"
    """the tracker's project"""
    group: str | None = None
    """the tracker's group: a teacher and its students; null for the name of the folder that output_dir is in"""
    tags: list[str] = field(default_factory=list)
    """the tracker's tags, besides data, network and losses"""
    notes: str | None = None
    """the tracker's notes; null for the objective in words"""
    log_media: bool = True
    """give the tracker, at the end, a confusion matrix, the hardest test images and, W&B, the network as an artifact"""
    accumulate: PositiveInt = 1
    """micro-batches per step: each process's images of a step go through the networks in so many parts, to save memory;
    changes neither batch nor learning rate, but batch norm sees one part at a time"""
    sync_batch_norm: bool = False
    """batch norm over the images of all processes (GPUs only); false: each over its own, the first's are kept"""
    mixed_precision: Literal["auto", "no", "bf16", "fp16"] = "auto"
    """auto is what `accelerate launch` was given, else bf16 on a GPU that has it, else no"""
    compile: Literal["auto"] | bool = "auto"
    """compile student and losses into one step, which changes rounding; auto does not: CPUs were no faster for it, GPUs
    were not measured (docs/step.md)"""
    log_every: PositiveInt = 50
    """steps between two lines of metrics.jsonl"""
    checkpoint_every: PositiveInt | None = None
    """steps between two checkpoints; null for one at the end of each epoch"""
    keep_checkpoints: NonNegativeInt = 1
    """how many of the newest checkpoints stay when the run has ended; until then two at least, lest one be damaged"""
    peer_timeout: Seconds = 600
    """seconds that a process waits for the others in a step before it takes them for dead"""
    num_threads: Threads | None = None
    """CPU threads of each process; null for all cores, shared by this machine's processes, or $OMP_NUM_THREADS"""
    overwrite: bool = False
    """delete what an earlier run left in output_dir and start from the beginning"""
    trust_code: bool = False
    """run the code of a network that a teacher's or init_from's config.json names by import path; true only if it is
    yours"""
    deterministic: bool = False
    """use only deterministic algorithms on a GPU (slower there; a CPU always does)"""

    def __post_init__(self):
        most = self.data.batch_size
        _require(self.accumulate <= most, f"accumulate {self.accumulate} must be from 1 to data.batch_size ({most})")
        for loss in (term.loss if isinstance(term, Term) else term for term in self.losses):
            name, whole = type(loss).__name__, "_modules" in vars(loss) and hasattr(loss, "weight")
            _require(whole, f"losses: __init__ of {name} does not call super().__init__(weight)")
            _require(type(loss).forward is not Loss.forward, f"losses: {name} has no forward")
        whole = self.learner is None or "_modules" in vars(self.learner)
        _require(whole, f"learner: __init__ of {type(self.learner).__name__} does not call super().__init__()")
        whole = ", ".join(loss.name for loss in self.losses if loss.sees_batch)
        _require(
            self.accumulate == 1 or not whole,
            f"accumulate {self.accumulate}: {whole} compares the images of a whole batch and would see a part of it; "
            "set accumulate 1, or leave it out",
        )
        hard = ", ".join(loss.name for loss in self.losses if loss.hard_labels)
        mixing = " and ".join(f"data.{name}" for name in ("mixup", "cutmix") if getattr(self.data, name))
        _require(
            not (mixing and hard),
            f"{mixing} gives images labels of two classes, and {hard} needs one class per image; set it to 0, or leave "
            "out the loss",
        )
        related = ", ".join(loss.name for loss in self.losses if loss.sees_batch and loss.hard_labels)
        _require(
            not (self.data.num_labels and related),
            f"data.num_labels {self.data.num_labels} leaves images without a label, and {related} relates all of a "
            "batch by theirs; leave out the one or the other",
        )
        _require(self.output_dir != "", "output_dir is empty; name a folder")
        _require(not (self.init_from and self.weights), "give init_from or weights, not both")
        validates = self.data.val_fraction > 0
        _require(self.select == "last" or validates, "select best needs data.val_fraction above 0")
        _require(not self.patience or validates, f"patience {self.patience} needs data.val_fraction above 0")
        seconds_of(self.max_time)

    def _compare_with_teacher(self) -> str:
        """Names of the losses that take an output of a teacher outside the learner."""
        terms = map(Term.of, self.losses)
        return ", ".join(term.name for term in terms if term.needs_teacher and term.teacher == "teacher")


@dataclass
class _Trained:
    """What `train_teacher.py` alone takes; bases that stand last come first in help and recipes."""

    model: str = "resnet18"
    """a network such as light_nn or resnet8, or an import path; python -m kd.models lists ours and torchvision's"""


@dataclass
class TeacherConfig(TrainConfig, _Trained):
    """Train one network on labels: a teacher, or a student alone."""

    output_dir: str = "runs/teacher"

    def __post_init__(self):
        super().__post_init__()
        comparing = self._compare_with_teacher()
        _require(not comparing, f"losses: {comparing} needs a teacher; use distill.py --teacher RUN")


@dataclass
class _Distilled:
    """What `distill.py` alone takes."""

    student: str = "mobilenet_v3_small"
    """a network such as light_nn or resnet8, or an import path; python -m kd.models lists ours and torchvision's"""
    teacher: str | list[str] = ""
    """run folder of the teacher, or a torchvision classifier with its ImageNet weights; a list for several"""
    teacher_mean: Literal["logits", "probabilities"] = "logits"
    """how several teachers become one: the mean of logits (geometric) or of probabilities (arithmetic)"""


@dataclass
class DistillConfig(TrainConfig, _Distilled):
    """Train a student on what teachers give, on labels, or on what it gives itself."""

    output_dir: str = "runs/student"

    def __post_init__(self):
        super().__post_init__()
        comparing = self._compare_with_teacher()
        _require(
            not comparing or bool(self.teacher),
            f"teacher is not given, and {comparing} compares with one; name a run folder (or several) or a torchvision "
            "classifier, or join outputs of the learner by a Term",
        )


@dataclass
class EvaluateConfig:
    """Measure and compare finished runs."""

    split: Literal["test", "val", "train"] = "test"
    """which images, of the split that the run itself was trained with"""
    source: str | None = None
    """other images than the run's own data.source, by class name; no temperature is then fitted on validation"""
    batch_size: PositiveInt = 64
    """images at once"""
    corruption: Literal["gaussian_noise", "blur", "jpeg", "brightness", "contrast", "all"] | None = None
    """measure on corrupted images; all adds a table of the accuracy for each corruption and severity"""
    severity: Literal[1, 2, 3, 4, 5] | None = None
    """of the corruption, 1 to 5"""
    baseline: str | None = None
    """one of the runs, which the others are compared with; null for each distilled run's student alone"""
    taps: list[str] = field(default_factory=list)
    """STUDENT_MODULE:TEACHER_MODULE whose similarity (CKA) is measured, besides what a run's own losses compare"""
    format: Literal["table", "markdown", "json", "csv"] = "table"
    """of what is printed; json has all numbers"""
    json: str | None = None
    """write all numbers to this file"""
    report: str | None = None
    """write tables and pictures to this folder"""
    latency: bool = True
    """measure times on this machine, for batches of 1, 8 and 64 images"""
    cache_dir: str | None = None
    """where decoded images are kept; default $KD_CACHE or ~/.cache/kd, whatever the run says"""
    download_dir: str | None = None
    """where named sets are; default CACHE_DIR/downloads, whatever the run says"""
    trust_code: bool = False
    """run the code of networks that config.json of a run or of its teacher names by import path; true only if it is
    yours"""

    def __post_init__(self):
        single = self.corruption not in (None, "all")
        _require(not single or self.severity is not None, f"corruption {self.corruption} needs a severity from 1 to 5")
        why = "all measures every severity" if self.corruption else "give one, such as --corruption blur"
        _require(single or self.severity is None, f"severity {self.severity} needs one corruption; {why}")
        for pair in self.taps:
            right = len(pair.split(":")) == 2 and all(pair.split(":"))
            _require(right, f"taps {pair!r} must be STUDENT_MODULE:TEACHER_MODULE, such as pool:pool")


@dataclass
class AdoptConfig(_Trained):
    """Make a finished run of a network that was trained elsewhere, and measure it."""

    model_args: dict[str, Any] = field(default_factory=dict)
    """keyword arguments of the network, such as {dropout: 0.0}"""
    weights: str = ""
    """its weights: a file (.safetensors, or .pth with a state dict alone or in a checkpoint), or a torchvision entry"""
    classes: str | None = None
    """file with the network's class names in its order, one per line; null for the data's, in their order"""
    data: DataConfig = field(default_factory=DataConfig)
    output_dir: str = "runs/adopted"
    """the run folder; $NAME in it is the environment's, $$ is a dollar"""
    num_threads: Threads | None = None
    """CPU threads; null for all cores, or $OMP_NUM_THREADS"""
    overwrite: bool = False
    """delete what an earlier run left in output_dir and start from the beginning"""

    def __post_init__(self):
        _require(self.weights != "", "weights is empty; name the file of the trained weights")
        _require(self.output_dir != "", "output_dir is empty; name a folder")


DEFAULT_LOSSES = {
    TeacherConfig: [{"class_path": "CrossEntropy"}],
    DistillConfig: [
        {"class_path": "KL", "init_args": {"temperature": 4.0, "weight": 0.9}},
        {"class_path": "CrossEntropy", "init_args": {"weight": 0.1}},
    ],
}
