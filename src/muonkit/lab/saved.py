"""What a run leaves in its folder, and whether it is still that: damaged or foreign, it is refused.

A checkpoint and a result say of which run they are (task, model, data, length, optimizer and its
options), and what the measurements and the recording beside them were.
"""

import io
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from muonkit._text import shortened
from muonkit.lab import files
from muonkit.lab.errors import LabError
from muonkit.lab.files import UnfitError
from muonkit.lab.store import (
    Record,
    parse_lines,
    read_sealed,
    read_summed,
    read_with_sum,
    sum_of_file,
    write_sealed,
    write_with_sum,
)

CHECKPOINT = "checkpoint.pt"
RESULT = "result.json"
MEASUREMENTS = "measurements.jsonl"
#: What the monitor writes, beside the measurements.
RECORDING = "monitor.jsonl"

#: More than a line of measurements has, and than a recording may have, in bytes.
_LINE, _RECORDING = 1 << 10, 1 << 30
#: More than a checkpoint has beside its tensors.
_AROUND = 1 << 24


@dataclass(frozen=True)
class Result:
    """The figures of one finished run. Losses in nats per target.

    ``seconds`` is the time of the training steps (batch, forward, backward, optimizer), without
    validation and checkpoints. A diverged run has no final figures. A weight decay or an
    embedding_lr of None is the optimizer's usual one. A run of a sweep may have 1/part of the
    steps.
    """

    optimizer: str
    lr: float
    seed: int
    diverged: bool
    steps: int
    train_loss: float | None
    val_loss: float | None
    accuracy: float | None
    seconds: float
    step_ms: float
    optimizer_ms: float
    weight_decay: float | None = None
    embedding_lr: float | None = None
    part: int = 1


@dataclass(frozen=True)
class Saved:
    """A checkpoint that was taken up.

    Attributes:
        state: of the model, the optimizer and the random numbers.
        step: steps done.
        seconds: of training.
        content: the measurements up to there, as bytes.
        records: the same, read.
        recording: the sum of the recording up to there; None: there is none.
    """

    state: Mapping[str, Any]
    step: int
    seconds: float
    content: bytes
    records: list[Record]
    recording: Record | None


def _refused(folder: Path, error: UnfitError, lost: str) -> LabError:
    return LabError(
        f"{error}: delete the folder {folder} ({lost}), and the same command trains that run anew"
    )


# --- checkpoints -----------------------------------------------------------------------------


def write_checkpoint(
    folder: Path,
    identity: Record,
    state: Mapping[str, Any],
    *,
    step: int,
    seconds: float,
    measurements: Record,
    is_recorded: bool,
) -> None:
    """Replace the folder's checkpoint. What it says of other files has to be on the disk before."""
    content = io.BytesIO()
    saved = {
        **state,
        "identity": identity,
        "step": step,
        "seconds": seconds,
        "measurements": measurements,
        "recording": _recorded(folder) if is_recorded else None,
    }
    torch.save(saved, content)
    write_with_sum(folder / CHECKPOINT, content.getvalue())


def _recorded(folder: Path) -> Record | None:
    return sum_of_file(folder / RECORDING, _RECORDING)


def _loaded(path: Path, most: int) -> Record:
    """What is in the checkpoint at ``path``; UnfitError when it is none."""
    content = read_with_sum(path, most)
    try:
        saved = torch.load(io.BytesIO(content), weights_only=True, map_location="cpu")
    except Exception as error:  # torch raises whatever it met
        raise UnfitError(f"{path} cannot be read ({shortened(error, 80)})") from error
    if not isinstance(saved, dict):
        raise UnfitError(f"{path} is no checkpoint")
    return saved


def read_checkpoint(folder: Path, identity: Record, fields: Record, tensors: int) -> Saved | None:
    """The checkpoint of a run; None where there is none.

    Args:
        folder: the run's.
        identity: the run's, as it would be begun now.
        fields: what every line of its measurements has.
        tensors: bytes of the model's tensors.

    Raises:
        LabError: it is damaged, or of another run, or the measurements are damaged.
    """
    path = folder / CHECKPOINT
    if not files.is_there(path):
        return None
    try:
        saved = _loaded(path, 16 * tensors + _AROUND)
        check_identity(path, saved.get("identity"), identity)
        step: Any = saved.get("step")
        seconds: Any = saved.get("seconds")
        if not (_is_count(step) and _is_time(seconds) and step <= identity["steps"]):
            raise UnfitError(f"{path} is no checkpoint: its step or its seconds are none")
        lines, most = folder / MEASUREMENTS, _most_measurements(identity)
        content = read_summed(lines, saved.get("measurements"), most)
        records = read_lines(lines, content, fields)
        return Saved(saved, step, seconds, content, records, saved.get("recording"))
    except UnfitError as error:
        raise _refused(folder, error, "its steps so far are lost") from error


def read_recording(folder: Path, known: Record | None) -> bytes:
    """The recording up to a checkpoint: nothing where there is none, or it was deleted.

    Raises:
        LabError: it is damaged.
    """
    path = folder / RECORDING
    if known is None or not files.is_there(path):
        return b""
    try:
        return read_summed(path, known, _RECORDING)
    except UnfitError as error:
        raise LabError(
            f"{error}: delete it (the samples of the steps so far are lost), and give the command "
            "again"
        ) from error


def _most_measurements(identity: Record) -> int:
    """More bytes than the lines of such a run have."""
    return _LINE * (int(identity["steps"]) + int(identity["evaluations"]) + 2)


def check_identity(path: Path, found: object, expected: Record) -> None:
    """Refuse what is of another run.

    Raises:
        UnfitError: it is; the message says in what.
    """
    known = found if isinstance(found, dict) else {}
    for name in expected:
        if name not in known or known[name] != expected[name]:
            raise UnfitError(
                f"{path} is of a run with {name} = {_shown(known.get(name))}, not "
                f"{_shown(expected[name])}"
            )


def _shown(value: object) -> str:
    """A value of ours; of any other its kind, since it may be as deep as one likes."""
    is_ours = value is None or isinstance(value, str | int | float)
    return shortened(repr(value), 80) if is_ours else f"a {type(value).__name__}"


# --- results ---------------------------------------------------------------------------------


def write_result(
    folder: Path, identity: Record, result: Result, measurements: Record, *, is_recorded: bool
) -> None:
    """Write the result, by which the run is finished, and drop its checkpoint."""
    recording = _recorded(folder) if is_recorded else None
    kept = {"measurements": measurements, "recording": recording}
    write_sealed(folder / RESULT, {**asdict(result), "identity": identity, "files": kept})
    files.remove(folder / CHECKPOINT)


def is_finished(folder: Path) -> bool:
    return files.is_there(folder / RESULT)


def read_result(
    folder: Path, identity: Record, fields: Record
) -> tuple[Result, list[Record], bytes]:
    """The result of a finished run, its measurements, and these as bytes.

    Args:
        folder: the run's.
        identity: the run's, as it would be begun now.
        fields: what every line of its measurements has.

    Raises:
        LabError: one of them is damaged, of another run, or of an earlier version.
    """
    path, lines = folder / RESULT, folder / MEASUREMENTS
    try:
        value = read_sealed(path)
        check_identity(path, value.pop("identity", None), identity)
        known = _kept(value.pop("files", None), "measurements")
        content = read_summed(lines, known, _most_measurements(identity))
        result = _result(path, value, fields)
        records = read_lines(lines, content, fields)
        steps = sum(record["kind"] == "train" for record in records)
        if steps != result.steps:
            raise UnfitError(f"{path} has {result.steps} steps, {lines} has {steps}")
        return result, records, content
    except UnfitError as error:
        raise _refused(folder, error, "its steps are lost") from error


def _kept(found: object, name: str) -> object:
    return found.get(name) if isinstance(found, dict) else None


def _result(path: Path, value: Record, fields: Record) -> Result:
    """The figures, each of its type; those that name the run are the run's."""
    try:
        result = Result(**value)
    except TypeError as error:
        raise UnfitError(f"{path} has other figures than a result") from error
    losses = (result.train_loss, result.val_loss)
    times = (result.seconds, result.step_ms, result.optimizer_ms)
    named = {name: x for name, x in value.items() if name in ("optimizer", "lr", "seed")}
    sound = (
        named == {name: fields[name] for name in named}
        and result.weight_decay == fields.get("weight_decay")
        and result.embedding_lr == fields.get("embedding_lr")
        and result.part == fields.get("part", 1)
        and isinstance(result.diverged, bool)
        and _is_count(result.steps)
        and all(x is None if result.diverged else _is_figure(x) for x in losses)
        and (result.accuracy is None or _is_figure(result.accuracy))
        and all(map(_is_time, times))
    )
    if not sound:
        raise UnfitError(f"{path} has figures that are none")
    return result


def check_recording(path: Path) -> None:
    """Hold a run's recording to the sum that its result, or its checkpoint, has of it.

    Args:
        path: the recording. One that is in no run's folder has no sum, and passes.

    Raises:
        LabError: it is damaged.
    """
    folder = path.parent
    try:
        if is_finished(folder):
            known = _kept(read_sealed(folder / RESULT).get("files"), "recording")
        elif files.is_there(folder / CHECKPOINT):
            known = _loaded(folder / CHECKPOINT, _RECORDING).get("recording")
        else:
            return
        # What a run in progress has recorded since is not known to it yet.
        content = read_summed(path, known, _RECORDING)
        if is_finished(folder) and len(content) != path.stat().st_size:
            raise UnfitError(f"{path} is damaged: the run wrote {len(content):,} bytes of it")
    except UnfitError as error:
        raise LabError(
            f"{error}: draw a copy that lies in no run's folder, if it is worth it, and delete it"
        ) from error


# --- measurements ----------------------------------------------------------------------------


def read_lines(path: Path, content: bytes, fields: Record) -> list[Record]:
    """The measurements in ``content``, each of its type, and of the run that has ``fields``.

    Raises:
        UnfitError: one is not.
    """
    try:
        records = parse_lines(content)
    except ValueError as error:
        raise UnfitError(f"{path} is damaged ({shortened(error, 80)})") from error
    for number, record in enumerate(records, start=1):
        if not (
            all(record.get(name) == value for name, value in fields.items())
            and _is_count(record.get("step"))
            and _is_time(record.get("seconds"))
            and _is_loss(record, "loss")
            and _is_measured(record)
        ):
            raise UnfitError(f"{path}, line {number}, is no measurement of that run")
    return records


def _is_measured(record: Record) -> bool:
    if record.get("kind") == "train":
        return _is_time(record.get("step_ms")) and _is_time(record.get("optimizer_ms"))
    return record.get("kind") == "validation" and _is_loss(record, "accuracy")


def _is_loss(record: Record, name: str) -> bool:
    return name in record and (record[name] is None or _is_figure(record[name]))


def _is_figure(value: object) -> bool:
    return type(value) is float and math.isfinite(value)


def _is_time(value: object) -> bool:
    return type(value) in (int, float) and math.isfinite(value) and value >= 0  # type: ignore[arg-type, operator]


def _is_count(value: object) -> bool:
    return type(value) is int and value >= 0
