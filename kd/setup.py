"""What both training scripts do before the loop: the accelerator, and the network that is trained."""

from __future__ import annotations

import os

import torch
from accelerate import Accelerator

from kd.data import Data
from kd.distiller import Distiller
from kd.errors import UserError, say
from kd.models import Classifier, View, build_classifier, load_classifier
from kd.runs import Run
from kd.track import tracker_arguments


def make_accelerator(config) -> Accelerator:
    """The accelerator of this process.

    Raises:
        UserError: the global batch size cannot be shared by the processes.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if config.data.batch_size % world:
        near = max(world, round(config.data.batch_size / world) * world)
        raise UserError(
            f"data.batch_size {config.data.batch_size} is not divisible by the {world} processes; "
            f"it is the global size, use for example {near}"
        )
    set_threads(config.num_threads)
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False
    arguments = tracker_arguments(config, config.output_dir)
    return Accelerator(cpu=on_cpu(), mixed_precision=_precision(config.mixed_precision), **arguments)


def set_threads(asked: int | None = None) -> None:
    """Use all cores of the CPU, shared by this machine's processes, unless the user said otherwise.

    Without a config file `accelerate launch` sets OMP_NUM_THREADS to 1, and so does torchrun: on a laptop most of the
    CPU would idle. A number of the user's own, other than 1, is kept.
    """
    launched = "ACCELERATE_MIXED_PRECISION" in os.environ or "TORCHELASTIC_RUN_ID" in os.environ
    if asked is None and launched and on_cpu() and os.environ.get("OMP_NUM_THREADS") == "1":
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        asked = max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    if asked is not None:
        torch.set_num_threads(asked)


def on_cpu() -> bool:
    """Whether to compute on the CPU: the launcher said so, or there is nothing else.

    Without being told, Accelerate starts no process group on a CPU under the torchrun launcher.
    """
    told = os.environ.get("ACCELERATE_USE_CPU", "false").lower() in ("true", "1", "yes")
    return told or not torch.accelerator.is_available()


def _precision(asked: str) -> str:
    if asked != "auto":
        return asked
    told = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if told in ("bf16", "fp16"):
        return told
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
    settings = config.data
    view = View(settings.resize, settings.crop, settings.channels, settings.mean, settings.std, data.image_shape[1:])
    torch.manual_seed(config.seed)
    classifier = build_classifier(name, data.classes, view, config.model_args, config.weights, config.freeze_backbone)
    if config.init_from:
        first = load_classifier(config.init_from)
        if first.classes != data.classes:
            raise UserError(f"init_from {config.init_from!r} has other classes than the data, or in another order")
        try:
            classifier.network.load_state_dict(first.network.state_dict())
        except RuntimeError:
            raise UserError(
                f"init_from {config.init_from!r} holds a {first.recipe['model']} with {first.recipe['model_args']}, "
                f"which does not fit {name} with {config.model_args}"
            ) from None
    check_images(classifier, data, name)
    return classifier


@torch.no_grad()
def check_images(classifier: Classifier, data: Data, name: str) -> None:
    """Try one blank image.

    Raises:
        UserError: the network does not take images of the data's size.
    """
    image = torch.zeros(1, *data.image_shape, dtype=torch.uint8)
    remedy = "set data.resize and data.crop"
    try:
        prepared = classifier.preprocess(image)
        wanted = getattr(classifier.network, "image_size", None)
        size = "x".join(str(n) for n in prepared.shape[2:])
        if isinstance(wanted, int) and prepared.shape[2:] != (wanted, wanted):
            square = prepared.shape[2] == prepared.shape[3]
            remedy = f"set --data.resize {wanted}" + ("" if square else f" --data.crop {wanted}")
            raise UserError(f"{name} takes images of {wanted}x{wanted} and gets {size}; {remedy}")
        was_training = classifier.training
        logits = classifier.eval()(image)
        classifier.train(was_training)
    except (RuntimeError, ValueError) as error:
        shape = "x".join(str(n) for n in data.image_shape)
        raise UserError(f"{name} does not take the data's images ({shape}): {str(error)[:200]}; {remedy}") from None
    if logits.shape != (1, len(data.classes)):
        raise UserError(
            f"{name} gives outputs of shape {tuple(logits.shape)} for one image; expected (1, {len(data.classes)})"
        )


def announce(distiller: Distiller, data: Data, config, accelerator: Accelerator) -> None:
    """Say in a few lines what will be trained on what."""
    classifier = distiller.student
    trained = sum(p.numel() for p in classifier.parameters() if p.requires_grad)
    total = sum(p.numel() for p in classifier.parameters())
    frozen = f", {total - trained:,} of them frozen" if trained < total else ""
    val = f"{len(data.val)} validation" if data.val else "no validation"
    counts = f"{len(data.train)} train, {val}, {len(data.test)} test images, {len(data.classes)} classes"
    say(f"data: {config.data.source}: {counts}")
    say(f"network: {classifier.recipe['model']}, {total:,} parameters{frozen}")
    say(f"objective: {distiller.objective()}")
    world, batch = accelerator.num_processes, config.data.batch_size
    shares = f"batch {batch} = {world} x {batch // world}"
    threads = f" with {torch.get_num_threads()} threads" if accelerator.device.type == "cpu" else ""
    say(f"on {accelerator.device.type}{threads}, precision {accelerator.mixed_precision}, {shares}")
