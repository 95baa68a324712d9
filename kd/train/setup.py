"""What both training scripts do before the loop: the accelerator, and the network that is trained."""

from __future__ import annotations

import ctypes
import os
import platform
import warnings
from datetime import timedelta

import torch
from accelerate import Accelerator, DistributedType, PartialState
from accelerate.utils import DistributedDataParallelKwargs, FullyShardedDataParallelPlugin, InitProcessGroupKwargs
from torch import nn

from kd import keyed
from kd.data import Data
from kd.losses import Setting
from kd.models import Classifier, View, build_classifier, load_classifier
from kd.run.folder import Run
from kd.students import Learner, Making, Plain
from kd.teachers import Teachers
from kd.track import tracker_arguments
from kd.train import zero
from kd.train.distiller import Distiller
from kd.train.launched import note_launcher
from kd.train.optim import total_steps
from kd.util.errors import UserError, say
from kd.util.machine import end_with_parent, missing_compiler, share_of_cores
from kd.util.own_code import described, own_place

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


def make_accelerator(config) -> Accelerator:
    """The accelerator of this process.

    Raises:
        UserError: the global batch size cannot be shared by the processes, or the launcher is set to an engine
            whose state could not be saved whole.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if config.data.batch_size % world:
        near = max(world, round(config.data.batch_size / world) * world)
        raise UserError(
            f"data.batch_size {config.data.batch_size} is not divisible by the {world} processes; "
            f"it is the global size, use for example {near}"
        )
    if _launched():  # it passes on SIGTERM and SIGINT at most, and killed by another leaves its processes behind
        end_with_parent()
    note_launcher(config.accumulate)
    set_threads(config.num_threads)
    keep_freed_memory()
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False
    # 1x1 convolutions of channels_last images: a copy of a few numbers, nothing a user could do about
    warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
    # the millisecond because Accelerate does not hand on what equals NCCL's default, and gloo's is 30 minutes
    patience = InitProcessGroupKwargs(timeout=timedelta(seconds=config.peer_timeout, milliseconds=1))
    plugin, precision = _sharding(), _precision(config.mixed_precision)
    turns = config.learner is not None and bool(config.learner.turns)
    if turns and (plugin is not None or zero.wanted(world)):
        name = type(config.learner).__name__
        raise UserError(f"learner {name} takes turns, which FSDP2 and DeepSpeed do not; use DistributedDataParallel")
    if zero.wanted(world):
        zero.check(config, precision, on_cpu())
    with zero.hidden():
        accelerator = Accelerator(
            cpu=on_cpu(),
            mixed_precision=precision,
            fsdp_plugin=plugin,
            kwargs_handlers=[patience, DistributedDataParallelKwargs(find_unused_parameters=turns)],
            **tracker_arguments(config, config.output_dir),
        )
    if plugin is not None and accelerator.distributed_type == DistributedType.MULTI_CPU:
        # On a CPU Accelerate would take DistributedDataParallel instead without a word. Its state has two places.
        PartialState().distributed_type = accelerator.state.distributed_type = DistributedType.FSDP
        accelerator.state.fsdp_plugin = plugin
    return accelerator


def _sharding() -> FullyShardedDataParallelPlugin | None:
    """FSDP2, where the launcher is set to it; see `accelerate_configs/fsdp2.yaml`."""
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() != "true":
        return None
    if os.environ.get("FSDP_VERSION", "1") != "2":
        raise UserError("FSDP version 1 is not supported; set fsdp_version: 2, see accelerate_configs/fsdp2.yaml")
    from torch.distributed.fsdp import MixedPrecisionPolicy

    # Half precision comes from autocast alone, as without sharding; Accelerate's policy would put the losses in it too.
    return FullyShardedDataParallelPlugin(mixed_precision_policy=MixedPrecisionPolicy())


def _launched() -> bool:
    return "ACCELERATE_MIXED_PRECISION" in os.environ or "TORCHELASTIC_RUN_ID" in os.environ


def set_threads(wanted: int | None = None) -> None:
    """Use so many threads, by default all cores of the CPU, shared by this machine's processes.

    Without a config file `accelerate launch` sets OMP_NUM_THREADS to 1, and so does torchrun: on a laptop most of the
    CPU would idle. A number of the user's own, other than 1, is kept.
    """
    if wanted is None and _launched() and on_cpu() and os.environ.get("OMP_NUM_THREADS") == "1":
        wanted = share_of_cores()
    if wanted is not None:
        torch.set_num_threads(wanted)


def keep_freed_memory() -> None:
    """On a CPU, let the C library keep freed memory for the next step instead of giving it back to the system.

    Each step allocates the same large tensors; glibc maps and unmaps those above 32 MB each time, and the kernel clears
    every page again. Where the library is another one nothing happens.
    """
    if not on_cpu() or platform.libc_ver()[0] != "glibc":
        return
    libc, mmap_max, trim_threshold = ctypes.CDLL(None), -4, -1  # names of malloc.h
    libc.mallopt(mmap_max, 0)
    libc.mallopt(trim_threshold, 2**31 - 1)


def on_cpu() -> bool:
    """Whether to compute on the CPU: the launcher's switch is set, or there is nothing else.

    Accelerate itself starts no process group on a CPU under the torchrun launcher.
    """
    switch = os.environ.get("ACCELERATE_USE_CPU", "false").lower() in ("true", "1", "yes")
    return switch or not torch.accelerator.is_available()


def _precision(wanted: str) -> str:
    if wanted != "auto":
        return wanted
    if (launchers := os.environ.get("ACCELERATE_MIXED_PRECISION")) in ("bf16", "fp16"):
        return launchers
    return "bf16" if not on_cpu() and torch.cuda.is_available() and torch.cuda.is_bf16_supported() else "no"


def open_run(config, accelerator: Accelerator) -> Run:
    """The run folder, opened by the main process before any other looks into it; see `Run` for the errors."""
    run = Run(config.output_dir, config.resolved, config.overwrite, accelerator.is_main_process)
    accelerator.wait_for_everyone()
    return run


def build_trained(name: str, data: Data, config) -> Classifier:
    """The network to train, with its first weights: equal for equal seed, name and arguments.

    Raises:
        UserError: unknown names, weights that do not fit, images of the wrong size.
    """
    settings, (height, width), crop = config.data, data.image_shape[1:], config.data.crop
    if height != width and crop is None and settings.resize and min(height, width) > 2 * settings.resize:
        crop = settings.resize  # as they would be stored, did not another network need them larger
        say(f"data: of images of {width}x{height} the network sees the middle square, {crop}x{crop}")
    view = View(settings.resize, crop, settings.channels, settings.mean, settings.std, (height, width))
    torch.manual_seed(config.seed)
    frozen_now = config.freeze_backbone and not config.init_from
    classifier = build_classifier(name, data.classes, view, config.model_args, config.weights, frozen_now)
    if config.init_from:
        first = load_classifier(config.init_from, trust=config.trust_code)
        if first.classes != data.classes:
            raise UserError(f"init_from {config.init_from!r} has other classes than the data, or in another order")
        try:
            classifier.network.load_state_dict(first.network.state_dict())
        except RuntimeError:
            raise UserError(
                f"init_from {config.init_from!r} holds a {first.recipe['model']} with {first.recipe['model_args']}, "
                f"which does not fit {name} with {config.model_args}"
            ) from None
        if config.freeze_backbone:
            classifier.freeze_backbone()
    check_images(classifier, data, name)
    return classifier


def build_learner(network: Classifier, teachers: Teachers | None, data: Data, config) -> Learner:
    """The learner that the config names, around the run's own network.

    `config.weights` and `config.init_from` are that network's first weights; others have theirs by a seed of their own.

    Raises:
        UserError: the learner does not suit the network or the teachers.
    """
    view, learner = network.preprocess.view, config.learner or Plain()

    def make(name: str, model_args: dict, number: int) -> Classifier:
        torch.manual_seed(keyed.key(config.seed, keyed.Purpose.MEMBER, number) & (2**63 - 1))
        classifier = build_classifier(name, data.classes, view, model_args)
        check_images(classifier, data, name)
        return classifier

    torch.manual_seed(config.seed)
    learner.setup(network, Making(make, teachers, data.image_shape))
    if not learner.networks:
        raise UserError(f"learner {type(learner).__name__} keeps no network; let its `networks` give one or more")
    return learner


def build_distiller(learner: Learner, teachers: Teachers | None, data: Data, config) -> Distiller:
    """The learner with the terms of its objective; see `Distiller` for the errors."""
    setting = Setting(labels=data.train_labels, epochs=config.epochs, steps=total_steps(config, data))
    return Distiller(learner, config.losses, teachers, data.image_shape, setting, config.seed)


def choose_batch_norm(distiller: Distiller, config, accelerator: Accelerator) -> None:
    """Let batch norm see what `config.sync_batch_norm` sets, and print it where that is not all of the global batch.

    Raises:
        UserError: it is to be synchronised on a CPU.
    """
    layers = [module for module in distiller.modules() if isinstance(module, BATCH_NORMS) and module.training]
    world, several = accelerator.num_processes, accelerator.num_processes > 1
    if not layers or not (several or config.accumulate > 1):
        return
    images = -(-config.data.batch_size // (world * config.accumulate))
    at_a_time = f"{images} images{' at a time' * (config.accumulate > 1)}"
    if not several:
        words = f"over {at_a_time}"
    elif not config.sync_batch_norm:
        words = f"local, over each process's own {at_a_time} (--sync_batch_norm true on GPUs)"
    else:
        words = f"synchronised, over the {world} processes' {at_a_time}"
        if accelerator.device.type == "cpu":
            raise UserError(
                "sync_batch_norm true: torch's SyncBatchNorm runs on GPUs only; set it to false (each process "
                "normalises with its own images), or use one process"
            )
        for layer in layers:  # not torch's convert_sync_batchnorm: its new modules lose their hooks, which are the taps
            layer.__class__, layer.process_group = nn.SyncBatchNorm, None
    say(f"batch norm: {words}")


def compile_step(distiller: Distiller, config, accelerator: Accelerator, backend="inductor") -> None:
    """Compile the learner and the losses as one, where `config.compile` says so; evaluation uses the student as it is.

    Every size of batch has a graph of its own. Had it one for all sizes, which graph a step uses would depend on the
    steps before it, and a run that was resumed would round otherwise than one that was not.

    Raises:
        UserError: there is no compiler here, or the weights are shared out.
    """
    if config.compile is not True:
        return
    if accelerator.is_fsdp2:
        raise UserError("compile true does not work with FSDP2; set it to false, or use DistributedDataParallel")
    if missing := missing_compiler(accelerator.device):
        raise UserError(f"compile true needs {missing}; install one, or set compile to false")
    torch.compiler.config.recompile_limit = 64  # sizes of batch by branches of losses that look at the epoch
    torch.compiler.config.dynamic_sources = r".*\.(epoch|step)"
    options = {"deterministic": True} if config.deterministic else None  # of inductor
    distiller.compile(backend=backend, dynamic=False, options=options)
    say("compiled: student and losses; the first step of each size of batch waits for it")


@torch.no_grad()
def check_images(classifier: Classifier, data: Data, name: str) -> None:
    """Try one blank image.

    Raises:
        UserError: the network does not take images of the data's size.
    """
    image = torch.zeros(1, *data.image_shape, dtype=torch.uint8)
    wanted, was_training = getattr(classifier.network, "image_size", None), classifier.training
    try:
        height, width = classifier.preprocess(image).shape[2:]
        if isinstance(wanted, int) and (height, width) != (wanted, wanted):
            crop = "" if height == width else f" --data.crop {wanted}"
            gets = f"{name} takes images of {wanted}x{wanted} and gets {height}x{width}"
            raise UserError(f"{gets}; set --data.resize {wanted}{crop}")
        logits = classifier.eval()(image)
        classifier.train(was_training)
    except UserError:
        raise
    except Exception as error:  # of any kind, where the network is of the user's own
        shape = "x".join(map(str, data.image_shape))
        why = f"{described(error)}; {own_place(error) or 'set data.resize and data.crop'}"
        raise UserError(f"{name} does not take the data's images ({shape}): {why}") from None
    if logits.shape != (1, len(data.classes)):
        raise UserError(
            f"{name} gives outputs of shape {tuple(logits.shape)} for one image; expected (1, {len(data.classes)})"
        )


def announce(distiller: Distiller, data: Data, config, accelerator: Accelerator) -> None:
    """Print in a few lines what will be trained on what."""
    val = f"{len(data.val)} validation" if data.val else "no validation"
    labelled = "" if config.data.num_labels is None else f" ({config.data.num_labels} with their label)"
    counts = f"{len(data.train)} train{labelled}, {val}, {len(data.test)} test images, {len(data.classes)} classes"
    say(f"data: {config.data.source}: {counts}")
    if not data.views.plain:
        say(f"views: {data.views.words()}")
    for name, network in distiller.learner.networks.items():
        total = sum(p.numel() for p in network.parameters())
        frozen = sum(p.numel() for p in network.parameters() if not p.requires_grad)
        some = f", {frozen:,} of them frozen" if frozen else ""
        label = "network" if name == "student" else name
        say(f"{label}: {network.recipe['model']}, {total:,} parameters{some}")
    say(f"objective: {distiller.objective()}")
    world, batch = accelerator.num_processes, data.batch_size
    shares = f"batch {batch} = {world} x {batch // world}"
    threads = f" with {torch.get_num_threads()} threads" if accelerator.device.type == "cpu" else ""
    parts = f", weights in {world} parts (FSDP2)" if accelerator.is_fsdp2 else ""
    if zero.wanted(world):
        parts = f", optimizer state in {world} parts (DeepSpeed)"
    say(f"on {accelerator.device.type}{threads}, precision {accelerator.mixed_precision}, {shares}{parts}")
    left_to_us = config.mixed_precision == "auto" and accelerator.mixed_precision == "no"
    if left_to_us and accelerator.device.type == "cpu" and torch.cpu.get_capabilities().get("avx512_bf16"):
        say("this CPU has bf16 instructions: --mixed_precision bf16 is faster for many networks, see docs/step.md")
