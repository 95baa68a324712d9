"""DeepSpeed's ZeRO stages 1 and 2 behind the loop's engine: its settings, and its optimizer's state made whole.

DeepSpeed is imported only where the launcher asks for it. Precision, device and exchanges stay Accelerate's.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import warnings
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

from kd.util.errors import UserError

SWITCH = "ACCELERATE_USE_DEEPSPEED"
_OFFLOADS = ("offload_optimizer", "offload_param")
# what launchers write into every file; of all but the first the values are those of the script's flags in any case
_KNOWN = {"zero_optimization", "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps",
          "gradient_clipping"}  # fmt: skip


def wanted(num_processes: int) -> bool:
    """Whether the launcher is set to DeepSpeed and there is something to share out."""
    return os.environ.get(SWITCH, "false").lower() == "true" and num_processes > 1


@contextmanager
def hidden():
    """Meanwhile Accelerate does not see DeepSpeed's switch: it would hand it precision, clipping and accumulation, and
    keep its optimizer from being reached."""
    before = os.environ.pop(SWITCH, None)
    try:
        yield
    finally:
        if before is not None:
            os.environ[SWITCH] = before


def check(config, precision: str, on_cpu: bool) -> None:
    """Check the launcher's settings of DeepSpeed.

    Raises:
        UserError: DeepSpeed is not installed; a stage, an offload, a precision or a section that is not supported.
    """
    if find_spec("deepspeed") is None:
        raise UserError("the launcher is set to DeepSpeed, which is not installed; pip install deepspeed")
    if on_cpu and shutil.which(os.environ.get("CXX", "c++")) is None:
        raise UserError("on a CPU DeepSpeed needs a C++ compiler and finds none ($CXX, c++); install one")
    if precision == "fp16":
        raise UserError("mixed_precision fp16 is not supported with DeepSpeed; use bf16 or no")
    if config.compile is True:
        raise UserError("compile true does not work with DeepSpeed; set it to false, or use DistributedDataParallel")
    if config.optimizer.weight_decay and not config.optimizer.decay_norms_and_biases:
        raise UserError("optimizer.decay_norms_and_biases false is not supported with DeepSpeed; leave it at true")
    section = zero_section()
    stage = section.get("stage")
    if stage not in (1, 2):
        raise UserError(f"DeepSpeed's ZeRO stage {stage} is not supported; set zero_stage to 1 or 2, or use fsdp2.yaml")
    for name in _OFFLOADS:
        if (device := section.get(name, {}).get("device", "none")) != "none":
            raise UserError(f"DeepSpeed's {name} to {device} is not supported; set it to none")


def zero_section() -> dict:
    """`zero_optimization` of the file that the launcher names, else from the launcher's own settings."""
    file = os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none")
    if file == "none":
        devices = {name: os.environ.get(f"ACCELERATE_DEEPSPEED_{name.upper()}_DEVICE", "none") for name in _OFFLOADS}
        offloads = {name: {"device": device} for name, device in devices.items() if device != "none"}
        return {"stage": int(os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2")), **offloads}
    try:
        content = json.loads(Path(file).read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"deepspeed_config_file {file!r} cannot be read: {error}") from None
    if others := sorted(set(content) - _KNOWN):
        raise UserError(
            f"deepspeed_config_file {file!r} sets {', '.join(others)}; only zero_optimization is read, "
            f"the rest is set by this script's own flags"
        )
    return content.get("zero_optimization", {})


def initialize(distiller, optimizer: torch.optim.Optimizer, config, accelerator):
    """DeepSpeed's engine and its optimizer, whose state each process has a part of.

    Half precision comes from autocast, as without DeepSpeed: weights, gradients and what is exchanged are float32.
    """
    if accelerator.device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed

    warnings.filterwarnings("ignore", message=".* is deprecated", category=FutureWarning, module="torch.distributed")
    deepspeed.utils.logger.setLevel(logging.ERROR)  # it warns of torch's own optimizers, which it has not tested
    half = accelerator.mixed_precision == "bf16"
    settings = {
        "train_micro_batch_size_per_gpu": -(-config.data.batch_size // accelerator.num_processes),
        "gradient_accumulation_steps": 1,  # the loop marks a step's last micro-batch
        "gradient_clipping": config.optimizer.clip_norm or 0.0,
        "zero_optimization": zero_section(),
        "zero_allow_untested_optimizer": True,
        "torch_autocast": {"enabled": half, "dtype": "bfloat16", "lower_precision_safe_modules": []},
    }
    engine, prepared, _, _ = deepspeed.initialize(model=distiller, optimizer=optimizer, config=settings)
    return engine, prepared


def optimizer_tensors(optimizer) -> dict[str, Tensor]:
    """As `kd.train.checkpoint.optimizer_tensors`, from the parts of all processes, all of which must call it."""
    from deepspeed.utils import safe_get_full_optimizer_state

    (group,), (flat,) = optimizer.bit16_groups, optimizer.single_partition_of_fp32_groups
    tensors = {}
    for key, value in optimizer.optimizer.state[flat].items():
        for number, parameter in enumerate(group if isinstance(value, Tensor) else ()):
            full = value.clone() if key == "step" else safe_get_full_optimizer_state(parameter, key)
            tensors[f"{number}.{key}"] = full.cpu()
    return tensors


def load_optimizer_tensors(optimizer, tensors: dict[str, Tensor]) -> None:
    """The inverse; the weights, of which the optimizer has a part of its own, are taken from the network."""
    from deepspeed.utils import safe_set_full_optimizer_state

    optimizer.refresh_fp32_params()
    (group,), (flat,) = optimizer.bit16_groups, optimizer.single_partition_of_fp32_groups
    state = optimizer.optimizer.state[flat]
    for key in sorted({name.split(".", 1)[1] for name in tensors}):
        state[key] = tensors[f"0.{key}"].to(flat.device) if key == "step" else torch.zeros_like(flat)
    optimizer._lazy_init_hp_params_optimizer_state()  # or the state's parts are known after the first step only
    for name, tensor in tensors.items():
        number, key = name.split(".", 1)
        if key != "step":
            safe_set_full_optimizer_state(group[int(number)], tensor.to(flat.device), key)
