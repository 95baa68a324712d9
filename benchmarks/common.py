"""What the speed benchmarks share: measured children, and results as JSON with the hardware named.

Every measured run is a process of its own, so that neither side finds the other's allocator settings or caches.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks/results"


def child(script: str, *arguments, processes: int = 1, environment: dict | None = None) -> dict:
    """Run a benchmark script's own `--child` mode and return the JSON object that is its last line.

    Raises:
        RuntimeError: the child failed; its output is in the message.
    """
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command += [str(ROOT / "benchmarks" / script), "--child", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env={**os.environ, **(environment or {})})
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout}{done.stderr}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def about() -> dict:
    """The machine and the versions that the numbers belong to."""
    import torch

    from kd.machine import device_name, versions

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    return {
        "device": device_name(device),
        "cores": os.cpu_count(),
        "platform": platform.platform(terse=True),
        "load_before": load,
        "versions": versions(),
    }


def median(values) -> float:
    """Median of numbers."""
    return statistics.median(values)


def spread(values) -> str:
    """Median with the smallest and the largest, for a table."""
    return f"{median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def write(name: str, payload: dict, out: Path | None = None) -> Path:
    """Write a benchmark's numbers to benchmarks/results/NAME.json, or into the folder `out`."""
    folder = out or RESULTS
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    path.write_text(json.dumps(payload, indent=1) + "\n")
    print(f"wrote {path}", flush=True)
    return path
