"""The scripts' configuration: dataclasses whose fields are the recipes' keys and the flags."""

from __future__ import annotations

import math
import os
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
    "output_dir",
    "overwrite",
    "trust_code",
    "report_to",
    "project",
    "group",
    "tags",
    "notes",
    "log_media",
    "checkpoint_every",
    "keep_checkpoints",
    "num_threads",
    "peer_timeout",
    "data.cache_dir",
    "data.download_dir",
    "data.store",
    "data.num_workers",
    "data.device_share",
)


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
        for name in ("source", "cache_dir", "download_dir"):
            path = getattr(self, name)
            _require(
                path != "", f"data.{name} is empty; name a folder" + (" or a known set" if name == "source" else "")
            )
            known = path is None or not os.path.expanduser(path).startswith("~")
            _require(known, f"data.{name} {path!r}: there is no user of this name here")
        random = ("flip", "pad_crop", "random_resized_crop", "color_jitter", "trivial_augment", "random_erasing")
        _require(
            not self.views_per_image or any(getattr(self, name) for name in (*random, "mixup", "cutmix")),
            f"data.views_per_image {self.views_per_image}: no random view is asked for; set data.flip or another, or 0",
        )
        _require(
            not (self.pad_crop and self.random_resized_crop),
            "data.pad_crop and data.random_resized_crop both crop; set one of them to 0",
        )
        jitter = self.color_jitter
        _require(
            len(jitter) in (0, 4) and max([0, *jitter[3:]]) <= 0.5,
            f"data.color_jitter {jitter} must have four numbers (brightness, contrast, saturation, hue; the "
            "last up to 0.5), or none",
        )
        _require(
            not (self.crop and self.resize) or self.crop <= self.resize,
            f"data.crop {self.crop} is larger than data.resize {self.resize}",
        )


@dataclass
class OptimizerConfig:
    """The optimizer and its learning rate's course."""

    name: Literal["sgd", "adam", "adamw"] = "adam"
    """torch's optimizer of that name"""
    lr: Positive = 1e-3
    """learning rate; does not depend on the number of processes"""
    momentum: BelowOne = 0.9
    """of sgd"""
    nesterov: bool = False
    """Nesterov's momentum, of sgd"""
    weight_decay: Amount = 0.0
    """L2 penalty (decoupled in adamw)"""
    clip_norm: Positive | None = None
    """clip the gradient's norm over all parameters to this"""
    schedule: Literal["constant", "cosine", "multistep"] = "constant"
    """course of the learning rate after warm-up; cosine falls to 0"""
    warmup_steps: NonNegativeInt = 0
    """steps over which the learning rate rises linearly from 0"""
    milestones: list[PositiveInt] = field(default_factory=list)
    """epochs after which multistep multiplies the learning rate by gamma"""
    gamma: Positive = 0.1
    """factor of multistep"""

    def __post_init__(self):
        _require(not self.nesterov or self.momentum > 0, "optimizer.nesterov needs optimizer.momentum above 0")


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
    """auto is what `accelerate launch` was told, else bf16 on a GPU that has it, else no"""
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
        _require(
            self.accumulate <= self.data.batch_size,
            f"accumulate {self.accumulate} must be from 1 to data.batch_size ({self.data.batch_size})",
        )
        for loss in (term.loss if isinstance(term, Term) else term for term in self.losses):
            name, whole = type(loss).__name__, "_modules" in vars(loss) and hasattr(loss, "weight")
            _require(whole, f"losses: __init__ of {name} does not call super().__init__(weight)")
            _require(type(loss).forward is not Loss.forward, f"losses: {name} has no forward")
        whole = [loss.name for loss in self.losses if loss.sees_batch]
        _require(
            self.accumulate == 1 or not whole,
            f"accumulate {self.accumulate}: {', '.join(whole)} compares the images of a whole batch and would "
            "see a part of it; set accumulate 1, or leave it out",
        )
        hard = [loss.name for loss in self.losses if loss.hard_labels]
        mixing = " and ".join(f"data.{name}" for name in ("mixup", "cutmix") if getattr(self.data, name))
        _require(
            not (mixing and hard),
            f"{mixing} gives images labels of two classes, and {', '.join(hard)} needs one class per image; set it to "
            "0, or leave out the loss",
        )
        _require(self.output_dir != "", "output_dir is empty; name a folder")
        _require(not (self.init_from and self.weights), "give init_from or weights, not both")
        _require(self.select == "last" or self.data.val_fraction > 0, "select best needs data.val_fraction above 0")

    def _compare_with_teacher(self) -> list[str]:
        """Names of the losses that take an output of a teacher outside the learner."""
        terms = map(Term.of, self.losses)
        return [term.name for term in terms if term.needs_teacher and term.teacher == "teacher"]


@dataclass
class _Trained:
    """What `train_teacher.py` alone takes; bases that stand last come first in help and recipes."""

    model: str = "resnet18"
    """deep_nn, light_nn, deeper_cnn, mnist_teacher, mnist_student; of the CIFAR-100 comparison resnet8, resnet14,
    resnet20, resnet32, resnet44, resnet56, resnet110, resnet8x4, resnet32x4, wrn_16_1, wrn_16_2, wrn_40_1, wrn_40_2,
    vgg8, vgg13_cifar, mobilenet_v2_half, shufflenet_v1, shufflenet_v2_cifar; of He et al. cifar10_resnet20,
    cifar10_resnet32, cifar10_resnet44, cifar10_resnet56; any torchvision classifier; or an import path"""


@dataclass
class TeacherConfig(TrainConfig, _Trained):
    """Train one network on labels: a teacher, or a student alone."""

    output_dir: str = "runs/teacher"
    """the run folder; $NAME in it is the environment's, $$ is a dollar"""

    def __post_init__(self):
        super().__post_init__()
        comparing = self._compare_with_teacher()
        _require(not comparing, f"losses: {', '.join(comparing)} needs a teacher; use distill.py --teacher RUN")


@dataclass
class _Distilled:
    """What `distill.py` alone takes."""

    student: str = "mobilenet_v3_small"
    """deep_nn, light_nn, deeper_cnn, mnist_teacher, mnist_student; of the CIFAR-100 comparison resnet8, resnet14,
    resnet20, resnet32, resnet44, resnet56, resnet110, resnet8x4, resnet32x4, wrn_16_1, wrn_16_2, wrn_40_1, wrn_40_2,
    vgg8, vgg13_cifar, mobilenet_v2_half, shufflenet_v1, shufflenet_v2_cifar; of He et al. cifar10_resnet20,
    cifar10_resnet32, cifar10_resnet44, cifar10_resnet56; any torchvision classifier; or an import path"""
    teacher: str | list[str] = ""
    """run folder of the teacher, or a torchvision classifier with its ImageNet weights; a list for several"""
    teacher_mean: Literal["logits", "probabilities"] = "logits"
    """how several teachers become one: the mean of logits (geometric) or of probabilities (arithmetic)"""


@dataclass
class DistillConfig(TrainConfig, _Distilled):
    """Train a student on what teachers give, on labels, or on what it gives itself."""

    output_dir: str = "runs/student"
    """the run folder; $NAME in it is the environment's, $$ is a dollar"""

    def __post_init__(self):
        super().__post_init__()
        comparing = self._compare_with_teacher()
        _require(
            not comparing or bool(self.teacher),
            f"teacher is not given, and {', '.join(comparing)} compares with one; name a run folder (or several) or a "
            "torchvision classifier, or join outputs of the learner by a Term",
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
        _require(
            single or self.severity is None,
            f"severity {self.severity} needs one corruption; "
            + ("all measures every severity" if self.corruption else "give one, such as --corruption blur"),
        )
        for pair in self.taps:
            _require(
                len(pair.split(":")) == 2 and all(pair.split(":")),
                f"taps {pair!r} must be STUDENT_MODULE:TEACHER_MODULE, such as pool:pool",
            )


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
    """delete what an earlier run left in output_dir and start anew"""

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
