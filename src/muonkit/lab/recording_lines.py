"""A recording's lines, each checked for all that is read of it."""

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from muonkit._text import shortened
from muonkit.lab.errors import LabError
from muonkit.lab.store import Record
from muonkit.monitor.sinks import FORMAT, is_torn

Key = tuple[str, int]

#: Steps and counts are below this: larger ones are no integers for a picture's axes.
_MOST = 2**53
#: The figures that are read from a matrix's record, beside its spectra.
_FIGURES = ("update_to_weight", "orthogonality_error")
#: And of its group's.
_GROUP = ("lr", "update_to_weight", "decay_share")


class Line(NamedTuple):
    """A record and where it stands; None: the last line, which was not written to its end."""

    path: Path
    number: int
    record: Record | None

    def error(self, got: str, expected: str) -> LabError:
        return LabError(
            f"{self.path}, line {self.number}: {got}, expected {expected}; this is no recording of "
            "muonkit.Monitor, or it is damaged: delete the line, or name another file"
        )


class _WrongError(Exception):
    """What was got, and what was expected."""


def records(path: Path) -> Iterator[Line]:
    """The lines of a file.

    Raises:
        LabError: it cannot be read, or a line is no JSON object.
    """
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                try:
                    record = _parsed(line)
                except _WrongError as error:
                    # Only the last line can be one that was being written.
                    if line.endswith(b"\n") or not is_torn(line):
                        raise Line(path, number, None).error(*error.args) from None
                    record = None
                yield Line(path, number, record)
    except OSError as error:
        raise LabError(
            f"cannot read {path} ({error.strerror}): check the name and rights"
        ) from error


def _parsed(line: bytes) -> Record:
    expected = "a JSON object in UTF-8"
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError:
        raise _WrongError("it is not UTF-8", expected) from None
    try:
        record = json.loads(text, object_pairs_hook=_unique, parse_constant=_refuse)
    except RecursionError:
        raise _WrongError("it is nested too deeply to be read", expected) from None
    except ValueError:  # also an integer of thousands of digits
        raise _WrongError("it is no JSON", expected) from None
    if not isinstance(record, dict):
        raise _WrongError(f"it is {_got(record)}, no JSON object", expected)
    return record


def _unique(pairs: list[tuple[str, Any]]) -> Record:
    record = dict(pairs)
    if len(record) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise _WrongError(f"{_got(twice)} is there twice", "every key once")
    return record


def _refuse(name: str) -> None:
    raise _WrongError(f"{name} is no JSON", "a finite number, or null")


class Content:
    """What the lines of a recording say, taken together.

    Attributes:
        every: of the last header.
        of: for every matrix how many its parameter is.
        samples: by step; groups and matrices, None where the step was skipped.
        is_cut, is_full: as of ``Recording``.
    """

    def __init__(self) -> None:
        self.every = 0
        self.of: dict[Key, int] = {}
        self.samples: dict[int, tuple[list[Record], dict[Key, Record]] | None] = {}
        self.is_cut = self.is_full = False
        self._begun = False

    def add(self, line: Line) -> None:
        """Raises:
        LabError: the line is none of a recording.
        """
        self.is_cut, self.is_full = line.record is None, False
        try:
            if not self._begun:
                self._begin(line)
            if line.record is not None:
                self._take(line.record)
        except _WrongError as error:
            raise line.error(*error.args) from None

    def _begin(self, line: Line) -> None:
        if line.record is None or line.record.get("kind") != "header":
            begun = "its header was not written to its end"
            begun = begun if line.record is None else "it begins with no header"
            raise LabError(
                f"{line.path}, line {line.number}: {begun}, expected the header of a recording of "
                "muonkit.Monitor; name another file"
            )
        self._begun = True

    def _take(self, record: Record) -> None:
        kind = _of(record, "kind", "text")
        if kind == "header":
            self._take_header(record)
        elif kind == "sample":
            step, skipped = _of(record, "step", "count"), _of(record, "skipped", "flag")
            self.samples[step] = None if skipped else self._sample(record)
        elif kind == "end":
            self.is_full = True
        else:
            raise _WrongError(f"kind is {_got(kind)}", "header, sample or end")

    def _take_header(self, record: Record) -> None:
        form = _of(record, "format", "count")
        if form != FORMAT:
            by = _got(record.get("muonkit"))
            raise _WrongError(f"it is of format {form}, written by muonkit {by}", f"{FORMAT}")
        self.every = _of(record, "every", "count")
        for place, matrix in _each(record, "matrices"):
            key = _key(matrix, place)
            self.of[key] = _of(matrix, "of", "count", place)

    def _sample(self, record: Record) -> tuple[list[Record], dict[Key, Record]]:
        groups = [_group(group, place) for place, group in _each(record, "groups")]
        matrices: dict[Key, Record] = {}
        for place, matrix in _each(record, "matrices"):
            key = _key(matrix, place)
            if key in matrices:
                raise _WrongError(f"{place} is {_got(key[0])} number {key[1]} again", "each once")
            self.of.setdefault(key, key[1] + 1)
            matrices[key] = _matrix(matrix, place)
        return groups, matrices


def _group(group: Record, place: str) -> Record:
    counts = _of(group, "nonfinite", "object", place, {})
    return {
        "algorithm": _of(group, "algorithm", "text", place),
        "members": _of(group, "members", "count", place),
        **{name: _of(group, name, "number", place, None) for name in _GROUP},
        "nonfinite": sum(_of(counts, kind, "count", f"{place}.nonfinite") for kind in counts),
    }


def _matrix(matrix: Record, place: str) -> Record:
    kept: Record = {name: _of(matrix, name, "number", place, None) for name in _FIGURES}
    spectra = _of(matrix, "spectra", "object", place, {})
    kept["spectra"] = {}
    for kind in ("momentum", "update"):
        where = f"{place}.spectra"
        spectrum = _of(spectra, kind, "object or null", where, None)
        if spectrum is not None:
            where = f"{where}.{kind}"
            values = _of(spectrum, "quantiles", "list", where, [])
            for i, value in enumerate(values):
                _checked(value, "number", f"{where}.quantiles[{i}]")
            rank = _of(spectrum, "stable_rank", "number", where, None)
            kept["spectra"][kind] = {"stable_rank": rank, "quantiles": values}
    return kept


def _key(matrix: Record, place: str) -> Key:
    return _of(matrix, "name", "text", place), _of(matrix, "index", "count", place)


# --- values ----------------------------------------------------------------------------------

_NOT_THERE = object()

_EXPECTED = {
    "text": "text",
    "flag": "true or false",
    "count": f"a whole number from 0 to {_MOST}",
    "number": "a finite number of at least 0, or null",
    "list": "a list",
    "object": "an object",
    "object or null": "an object or null",
}


def _each(record: Record, key: str) -> Iterator[tuple[str, Record]]:
    """The objects of a list, and where they stand."""
    for i, part in enumerate(_of(record, key, "list")):
        yield f"{key}[{i}]", _checked(part, "object", f"{key}[{i}]")


def _of(
    record: Mapping[str, Any], key: str, kind: str, place: str = "", otherwise: Any = _NOT_THERE
) -> Any:
    """A record's value, if it is of the kind; ``otherwise`` where it has none."""
    where = f"{place}.{shortened(key, 40)}" if place else key
    value = record.get(key, otherwise)
    if value is _NOT_THERE:
        raise _WrongError(f"{where} is missing", _EXPECTED[kind])
    return value if value is otherwise else _checked(value, kind, where)


def _checked(value: Any, kind: str, where: str) -> Any:
    if not _is(value, kind):
        raise _WrongError(f"{where} is {_got(value)}", _EXPECTED[kind])
    return value


def _is(value: Any, kind: str) -> bool:
    if kind == "text":
        return isinstance(value, str)
    if kind == "flag":
        return isinstance(value, bool)
    if kind == "list":
        return isinstance(value, list)
    if kind.startswith("object"):
        return isinstance(value, dict) or (value is None and kind == "object or null")
    if value is None:
        return kind == "number"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    if kind == "count":
        return isinstance(value, int) and 0 <= value <= _MOST
    try:
        return 0 <= float(value) < math.inf
    except OverflowError:  # an integer that no float is as large as
        return False


def _got(value: Any) -> str:
    """What a value is, in a few words: its text may be anything."""
    if isinstance(value, dict | list):
        return "an object" if isinstance(value, dict) else "a list"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return shortened(repr(value), 40)
