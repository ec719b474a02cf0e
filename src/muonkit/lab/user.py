"""Where the user's own code runs: its errors are the user's, with the traceback of that code."""

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

from muonkit.lab.errors import LabError, TaskError

_HERE = str(Path(__file__).parent)


def one_line(error: BaseException) -> str:
    """``ValueError: what was wrong``, shortened."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:200]}" if text else type(error).__name__


@contextmanager
def users(what: str) -> Iterator[None]:
    """A block that calls the user's code; ``what`` says which.

    Raises:
        TaskError: it failed; it has the user's part of the traceback.
    """
    try:
        yield
    except LabError:
        raise
    except (Exception, SystemExit) as error:  # a script's sys.exit() would end us without a word
        raise failed(what, error) from error


def failed(what: str, error: BaseException) -> TaskError:
    """What to raise where the user's code raised ``error``."""
    failure = TaskError(f"{what} failed ({one_line(error)})")
    failure.trace = "".join(
        traceback.format_exception(type(error), error, _theirs(error.__traceback__))
    )
    return failure


def _theirs(frames: TracebackType | None) -> TracebackType | None:
    """The traceback from the first frame on that is not the lab's; None if every one is."""
    first = frames
    while first is not None and first.tb_frame.f_code.co_filename.startswith(_HERE):
        first = first.tb_next
    return first
