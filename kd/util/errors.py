"""What a user can do wrong ends in one clear line and an exit status that is not 0."""

from __future__ import annotations

import argparse
import difflib
import errno
import importlib
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import NoReturn

from kd.util.escape import in_terminal


class UserError(Exception):
    """A mistake that the user can mend: the message names the bad value, the known ones and the remedy."""


def unknown(what: str, value: object, known: Iterable[str], remedy: str = "") -> UserError:
    """The error for a name that is not among the known ones, with the nearest of them if one is near."""
    known = sorted(known)
    near = difflib.get_close_matches(str(value), known, n=1, cutoff=0.6)
    guess = f" (did you mean {near[0]!r}?)" if near else ""
    return UserError(f"unknown {what} {value!r}{guess}; known: {', '.join(known)}{'; ' + remedy if remedy else ''}")


class CommandParser(argparse.ArgumentParser):
    """The flags of `python -m kd.NAME`, in full words; a mistake is one line, as everywhere.

    Args:
        usage: what follows the name, where argparse would not show it well.
    """

    def __init__(self, name: str, description: str, usage: str | None = None):
        prog, form = f"python -m kd.{name}", argparse.RawDescriptionHelpFormatter
        usage = usage and f"{prog} {usage}"
        super().__init__(prog, usage, description, formatter_class=form, allow_abbrev=False)

    def add_trust(self) -> None:
        """The flag `--trust_code true` of the commands that load runs."""
        self.add_argument(
            "--trust_code",
            type=lambda text: {"true": True, "false": False}.get(text, text),
            choices=(True, False),
            default=False,
            metavar="{true,false}",
            help="true: run the code of a network that a run's config.json names by import path; only if it is yours",
        )

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; {self.prog} --help explains each")


def is_main_process() -> bool:
    """True in the process that may print; known from the launcher's environment before anything is set up."""
    return os.environ.get("RANK", "0") == "0"


def say(message: str) -> None:
    """Print a line on the main process, at once."""
    if is_main_process():
        print(in_terminal(message), flush=True)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Name the file in an error of writing: the system does so only where it is opened."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


# What a disk or a path can do to any write, wherever it happens.
_DISK_ERRORS = ("ENOSPC", "EDQUOT", "EFBIG", "EROFS", "EACCES", "EPERM", "EIO", "ENOENT", "ENOTDIR", "ELOOP",
                "EISDIR", "EEXIST", "ENAMETOOLONG")  # fmt: skip


SECONDS_TO_CATCH = 2.0


class _Stopped(BaseException):
    """SIGTERM or SIGUSR1 outside the training loop, which handles them itself."""


def _stop(number: int, _frame) -> None:
    _handle_stops(signal.SIG_IGN)  # once is enough; a launcher and a batch system may both send it
    signal.signal(signal.SIGALRM, partial(_raise_stopped, number))
    _raise_stopped(number)


def _raise_stopped(number: int, *_) -> None:
    """Raise, and again until it is caught: a module that is being imported may swallow whatever is raised in it."""
    signal.setitimer(signal.ITIMER_REAL, SECONDS_TO_CATCH)
    raise _Stopped(number)


def _handle_stops(handler) -> None:
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, handler)


def run_script(main: Callable[[], int | None], then: str = "the same command resumes from the last checkpoint") -> None:
    """Run a script's `main` and turn what a user can cause into one line on stderr and an exit status.

    The status is `main`'s own (None is 0), 2 for a UserError, 1 for a full or broken disk, 128 + the signal's number
    when a signal ended it (130 for Ctrl-C); `then` is the rest of that line.
    """
    _handle_stops(_stop)
    try:
        status = main() or 0
    except UserError as error:
        status = _fail(str(error), 2)
    except (KeyboardInterrupt, _Stopped) as stopped:
        signal.setitimer(signal.ITIMER_REAL, 0)
        number = stopped.args[0] if isinstance(stopped, _Stopped) else signal.SIGINT
        status = _fail(f"stopped by {signal.Signals(number).name}; {then}", 128 + number)
    except BrokenPipeError:  # `python evaluate.py ... | head` is no error
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 0
    except OSError as error:
        if errno.errorcode.get(error.errno) not in _DISK_ERRORS:
            raise
        place = f": {error.filename}" if error.filename else ""
        status = _fail(f"{os.strerror(error.errno).lower()}{place}; free or change it and run the same command", 1)
    except Exception as error:
        message = _lost(error) if isinstance(error, RuntimeError) else None
        if message is None and (message := _of_own_code(error)) is None:
            raise
        status = _fail(message, 1, speak=True) if message else 1
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        # While Python ends it puts the default in place of every handler, and the signal would kill; "ignore" stays.
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    sys.exit(status)


def run_command(module: str) -> None:
    """`python -m kd.NAME`: `run_script` of a module's `main`, with its imports, which take time or lack a package."""
    run_script(lambda: importlib.import_module(module).main())


def _lost(error: RuntimeError) -> str | None:
    """Which process is gone, in words, where that is what the error means; else None."""
    if "DataLoader worker" in str(error):
        return (
            "a process that decodes images was killed, mostly for lack of memory or, in a container, of shared memory; "
            "lower data.num_workers or data.batch_size; the same command resumes from the last checkpoint"
        )
    if os.environ.get("WORLD_SIZE", "1") == "1":
        return None
    _handle_stops(signal.SIG_IGN)  # the launcher ends all when one dies: first say which
    from kd.util.processes import lost_contact

    return lost_contact(error)


def _of_own_code(error: Exception) -> str | None:
    """In words what the user's own network, loss or learner raised; None where it is none of them."""
    from kd.util.own_code import called_from_here, described

    place = called_from_here(error)
    return place and f"{described(error)}, raised by your own code: {place}"


def _fail(message: str, status: int, speak: bool = False) -> int:
    if not (is_main_process() or speak):
        # The main process mostly has the same error, and the launcher ends all when one fails: let it speak first.
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(5)
    who = "" if is_main_process() else f" on process {os.environ['RANK']}"
    print(f"error{who}: {in_terminal(' '.join(message.split()))}", file=sys.stderr, flush=True)
    return status
