"""Output that any stream can take, and that nobody has to read.

A stream that has no sign for a character (``PYTHONIOENCODING=ascii``, ``LANG=C``, cp1252 on
Windows) gets another spelling of it, and one whose reader has left (``| head``) gets nothing more:
neither is a reason to lose a training, a picture or the exit status. Names and paths are shown as
data (:func:`muonkit._text.shown`).
"""

import codecs
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO

from rich import console

from muonkit._text import shown

#: What our own texts have beyond ASCII; anything else becomes its escape.
_SPELLINGS = {
    "—": "-",
    "–": "-",
    "−": "-",
    "±": "+-",
    "×": "x",
    "·": "*",
    "…": "...",
    "‖": "||",
    "√": "sqrt ",
    "σ": "sigma",
    "η": "eta ",
    "λ": "lambda",
    "ᵀ": "^T",
    "²": "^2",
    "≤": "<=",
    "≥": ">=",
    "’": "'",
}
_HANDLER = "muonkit.lab.spelled"


def _spelled(error: UnicodeError) -> tuple[str, int]:
    """An error handler of codecs: other characters for those that cannot be encoded."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    odd = error.object[error.start : error.end]
    escaped = (c.encode("ascii", "backslashreplace").decode() for c in odd)
    return "".join(_SPELLINGS.get(c, e) for c, e in zip(odd, escaped, strict=True)), error.end


codecs.register_error(_HANDLER, _spelled)


@contextmanager
def any_stream() -> Iterator[None]:
    """In this block nothing that is printed fails for its characters; at its end all is printed.

    Raises:
        OSError: a stream cannot be written to (a full disk); a reader that left is no error.
    """
    changed: list[tuple[Any, str]] = []
    for stream in (sys.stdout, sys.stderr):
        # Others are the caller's own: StringIO takes everything.
        if hasattr(stream, "reconfigure") and stream.errors in ("strict", "surrogateescape"):
            changed.append((stream, stream.errors))
            stream.reconfigure(errors=_HANDLER)
    try:
        yield
    finally:
        failed = [error for stream in (sys.stdout, sys.stderr) if (error := _flush(stream))]
        for stream, before in changed:
            with suppress(OSError):
                stream.reconfigure(errors=before)
    if failed:
        raise failed[0]


def _flush(stream: TextIO | None) -> OSError | None:
    """Print what waits in the stream; the error, if that is one."""
    try:
        if stream is not None:
            stream.flush()
    except BrokenPipeError:
        _abandon(stream)
    except OSError as error:
        _abandon(stream)
        return error
    return None


def _abandon(stream: Any) -> None:
    """Send what is left to nowhere: Python would try it again at its end, and fail with 120."""
    with suppress(OSError, ValueError, AttributeError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


class Console(console.Console):
    """rich's, but for readers that leave: it goes quiet then, where rich would end the process.

    Progress (``stderr=True``) also goes quiet where it cannot be written, as on a full disk.
    A ``:name:`` stays one, where rich would print an emoji.
    """

    def on_broken_pipe(self) -> None:
        self._give_up()

    def print(self, *objects: Any, **options: Any) -> None:
        try:
            super().print(*objects, **{"emoji": False, **options})
        except BrokenPipeError:  # rich before 13.9
            self._give_up()
        except OSError:
            if not self.stderr:
                raise
            self._give_up()

    def _give_up(self) -> None:
        self.quiet = True
        if self.file in (sys.stdout, sys.stderr):
            _abandon(self.file)

    def tell(self, text: str) -> None:
        """Print one line as it is: no markup, no colours, not broken."""
        self.print(shown(text), markup=False, highlight=False, soft_wrap=True)


def say(text: str) -> None:
    """Print lines of our own making to standard output."""
    try:
        print(text)
    except BrokenPipeError:
        _abandon(sys.stdout)
