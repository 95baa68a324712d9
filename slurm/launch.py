#!/usr/bin/env python
"""`accelerate launch` on one node of a job, with the script's own exit status; what train.sbatch starts on each node.

python slurm/launch.py FOLDER ACCELERATE-LAUNCH-ARGUMENTS

`accelerate launch` itself ends with 1 and a traceback whatever status a script had, so that a run that a signal stopped
could not be told from one that failed. The status is also written to FOLDER/NODE, as srun would say only the largest.
"""

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

STOPPED = [128 + number for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGTERM)]


def launch(arguments: list[str]) -> int:
    """Launch, and return the script's exit status."""
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    try:
        launch_command(launch_command_parser().parse_args(arguments))
    except ChildFailedError as error:
        return worst(failure.exitcode for failure in error.failures.values())
    except subprocess.CalledProcessError as error:
        return worst([error.returncode])
    except SignalException as stopped:
        return 128 + stopped.sigval
    return 0


def worst(exit_codes: Iterable[int]) -> int:
    """One status for several processes: of one that failed, else of one that a signal stopped, else 0."""
    statuses = [128 - code if code < 0 else code for code in exit_codes]
    return max([status for status in statuses if status not in (0, *STOPPED)] or statuses, default=0)


def main() -> int:
    folder, *arguments = sys.argv[1:]
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # for the scripts, which handle it; the launcher would die of it
    node = os.environ.get("SLURM_NODEID", "0")
    with tempfile.TemporaryDirectory(prefix="kd-", ignore_cleanup_errors=True) as temporary:
        os.environ["TMPDIR"] = tempfile.tempdir = temporary  # torch leaves a folder for each launch
        status = launch(["--machine_rank", node, *arguments])
    Path(folder, node).write_text(f"{status}\n")
    return status


if __name__ == "__main__":
    sys.exit(main())
