"""Scripts in processes of their own that can be killed: forked from a server that has everything imported already.

The server has run no torch operation before it forks, so its children may use threads. conftest.py starts it before the
first test, so that it imports while others run.
"""

from __future__ import annotations

import gc
import importlib
import multiprocessing
import os
import signal
import socket
import sys
import threading

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    ["kd.train.conclude", "kd.train.fit", "kd.train.setup", "kd.teachers", "sklearn.datasets", "torch._dynamo"]
)


def start(script: str, arguments, environment: dict | None = None, sabotage=None, output=None):
    """Start a script; `sabotage` is (dotted name, n): SIGKILL to itself when that function is called the n-th time.

    A dotted name may end in `:SIGNAL` to send another signal to itself instead. In place of the pair there may be a
    function (picklable), which is called in the process before the script. What it prints is added to the file
    `output`, if given.
    """
    arguments = [str(a) for a in arguments]
    process = CONTEXT.Process(
        target=_run, args=(script, arguments, dict(environment or {}), sabotage, output), daemon=True
    )
    process.start()
    return process


def finish(*processes, timeout: float = 300) -> list[int]:
    """Wait for processes; their exit statuses, negative for the signal that ended one."""
    for process in processes:
        process.join(timeout)
        if process.is_alive():
            for each in processes:
                each.kill()
            raise TimeoutError("a process hung")
    return [process.exitcode for process in processes]


def run(script: str, arguments, environment: dict | None = None, sabotage=None) -> int:
    """Start a script and wait for it."""
    return finish(start(script, arguments, environment, sabotage))[0]


def run_several(script: str, arguments, count: int, sabotage=None, environment: dict | None = None) -> list[int]:
    """Start `count` processes of one job over gloo, as torchrun would, and wait for them."""
    return finish(*start_several(script, arguments, count, sabotage, environment))


def start_several(
    script: str, arguments, count: int, sabotage=None, environment: dict | None = None, output=None
) -> list:
    """Start `count` processes of one job over gloo, as torchrun would.

    The sabotage is in the last of them, or in all of them if it is a function.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {
        **(environment or {}),
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "ACCELERATE_USE_CPU": "true",
    }
    ranks = [{**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)]
    return [
        start(script, arguments, env, sabotage if callable(sabotage) or env["RANK"] == str(count - 1) else None, output)
        for env in ranks
    ]


def _run(script, arguments, environment, sabotage, output) -> None:
    gc.freeze()  # what the server has imported: a look through it would copy its memory into this process
    os.environ.update(environment)
    multiprocessing.current_process()._config["daemon"] = False  # so that it may start workers
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell lets what is in its background ignore Ctrl-C
    if output is not None:
        file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, 1)
        os.dup2(file, 2)
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        os.environ.pop(name, None)
    from kd.util.errors import run_script

    if callable(sabotage):
        sabotage()
    elif sabotage is not None:
        _sabotage(*sabotage)
    sys.argv = [script, *arguments]
    run_script(importlib.import_module(script).main)


def _sabotage(name: str, count: int) -> None:
    """Let the `count`-th call of a function send a signal to this process before it does its work."""
    name, _, number = name.partition(":")
    number = getattr(signal, number or "SIGKILL")
    module_name, _, attribute = name.rpartition(".")
    try:
        owner = importlib.import_module(module_name)
    except ModuleNotFoundError:
        outer, _, inner = module_name.rpartition(".")
        owner = getattr(importlib.import_module(outer), inner)
    original, calls, lock = getattr(owner, attribute), [0], threading.Lock()

    def wrapped(*args, **kwargs):
        with lock:
            calls[0] += 1
            if calls[0] == count:
                os.kill(os.getpid(), number)
        return original(*args, **kwargs)

    setattr(owner, attribute, wrapped)
