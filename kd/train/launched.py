"""What `accelerate launch` was given and does not do, or does not hand on: one line each that says what counts."""

from __future__ import annotations

import itertools
import os
from pathlib import Path

import psutil
from accelerate.commands.config.config_args import default_config_file

from kd.util.errors import say


def note_launcher(accumulate: int) -> None:
    """Compare the flags of the launcher that started this process with what the run does."""
    for line in launcher_notes(psutil.Process(os.getppid()).cmdline(), accumulate):
        say(f"note: {line}")


def launcher_notes(command: list[str], accumulate: int) -> list[str]:
    """The lines for a launcher's command; none where it is not `accelerate launch`."""
    if not any("accelerate" in Path(word).name for word in command[:3]):  # accelerate, or -m accelerate.commands.launch
        return []
    flags, notes, world = _flags(command), [], int(os.environ.get("WORLD_SIZE", "1"))
    if (steps := flags.get("gradient_accumulation_steps", str(accumulate))) != str(accumulate):
        notes.append(
            f"the launcher's gradient_accumulation_steps {steps} is not used; --accumulate {accumulate} counts"
        )
    if (wanted := flags.get("num_processes", str(world))) != str(world):
        notes.append(
            f"the launcher was given num_processes {wanted} and has started {world}; on CPUs it starts several with "
            f"--config_file accelerate_configs/cpu_2proc.yaml --num_processes {wanted}"
        )
    if not {"num_processes", "config_file"} & flags.keys() and not Path(default_config_file).is_file():
        notes.append(
            f"the launcher has no config and started {world} process{'es' * (world > 1)}, precision as the run says; "
            "--config_file accelerate_configs/NAME.yaml names another, and for one process python alone will do"
        )
    return notes


def _flags(command: list[str]) -> dict[str, str]:
    """Flags by their names with underscores; the script's own are among them, all of other names."""
    flags = {}
    for word, following in itertools.pairwise([*command, ""]):
        if word.startswith("--"):
            name, given, value = word[2:].partition("=")
            flags[name.replace("-", "_")] = value if given else following
    return flags
