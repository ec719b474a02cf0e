"""The lab's errors: each is one line with its remedy, and knows the exit status it stands for."""

from collections.abc import Iterable

from muonkit._text import unknown as unknown_message


class LabError(Exception):
    """Something the caller can put right: a wrong option, file, folder or specification."""

    exit_status = 2


class DataError(LabError):
    """A data set that is absent, truncated, or not what it should be."""


class TaskError(LabError):
    """The user's own task is not what the protocol says, or its code failed.

    Attributes:
        trace: the traceback of the user's code, without our own frames; empty where it raised
            nothing.
    """

    trace = ""


class RunError(LabError):
    """Something that went wrong while training, for which no option is to blame."""

    exit_status = 1


class Interrupted(LabError):
    """The user stopped a run; everything up to here is on disk."""

    exit_status = 130


def unknown(kind: str, got: str, options: Iterable[str]) -> LabError:
    """The error for a name that is not in a table: the closest one, and all there are."""
    return LabError(unknown_message(kind, got, options))
