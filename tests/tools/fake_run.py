"""Stands for a training script in a sweep's tests: writes a run's metrics.jsonl, resumes from it, obeys SIGTERM.

Its validation accuracy rises towards 90 - |log10(lr) + 3| * 20, whatever its test accuracy is. Learning rates have
meanings of their own: 0.5 diverges, 0.25 fails, 0.125 waits at epoch 2 for a file `go` beside the run.
"""

from __future__ import annotations

import json
import math
import os
import signal
import sys
import time
from pathlib import Path

from filelock import FileLock, Timeout

EPOCHS = 4


def stop(*_) -> None:
    time.sleep(1)  # it saves its state
    print("stopped by SIGTERM after step 1; the same command resumes it", flush=True)
    sys.exit(143)


def main(argv: list[str]) -> None:
    flags = dict(word[2:].split("=", 1) for word in argv if word.startswith("--"))
    folder, lr = Path(os.path.expandvars(flags["output_dir"])), float(flags["optimizer.lr"])
    folder.mkdir(parents=True, exist_ok=True)
    try:
        lock = FileLock(folder / ".lock", timeout=0)
        lock.acquire()
    except Timeout:
        sys.exit("error: the folder is in use")
    if lr == 0.25:
        sys.exit("error: no such teacher")
    file = folder / "metrics.jsonl"
    done = len(file.read_text().splitlines()) if file.exists() else 0
    with file.open("a") as metrics:
        for epoch in range(done + 1, EPOCHS + 1):
            if lr == 0.5 and epoch == 2:
                sys.exit("error: the loss is not finite at step 7; lower --optimizer.lr")
            while lr == 0.125 and epoch == 2 and not (folder.parent / "go").exists():
                time.sleep(0.02)
            value = (90 - 20 * abs(math.log10(lr) + 3)) * epoch / EPOCHS
            metrics.write(json.dumps({"step": epoch, "epoch": epoch, "val/accuracy": value}) + "\n")
            metrics.flush()
            time.sleep(0.1)
    (folder / "summary.json").write_text(json.dumps({"test_accuracy": 100 - value}))


signal.signal(signal.SIGTERM, stop)
main(sys.argv[1:])
