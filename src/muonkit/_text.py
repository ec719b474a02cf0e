"""Foreign text in messages, tables and pictures: names and files are data, never instructions."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = ["meant", "one_of", "shortened", "shown", "unknown"]


def unknown(what: str, got: object, options: Iterable[object], also: str = "") -> str:
    """The message for a choice that is none of the documented ones.

    "unknown after 'normoun': did you mean 'normuon'? It is one of 'normuon', 'adamuon', ..."

    Args:
        what: the name of the option, or of the kind of thing that was looked up.
        options: what may stand there, in the order of its table.
        also: what may stand there besides, or another remedy; follows the options.
    """
    known = [str(option) for option in options]
    hint = meant(got, known)
    it = f": {hint} It" if hint else "; it"
    one_line = shortened(repr(got), 80)
    return f"unknown {what} {one_line}{it} is one of {', '.join(map(repr, known))}{also}"


def one_of(options: Iterable[str]) -> str:
    """ "auto, float32 or bfloat16"."""
    *most, last = options
    return f"{', '.join(most)} or {last}" if most else last


def meant(got: object, options: Iterable[str]) -> str:
    """ "did you mean 'normuon'?", the closest of the options; empty where none is close."""
    close = difflib.get_close_matches(str(got)[:80], list(options), n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else ""


def shown(text: object) -> str:
    """`str(text)` with whatever does not print as an escape, so that it is one line.

    Escaped are control characters (ESC would be obeyed by a terminal, a newline would begin another
    line of a log), lone surrogates (which no stream encodes), marks that reorder what is around
    them, and spaces other than the usual one.
    """
    raw = str(text)
    if raw.isprintable():
        return raw
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in raw
    )


def shortened(text: object, most: int) -> str:
    """`shown(text)`, with its middle left out where it has more than `most` characters."""
    raw = str(text)
    if len(raw) > 2 * most:  # before it is escaped: a text of megabytes is not
        raw = f"{raw[:most]}…{raw[-most:]}"
    escaped = shown(raw)
    if len(escaped) <= most:
        return escaped
    head = (most - 1) // 3
    return f"{escaped[:head]}…{escaped[head + 1 - most :]}"
