"""Foreign text in messages, tables and pictures: names and files are data, never instructions."""

from __future__ import annotations

__all__ = ["shortened", "shown"]


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
