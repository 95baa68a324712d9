#!/usr/bin/env python
"""All speed benchmarks in one command: tables, JSON and a picture.

    python benchmarks/run.py --cifar10 cifar10 --stl10 stl10 --teacher runs/cifar10/teacher # 21 minutes on two cores
    python benchmarks/run.py --quick                        # minutes: a smoke run on random images
    python benchmarks/run.py --parts plain_kd limit

Each part is a process of its own. One that fails is reported and the others go on; each writes what it has measured
after every round, and the time of all is bounded. In the end docs/speed.md and docs/speed.png are written from
benchmarks/results/*.json, or with --out both into that folder. Peers are measured with the Python of `--peers_python`,
which has torchdistill and timm beside what these scripts need; without it where this one has them.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import document
from common import ROOT, make_teacher, random_images

# name: script, its arguments at full size, its arguments in a smoke run
PARTS = {
    "plain_kd": ("plain.py", "--jobs kd", "--jobs kd --rounds 1 --kd_images 256 --kd_test_images 100"),
    "plain_head": ("plain.py", "--jobs head", "--jobs head --rounds 1 --head_images 20 --head_test_images 20"),
    "limit": ("limit.py", "--rounds 3", "--rounds 1 --images 1280 --epochs 3 --losses kl"),
    "kernels": ("kernels.py", "", "--steps 10"),
    "peers": (
        "peers.py",
        "--rounds 2 --images 2048 --large_images 128",
        "--jobs cifar --rounds 1 --images 256 --epochs 1",
    ),
    "growth": (
        "growth.py",
        "--axes images classes teachers taps processes",
        "--axes images processes --steps 15 --most 1000",
    ),
    "memory": ("growth.py", "--axes memory", None),
    "gpu_limit_32": ("limit.py", "--student resnet20 --losses kl --images 51200", None),
    "gpu_limit_224": ("limit.py", "--student resnet18 --losses kl --image_size 224 --batch_size 256", None),
    "gpu_kernels_32": ("kernels.py", "--student resnet20", None),
    "gpu_kernels_224": ("kernels.py", "--student resnet18 --image_size 224 --batch_size 256", None),
    "gpu": ("gpu.py", "", ""),
}


PATIENCE = 20  # seconds that a part has to end


def run_part(name: str, command: list[str], seconds: float, temporary: str | None = None) -> str:
    """Run one part within a time, its temporary files in a given folder; "done", or why it is not whole."""
    print(f"\n== {name}: {' '.join(command[1:])}", flush=True)
    environment = {**os.environ, **({"TMPDIR": temporary} if temporary else {})}
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        start_new_session=True,
        env=environment,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background job ignores it
    )
    try:
        status = process.wait(seconds)
    except BaseException as error:  # its children too; also at Ctrl-C
        os.killpg(process.pid, signal.SIGINT)  # so that they delete what they made
        try:
            process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        if not isinstance(error, subprocess.TimeoutExpired):
            raise
        return f"stopped after {seconds:.0f} s; the rounds before are kept"
    return "done" if status == 0 else f"failed with {status}"


def main(argv: list[str] | None = None) -> int:
    """Run the parts, print the tables, write the document and the picture; 1 if a part is not whole."""
    import torch

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--parts", nargs="+", choices=list(PARTS), help="all by default; those of a GPU where there is one"
    )
    parser.add_argument(
        "--quick", action="store_true", help="a smoke run on random images, with --out build/benchmarks"
    )
    parser.add_argument("--cifar10", default="cifar10", help="data.source of the jobs at 32x32")
    parser.add_argument("--stl10", default="stl10", help="data.source of the jobs at 224x224")
    parser.add_argument("--teacher", default="runs/cifar10/teacher", help="run folder of plain_kd's teacher")
    parser.add_argument("--peers_python", default=sys.executable, help="the Python that has torchdistill and timm")
    parser.add_argument(
        "--minutes", type=float, default=40, help="bound of the whole; a part that has no time is left out"
    )
    parser.add_argument("--part_minutes", type=float, default=12, help="bound of each part")
    parser.add_argument("--out", type=Path, help="folder of JSON, document and picture")
    arguments = parser.parse_args(argv)
    out = arguments.out or (ROOT / "build/benchmarks" if arguments.quick else None)
    on_gpu = torch.cuda.is_available()
    parts = arguments.parts or [name for name in PARTS if on_gpu or name == "gpu" or not name.startswith("gpu")]
    ends, states = time.monotonic() + 60 * arguments.minutes, {}
    with tempfile.TemporaryDirectory() as folder:
        sources = {"cifar10": arguments.cifar10, "stl10": arguments.stl10, "teacher": arguments.teacher}
        if arguments.quick:
            sources = {"cifar10": random_images(Path(folder, "small"), 512, 32)}
            sources["stl10"] = random_images(Path(folder, "large"), 64, 96)
            sources["teacher"] = make_teacher(
                folder, "deep_nn", sources["cifar10"], "--data.cache_dir", f"{folder}/cache"
            )
        for name in parts:
            script, full, quick = PARTS[name]
            given = quick if arguments.quick else full
            if given is None:
                continue
            left = min(ends - time.monotonic(), 60 * arguments.part_minutes)
            if left < 5:
                states[name] = "left out: the time is over"
                continue
            python = arguments.peers_python if name == "peers" else sys.executable
            command = [python, str(ROOT / "benchmarks" / script), *given.split()]
            for option in {"plain.py": ("cifar10", "stl10", "teacher"), "peers.py": ("cifar10", "stl10")}.get(
                script, ()
            ):
                command += [f"--{option}", str(sources[option])]
            command += ["--cifar10", str(sources["cifar10"])] if script == "gpu.py" else []
            command += ["--out", str(out)] if out else []
            began = time.monotonic()
            states[name] = run_part(name, command, left, folder)
            print(f"== {name}: {states[name]}, {time.monotonic() - began:.0f} s", flush=True)
    print()
    print(document.write(out), flush=True)
    print("\n".join(f"{name}: {state}" for name, state in states.items()))
    return int(any(state != "done" for state in states.values()))


if __name__ == "__main__":
    sys.exit(main())
