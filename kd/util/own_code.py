"""Errors in the user's own networks and losses: one line that says that it is theirs, and where."""

from __future__ import annotations

import sysconfig
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from kd.util.errors import UserError

_OURS = Path(__file__).parents[2]
_LIBRARIES = tuple({sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")})


@contextmanager
def blamed(what: str) -> Iterator[None]:
    """Turn what the user's own code raises, `sys.exit` too, into a UserError that names it and its place.

    What other code raises passes through.

    Args:
        what: was being done, as `model my_nets.Net`.
    """
    try:
        yield
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        cause: BaseException | None = error
        while cause is not None:  # a library may have caught it and raised its own
            if place := own_place(cause):
                raise UserError(f"{what}: {described(cause)}, raised by your own code: {place}") from error
            cause = cause.__cause__ or cause.__context__
        raise


def described(error: BaseException) -> str:
    """An error's kind and message in one short line."""
    message = " ".join(str(error).split())
    return f"{type(error).__name__}: {message[:300]}" if message else type(error).__name__


def own_place(error: BaseException) -> str | None:
    """Where in the user's own files it was raised, the innermost calls last; None where none of them took part."""
    if isinstance(error, SyntaxError) and error.filename and _is_own(error.filename):
        return f"{error.filename}, line {error.lineno}"
    return _words(traceback.extract_tb(error.__traceback__))


def called_from_here(error: BaseException) -> str | None:
    """The same, without what called a script of ours."""
    frames = traceback.extract_tb(error.__traceback__)
    rooms = (number for number, frame in enumerate(frames) if _is_in_a_room(Path(frame.filename)))
    return _words(frames[next(rooms, len(frames)) :])


def _words(frames: list[traceback.FrameSummary]) -> str | None:
    own = [frame for frame in frames if _is_own(frame.filename)]
    return "; ".join(f"{frame.filename}, line {frame.lineno}, in {frame.name}" for frame in own[-3:]) or None


def _is_in_a_room(path: Path) -> bool:
    return path.is_relative_to(_OURS / "kd") and path.name != "errors.py"


def _is_own(file: str) -> bool:
    path = Path(file)
    ours = path.is_relative_to(_OURS / "kd") or (path.parent == _OURS and path.name in _SCRIPTS)
    return path.is_file() and not ours and not file.startswith(_LIBRARIES)


_SCRIPTS = ("train_teacher.py", "distill.py", "evaluate.py")
