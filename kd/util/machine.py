"""Where a run was made: hardware, versions of what a result may depend on, the state of the code."""

from __future__ import annotations

import ctypes
import json
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, distribution, version
from importlib.util import find_spec
from pathlib import Path

import torch

import kd


def versions() -> dict[str, str]:
    """Versions of what a result may depend on."""
    named = {name: version(name) for name in ("torchvision", "accelerate")}
    return {"kd": kd.__version__, "python": platform.python_version(), "torch": torch.__version__, **named}


def num_cores() -> int:
    """Cores of the CPU that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def share_of_cores() -> int:
    """This process's share of them, where a launcher started several on this machine."""
    return max(1, num_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def device_name(device: torch.device) -> str:
    """The hardware in words."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"{device.type} ({platform.machine()}, {threads} thread{'' if threads == 1 else 's'})"


def hardware(device: torch.device) -> dict[str, str | int]:
    """The device, this machine's cores and its memory in GB, and that of the device where it has its own."""
    found = {"device": device_name(device), "cpu_count": os.cpu_count() or 1, "host": platform.node()}
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        found["memory_gb"] = round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9)
    if device.type == "cuda":
        found |= {"gpu_count": torch.cuda.device_count(), "cuda": torch.version.cuda}
        found["gpu_memory_gb"] = round(torch.cuda.get_device_properties(device).total_memory / 1e9)
    return found


def missing_compiler(device: torch.device) -> str | None:
    """What `torch.compile` lacks for a device on this machine, in words; None if nothing."""
    if device.type != "cpu":
        return None if find_spec("triton") else f"Triton for {device.type} and finds none"
    name = os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++")
    return None if shutil.which(shlex.split(name)[0]) else f"a C++ compiler and finds no {name} ($CXX, or else g++)"


def peak_memory_mb(device: torch.device) -> float | None:
    """MB that this process has held at most, of GPU memory on a GPU, else of the machine's; waits for no device.

    None on Windows, where the standard library does not know.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    if sys.platform == "win32":
        return None
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


def git_commit() -> str | None:
    """The commit these scripts are at, with `-dirty` if they were changed since; None where it is not known."""
    return _git("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*") or _installed_from()[1]


def git_branch() -> str | None:
    """The branch these scripts are on; None outside git."""
    return _git("rev-parse", "--abbrev-ref", "HEAD")


def install_command() -> str:
    """How others get this library, in Markdown: from where it was cloned or installed, if that is a public address."""
    url, commit = _git("remote", "get-url", "origin") or _installed_from()[0] or "", git_commit() or ""
    if not re.match(r"https://[^@]*$", url):  # a path, or an address with a name or a password in it
        return f"`pip install .` in its repository{f' at commit {commit}' if commit else ''}"
    return f"`pip install git+{url}@{commit.removesuffix('-dirty')}`"


def _installed_from() -> tuple[str | None, str | None]:
    """Address and commit that pip noted of an installed copy, see
    https://packaging.python.org/en/latest/specifications/direct-url/"""
    try:
        noted = json.loads(distribution("kd").read_text("direct_url.json") or "{}")
    except (PackageNotFoundError, ValueError):
        noted = {}
    found = noted.get("vcs_info") or {}
    return (noted["url"], found["commit_id"]) if found.get("vcs") == "git" else (None, None)


def _git(*arguments: str) -> str | None:
    """What git prints about the repository of this file; None outside one, also for a copy in a folder that it ignores:
    an environment may lie in the repository of another project."""
    at = ["git", "-C", str(Path(__file__).parent)]
    try:
        for command in ([*at, "ls-files", "--error-unmatch", Path(__file__).name], [*at, *arguments]):
            done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def end_with_parent() -> None:
    """Let this process have SIGTERM when the one that started it dies, whatever of. Linux only."""
    if sys.platform == "linux":
        pr_set_pdeathsig = 1  # name of sys/prctl.h
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM)
