"""Folders that came from elsewhere, and names that are data: nothing outside is overwritten,
nothing is waited for, nothing of a model's own is run; and whatever the stream, the work and the
exit status are kept.
"""

from __future__ import annotations

import ast
import errno
import io
import json
import os
import re
import shutil
import stat
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import nn

import muonkit
from muonkit.lab import cli, files, report, saved, store
from muonkit.lab.cli import main
from muonkit.lab.data import digits
from muonkit.lab.errors import LabError
from muonkit.lab.plots import plain
from muonkit.lab.report import Material, show
from muonkit.lab.results import Curve
from muonkit.lab.saved import Result
from muonkit.lab.store import Folder, read_sealed, write_sealed
from muonkit.lab.tasks import TASKS
from muonkit.lab.train import Run, Setting, StopRequest, Trainer, train
from tests.helpers import lab
from tests.helpers.lab import Silent
from tests.helpers.paths import BENCHMARKS

LAB = Path(muonkit.__file__).parent / "lab"


# --- one place ---

#: Calls that can write, by name. A plain `open` or `.open` that only reads says its mode.
WRITERS = frozenset(
    (
        *("open", "fdopen", "write_text", "write_bytes", "touch", "truncate", "dump", "tofile"),
        *("mkdir", "makedirs", "mkstemp", "mkdtemp", "NamedTemporaryFile", "TemporaryFile"),
        *("symlink_to", "hardlink_to", "rename", "renames", "copy2", "copyfile", "copytree"),
        *("move", "rmtree", "unlink", "rmdir", "print_figure", "memmap"),
    )
)
#: What has another meaning, or does not write: (file, called).
ALLOWED = {
    ("data.py", "gzip.open"),  # to read
    ("data.py", "tarfile.open"),
    ("recording_lines.py", "path.open"),
}
#: To nowhere.
ALLOWED |= {("output.py", "os.open")}


def _called(node: ast.Call) -> tuple[str, str]:
    """The last name of what is called, and all of it."""
    name = ast.unparse(node.func)
    return name.rpartition(".")[2], name


def writers(name: str, source: str) -> Iterator[str]:
    """Every call in a module that may open a file for writing, make one, or take one away."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        last, whole = _called(node)
        # Path.replace has one argument, str.replace two, dataclasses.replace is called plainly.
        is_rename = last == "replace" and "." in whole and len(node.args) == 1 and not node.keywords
        to_path = last in ("savefig", "print_png", "save") and not (
            node.args and ast.unparse(node.args[-1] if last == "save" else node.args[0]) in BUFFERS
        )
        if (last in WRITERS or is_rename or to_path) and (name, whole) not in ALLOWED:
            yield f"{name}:{node.lineno}: {whole}"


#: Variables that are `io.BytesIO` where pictures and checkpoints are made.
BUFFERS = ("image", "content")


def test_only_one_file_of_the_lab_opens_files() -> None:
    found = [
        line
        for path in sorted(LAB.glob("*.py"))
        if path.name != "files.py"
        for line in writers(path.name, path.read_text())
    ]
    # `self.save()` of the trainer is no torch.save.
    assert [line for line in found if not line.endswith(": self.save")] == []


@pytest.mark.parametrize(
    "line",
    [
        "open('x', 'w')",
        "path.open('ab')",
        "os.open(path, flags)",
        "path.write_text('')",
        "os.truncate(path, 3)",
        "beside.replace(path)",
        "figure.savefig(path)",
        "torch.save(state, path)",
        "json.dump(x, file)",
        "folder.mkdir()",
    ],
)
def test_a_planted_writer_is_found(line: str) -> None:
    assert list(writers("x.py", line))


# --- names of files ---


def test_a_file_is_written_anew_with_the_umasks_rights(tmp_path: Path) -> None:
    path, victim = tmp_path / "x.json", tmp_path / "victim"
    victim.write_text("years of work")
    for name in (".x.json.tmp", ".monitor-layers.png.tmp"):  # what was written to once
        (tmp_path / name).symlink_to(victim)
    path.symlink_to(victim)
    before = os.umask(0o027)
    try:
        files.write_atomically(path, b"new")
    finally:
        os.umask(before)
    assert victim.read_text() == "years of work"
    assert path.read_bytes() == b"new"
    assert not path.is_symlink()
    assert stat.S_IMODE(path.stat().st_mode) == 0o640


def test_names_cannot_be_guessed_and_are_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[str, int]] = []
    real = os.open

    def spied(path: Any, flags: int, *more: Any) -> int:
        if flags & os.O_CREAT:
            seen.append((Path(path).name, flags))
        return real(path, flags, *more)

    monkeypatch.setattr(files.os, "open", spied)
    for _ in range(2):
        files.write_atomically(tmp_path / "x", b"")
    assert len({name for name, _ in seen}) == 2
    assert all(re.fullmatch(r"\.x\.[0-9a-f]{16}\.tmp", name) for name, _ in seen)
    assert all(flags & os.O_EXCL and flags & os.O_NOFOLLOW for _, flags in seen)


def test_what_a_kill_left_is_cleared_away_and_nothing_else(tmp_path: Path) -> None:
    rest = tmp_path / f".checkpoint.pt.{'0' * 16}.tmp"
    others = [tmp_path / ".mine.tmp", tmp_path / "notes.0123456789abcdef.tmp"]
    for path in (rest, *others):
        path.write_text("")
    with Folder(tmp_path).locked():
        pass
    assert not rest.exists()
    assert all(path.exists() for path in others)


# --- locks ---


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (errno.EWOULDBLOCK, "another muonkit is running in"),
        (errno.ENOLCK, "cannot lock .* on a file system that has locks"),
        (errno.EOPNOTSUPP, "cannot lock .* on a file system that has locks"),
    ],
)
def test_a_lock_that_fails_says_why(
    number: int, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(store.fcntl, "flock", fails)
    with pytest.raises(LabError, match=message), Folder(tmp_path).locked():
        pass


# --- crafted folders ---

COMMAND = ["compare", "digits", "--optimizers", "adamw,muonw", "--threads", "1"]
COMMAND += ["--steps", "4", "--evaluations", "1", "--monitor", "2"]
ADAMW, MUONW = "runs/adamw-lr0.004-seed0", "runs/muonw-lr0.004-seed0"


@pytest.fixture
def _undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    _undraw(monkeypatch)


def _undraw(patch: pytest.MonkeyPatch) -> None:
    """Pictures are most of the time of a comparison of four steps."""
    patch.setattr("muonkit.lab.plots.loss_plot", lambda *_: b"picture")
    patch.setattr("muonkit.lab.report._drawn", _checked(report._drawn))


def _checked(drawn: Any) -> Any:
    """The recordings are read, and not drawn."""

    def replaced(*words: Any) -> Any:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("muonkit.lab.monitor.draw", lambda *_: {})
            return drawn(*words)

    return replaced


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "out"
    with pytest.MonkeyPatch.context() as patch:
        _undraw(patch)
        assert main([*COMMAND, "--out", str(out)]) == 0
    return out


def _link(path: Path, victim: Path) -> None:
    path.symlink_to(victim)


def _pipe(path: Path, victim: Path) -> None:
    os.mkfifo(path)


def _huge(path: Path, victim: Path) -> None:
    with path.open("wb") as file:
        file.truncate(1 << 42)


def _folder(path: Path, victim: Path) -> None:
    path.mkdir()


def _second_name(path: Path, victim: Path) -> None:
    path.hardlink_to(victim)


LOCK, LINES, CHECKPOINT = (
    f"{ADAMW}/{name}" for name in (".lock", "measurements.jsonl", "checkpoint.pt")
)
RESULT, RECORDING = f"{ADAMW}/result.json", f"{MUONW}/monitor.jsonl"


@pytest.mark.usefixtures("_undrawn")
@pytest.mark.parametrize(
    ("name", "make"),
    [
        *((name, _link) for name in (".lock", "config.json", "report.html", "summary.json")),
        *((name, _link) for name in (LOCK, LINES, CHECKPOINT, RESULT, RECORDING)),
        *((name, _pipe) for name in (".lock", "config.json", LINES, CHECKPOINT, RESULT, RECORDING)),
        *((name, _huge) for name in ("config.json", CHECKPOINT, RESULT, RECORDING)),
        *((name, _folder) for name in (".lock", "report.html", CHECKPOINT)),
        *((name, _second_name) for name in (LOCK, LINES)),
    ],
)
def test_a_crafted_folder_overwrites_nothing_and_nothing_waits(
    name: str,
    make: Callable[[Path, Path], None],
    whole: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out, victim = tmp_path / "out", tmp_path / "victim"
    victim.write_text("years of work")
    shutil.copytree(whole, out)
    # A run that is not finished writes most.
    if name.startswith(ADAMW) and not name.endswith("result.json"):
        (out / ADAMW / "result.json").unlink()
    (out / name).unlink(missing_ok=True)
    make(out / name, victim)
    status = main([*COMMAND, "--out", str(out)])
    assert victim.read_text() == "years of work"
    told = capsys.readouterr().err.splitlines()
    if status:
        assert status in (1, 2)
        assert told[-1].startswith("error: ")
        assert str(out / name) in told[-1] or str(out) in told[-1]
        assert [line for line in told if "Traceback" in line] == []
    elif name.endswith("monitor.jsonl"):
        assert any("left out" in line and str(out / name) in line for line in told)


@pytest.mark.parametrize("name", ["runs", ADAMW])
def test_a_folder_that_is_a_link_is_not_written_to(
    name: str, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, elsewhere = tmp_path / "out", tmp_path / "elsewhere"
    elsewhere.mkdir()
    shutil.copytree(whole, out)
    shutil.rmtree(out / name)
    (out / name).symlink_to(elsewhere)
    assert main([*COMMAND, "--out", str(out)]) == 2
    assert f"{out / name} is a link" in capsys.readouterr().err.splitlines()[-1]
    assert list(elsewhere.iterdir()) == []


def test_pictures_are_not_written_through_a_link(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(whole / MUONW, elsewhere)
    (tmp_path / "out" / "runs").mkdir(parents=True)
    (tmp_path / "out" / "runs" / "x").symlink_to(elsewhere)
    before = sorted(elsewhere.iterdir())
    assert main(["monitor", str(tmp_path / "out")]) == 2
    assert "is a link" in capsys.readouterr().err
    assert sorted(elsewhere.iterdir()) == before


# --- files whose sums are right and whose content is not ---


def _deep(value: dict[str, Any]) -> None:
    value["identity"] = json.loads("[" * 400 + "]" * 400)


CRAFTED: dict[str, Callable[[dict[str, Any]], Any]] = {
    "name": lambda v: v.update(optimizer="[red]adamw[/]\x1b[2J\nx"),
    "type": lambda v: v.update(val_loss="low"),
    "list": lambda v: v.update(steps=[]),
    "bool": lambda v: v.update(step_ms=True),
    "huge": lambda v: v.update(steps=10**18),
    "negative": lambda v: v.update(seconds=-1.0),
    "extra": lambda v: v.update(surprise=1),
    "lacks": lambda v: v.pop("lr"),
    "deep": _deep,
    "no files": lambda v: v.pop("files"),
    "other files": lambda v: v.update(files=[1]),
    "no bytes": lambda v: v["files"]["measurements"].update(bytes="many"),
    "other run": lambda v: v["identity"].update(batch_size=3),
    "other model": lambda v: v["identity"].update(model="mlp(width=3)"),
}


@pytest.mark.parametrize("craft", CRAFTED)
def test_a_crafted_result_is_refused_in_one_line(craft: str, whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "adamw-lr0.004-seed0"
    shutil.copytree(whole / ADAMW, folder)
    value = read_sealed(folder / "result.json")
    CRAFTED[craft](value)
    write_sealed(folder / "result.json", value)
    setting = Setting(TASKS["digits"], digits(), 4, 64, evaluations=1, monitor=2)
    with pytest.raises(LabError, match=r"result\.json|measurements\.jsonl") as caught:
        train(Run("adamw", 0.004, 0), setting, folder, StopRequest(), Silent())
    assert "delete the folder" in str(caught.value)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 700


@pytest.mark.parametrize(
    "content",
    [
        b"[" * 100_000,
        b'{"a": 1' + b"0" * 5000 + b"}",
        b'{"a": 1e999}',
        b'{"a": NaN}',
        b"[1]",
        b"",
        b"\xff\xfe",
        b'{"sha256": 3}',
        b'{"task": "digits"}',
    ],
    ids=repr,
)
def test_a_configuration_that_is_none_is_one_line(
    content: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_bytes(content)
    assert main([*COMMAND, "--out", str(tmp_path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {tmp_path / 'config.json'} is damaged")
    assert len(line) < 600


def test_lines_of_another_kind_are_refused(tmp_path: Path) -> None:
    run = Run("adamw", 0.1, 0)
    sound = {**run.fields(), "kind": "train", "step": 1, "loss": 1.0, "seconds": 0.5}
    sound |= {"step_ms": 1.0, "optimizer_ms": 1.0}
    assert saved.read_lines(tmp_path, json.dumps(sound).encode(), run.fields()) == [sound]
    for change in ({"loss": "1"}, {"loss": True}, {"step": 1.5}, {"kind": "x"}, {"lr": 0.2}):
        line = json.dumps({**sound, **change}).encode()
        with pytest.raises(LabError, match="line 1, is no measurement of that run"):
            saved.read_lines(tmp_path, line, run.fields())


# --- another run ---


def test_a_checkpoint_of_another_model_or_length_is_refused(tmp_path: Path) -> None:
    setting = Setting(TASKS["digits"], digits(), 8, 32)
    run = Run("adamw", 0.004, 0)
    trainer = Trainer(run, setting, tmp_path, StopRequest(), Silent())
    lab.advance(trainer, 1)
    for other, told in (
        (Setting(TASKS["digits"], digits(), 9, 32), "steps = 8, not 9"),
        (Setting(TASKS["digits"], digits(), 8, 64), "batch_size = 32, not 64"),
        (Setting(TASKS["digits"], digits(), 8, 32, evaluations=2), "evaluations = 9, not 3"),
    ):
        with pytest.raises(LabError, match=told):
            train(run, other, tmp_path, StopRequest(), Silent())


def test_the_model_is_part_of_what_a_folder_belongs_to(tmp_path: Path) -> None:
    from dataclasses import replace
    from functools import partial

    from muonkit.lab.models import ConvNet, mlp

    assert "width=16" in TASKS["cifar10"].model
    wider = replace(TASKS["cifar10"], build=partial(ConvNet, width=32))
    assert wider.model != TASKS["cifar10"].model
    # Also where the options are the same and the layers are not.
    other = replace(TASKS["digits"], build=partial(mlp, 64, 128, 10, 2))
    assert other.model == TASKS["digits"].model
    before = torch.get_rng_state()
    assert TASKS["gpt"].model
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.usefixtures("_undrawn")
def test_a_folder_of_another_model_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from dataclasses import replace
    from functools import partial

    from muonkit.lab.models import mlp

    words = ["compare", "digits", "--steps", "2", "--optimizers", "adamw", "--out", str(tmp_path)]
    assert main(words) == 0
    narrow = replace(TASKS["digits"], build=partial(mlp, 64, 32, 10, 2))
    monkeypatch.setitem(TASKS, "digits", narrow)
    capsys.readouterr()
    assert main(words) == 2
    told = capsys.readouterr().err
    assert "holds a comparison with model" in told
    assert "width=128" in told
    assert "width=32" in told


# --- flipped bits: all of them are benchmarks/flips.py's ---


@pytest.fixture
def flips(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import flips

    yield flips
    del sys.modules["flips"]


def test_a_flipped_bit_is_refused_or_changes_nothing(flips: Any, tmp_path: Path) -> None:
    with flips.quick():
        for title, folder in flips.folders(tmp_path):
            found = dict(flips.flips_of(folder, 2))
            total = sum(found.values(), Counter())
            assert total[flips.REFUSED] >= (10 if title == "finished" else 12)
            names = " ".join(found)
            assert "config.json" in names
            assert ("checkpoint.pt" in names) == (title == "interrupted")
    damaged = tmp_path / "out" / "config.json"
    assert damaged.read_bytes() == (tmp_path / "sound" / "config.json").read_bytes()


# --- a model's own code ---


def test_route_runs_no_code_of_a_folder_and_reads_no_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ran = tmp_path / "ran"
    code = f"import pathlib\npathlib.Path({str(ran)!r}).write_text('x')\n"
    code += "from transformers import PreTrainedConfig as C\nclass A(C): model_type = 'own'\n"
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "own.py").write_text(code)
    # Unpickled, it would write the file too.
    pickle = f"cbuiltins\nexec\n(V{code.splitlines()[0]};{code.splitlines()[1]}\ntR.".encode()
    (folder / "pytorch_model.bin").write_bytes(pickle)
    auto = dict.fromkeys(("AutoConfig", "AutoModel", "AutoModelForCausalLM"), "own.A")
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("it asked"))

    def routed(**config: Any) -> int:
        (folder / "config.json").write_text(json.dumps({"auto_map": auto, **config}))
        return main(["route", str(folder)])

    assert routed(model_type="own", architectures=["A"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "is not built, since that would run it: use file.py:factory" in line
    small = {"n_layer": 1, "n_embd": 16, "n_head": 2, "vocab_size": 32, "n_positions": 8}
    for further in (
        {},
        {"architectures": ["Trainer"]},  # transformers has it, and it is no model
        {"architectures": 3},
        {"attn_implementation": "somebody/kernels"},
    ):
        status = routed(model_type="gpt2", **small, **further)
        told = capsys.readouterr()
        assert "c_attn" in told.out or (status == 2 and told.err.count("\n") == 1), further
    assert not ran.exists()
    assert main(["route", "--help"]) == 0
    assert "they run its code" in " ".join(capsys.readouterr().out.split())


# --- names are data ---

ODD = "a\x1b[2J\n[red]$x$\u202e\udcff"


def test_names_do_not_reach_a_terminal_as_they_are(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = nn.Sequential()
    model.add_module(ODD, nn.Linear(4, 4))
    model.add_module("head", nn.Linear(4, 2))
    monkeypatch.setattr("muonkit.lab.specs.load_model", lambda _: model)
    assert main(["route", "own:net"]) == 0
    out = capsys.readouterr().out
    assert all(c.isprintable() or c == "\n" for c in out)
    assert r"a\x1b[2J\n[red]$x$\u202e\udcff.weight" in out
    plainer = nn.Sequential()
    plainer.add_module("name", nn.Linear(4, 4))
    plainer.add_module("head", nn.Linear(4, 2))
    lines = str(muonkit.route(plainer)).count("\n")
    assert out.count("\n") == lines + 1


def test_names_in_the_table_are_no_markup_and_in_pictures_no_mathematics() -> None:
    result = Result(ODD, 0.1, 0, False, 1, 1.0, 1.0, None, 1.0, 1.0, 1.0, 0.1)
    stream = io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(cli.OPTIMIZERS, ODD, cli.OPTIMIZERS["adamw"])
        outcomes = [(result, Curve([0], [0], [1.0]))]
        asked = {"task": "[b]t[/b]", "optimizers": [ODD]}
        material = Material(asked, "", "", "", outcomes, outcomes, {})
        show(Console(file=stream, width=120), material)
    assert r"a\x1b[2J\n[red]$x$\u202e\udcff" in stream.getvalue()
    assert "[b]t[/b]" in stream.getvalue()
    from matplotlib import cbook

    assert not cbook.is_math_text(plain("$x$ and $\\frac$"))
    assert plain("$x$") == r"\$x\$"


def test_an_error_is_one_line_whatever_is_in_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    odd = tmp_path / "a\n\x1b[2J"
    odd.write_text("")
    for words in (["compare", "digits", "--out"], ["monitor"], ["route"]):
        assert main([*words, str(odd)]) == 2
        told = capsys.readouterr().err
        assert told.count("\n") == 1
        assert told[:-1].isprintable()


# --- any stream, any reader ---


COMPARE = ["compare", "digits", "--optimizers", "adamw", "--steps", "2"]
PLAN = ["plan", "--model", "gpt2-124m", "--mesh", "dp=2"]


def _words(tmp_path: Path) -> dict[str, list[str]]:
    return {
        "compare": [
            *COMMAND[:2],
            "--optimizers",
            "adamw",
            "--steps",
            "2",
            "--out",
            str(tmp_path / "compared"),
        ],
        "plan": [*PLAN, "--plot", str(tmp_path / "plan.png")],
        "route": ["route", "gpt2"],
        "monitor": ["monitor", str(tmp_path / "recorded")],
    }


# `plan` has a process of its own below: here it once ended with status 1, among a whole suite's
# tests in one process, and never alone.
COMMANDS = ("compare", "route", "monitor")
WRITTEN = {
    "compare": "compared/report.html",
    "plan": "plan.png",
    "monitor": "recorded/monitor-spectra.png",
}


@pytest.mark.usefixtures("_undrawn")
@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("stream", ["ascii", "closed", "both closed"])
def test_a_stream_loses_no_picture_and_no_exit_status(
    stream: str, command: str, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(whole / MUONW, tmp_path / "recorded")
    words = _words(tmp_path)[command]
    raw = io.BytesIO()
    out: Any = io.TextIOWrapper(raw, encoding=stream if "closed" not in stream else "utf-8")
    if "closed" in stream:  # as `| head` leaves it
        out = _gone()
    monkeypatch.setattr(sys, "stdout", out)
    err = _gone() if stream == "both closed" else io.StringIO()
    monkeypatch.setattr(sys, "stderr", err)
    assert main(words) == 0, err.getvalue() if isinstance(err, io.StringIO) else "unread"
    assert command not in WRITTEN or (tmp_path / WRITTEN[command]).stat().st_size > 1000
    if "closed" not in stream:
        said = raw.getvalue().decode(stream)
        assert len(said) > 200
        assert "UnicodeEncodeError" not in said
    out.close()  # as Python does at its end: what could not be written is gone already
    err.close()


def test_plan_draws_where_a_stream_has_no_such_signs(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "muonkit", *_words(tmp_path)["plan"]]
    shown = subprocess.run(
        words,
        env={**os.environ, "PYTHONIOENCODING": "cp1252"},
        capture_output=True,
        timeout=120,
    )
    assert shown.returncode == 0, shown.stderr.decode()
    assert (tmp_path / WRITTEN["plan"]).stat().st_size > 1000
    assert len(shown.stdout.decode("cp1252")) > 200


def _gone() -> Any:
    """A stream whose reader has left."""
    reader, writer = os.pipe()
    os.close(reader)
    return io.TextIOWrapper(os.fdopen(writer, "wb"), encoding="utf-8", line_buffering=True)


@pytest.mark.parametrize("words", [["--help"], ["compare", "--help"], []], ids=" ".join)
def test_help_for_a_reader_that_left_is_no_failure(
    words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        out = _gone()
        patch.setattr(sys, "stdout", out)
        assert main(words) == 0
        assert sys.stdout is out
        out.close()


def test_a_full_disk_under_the_output_is_a_failure(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full")
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert main(["route", "gpt2"]) == 1
        monkeypatch.undo()
    assert "No space left on device" in capsys.readouterr().err
