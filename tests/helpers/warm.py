"""Python commands in processes that have torch already.

`import torch` takes two seconds of a core, and the suite starts Python more than a hundred times.
These processes are forked from one that has imported it, as the ranks of `distributed_helpers` are;
what is run in them is the command as `python ARGUMENTS` would run it. What a test says of imports,
or of an installed environment, wants an interpreter of its own instead.
"""

from __future__ import annotations

import atexit
import io
import multiprocessing
import os
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import traceback
import types
from collections.abc import Mapping, Sequence
from multiprocessing import forkserver
from pathlib import Path

from tests.helpers.paths import ROOT

__all__ = ["CONTEXT", "Command", "preload", "run", "start"]

CONTEXT = multiprocessing.get_context("forkserver")

_PRELOADED = [
    "pytest",
    "torch._dynamo",
    "torch.distributed.checkpoint",
    "torch.distributed.checkpoint.state_dict",
    "torch.distributed.fsdp",
    "torch.distributed.tensor.parallel",
    "torch.nn.parallel",
    "muonkit.lab.cli",
    "muonkit.lab.jobs",
    "muonkit.lab.report",
    "sklearn.datasets",
]


def preload() -> None:
    """What every process has that is begun after this; before the first one."""
    CONTEXT.set_forkserver_preload(_PRELOADED)


def start() -> None:
    """Begin the process that they are forked from."""
    preload()
    forkserver.ensure_running()


class Command:
    """A command that runs: as `subprocess.Popen`, as far as the tests need it.

    Args:
        arguments: what follows `python`: `-c CODE`, `-m MODULE` or a script, and its arguments.
        env: the whole environment; None is this process's.
        new_session: as `setsid` makes one: a signal to its process group reaches its children.
    """

    def __init__(
        self,
        arguments: Sequence[str],
        *,
        cwd: str | Path | None = None,
        env: Mapping[str, str] | None = None,
        input: str = "",
        new_session: bool = False,
    ) -> None:
        self._folder = path = Path(tempfile.mkdtemp(prefix="command-"))
        (path / "in").write_text(input, encoding="utf-8")
        preload()
        self._process = CONTEXT.Process(
            target=_become,
            args=(
                [str(a) for a in arguments],
                path,
                str(cwd or Path.cwd()),
                dict(os.environ if env is None else env),
                new_session,
            ),
        )
        self._process.start()

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        self._process.kill()

    def communicate(self, timeout: float | None = None) -> tuple[bytes, bytes]:
        """Wait for its end; what it has written to standard output and error.

        Raises:
            subprocess.TimeoutExpired: it did not end; it is killed.
        """
        self._process.join(timeout)
        late = self._process.exitcode is None
        if late:
            self._process.kill()
            self._process.join()
        out, err = (
            (self._folder / name).read_bytes() if (self._folder / name).exists() else b""
            for name in _OUT
        )
        shutil.rmtree(self._folder)
        if late:
            raise subprocess.TimeoutExpired("python", timeout or 0.0, out, err)
        return out, err


_OUT = ("out", "err")


def run(
    arguments: Sequence[str],
    *,
    cwd: str | Path | None = None,
    env: Mapping[str, str] | None = None,
    input: str = "",
    timeout: float = 240.0,
) -> subprocess.CompletedProcess[str]:
    """As `subprocess.run(["python", *arguments], capture_output=True, text=True)`."""
    command = Command(arguments, cwd=cwd, env=env, input=input)
    out, err = (each.decode() for each in command.communicate(timeout))
    assert command.returncode is not None
    return subprocess.CompletedProcess(["python", *arguments], command.returncode, out, err)


# --- in the process ---------------------------------------------------------------------------


def _become(
    arguments: list[str], folder: Path, cwd: str, env: dict[str, str], new_session: bool
) -> None:
    if new_session:
        os.setsid()
    _die_with_the_server()
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    _redirect(folder, env)
    status = 0
    try:
        _run(arguments)
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else int(error.code is not None)
        if error.code is not None and not isinstance(error.code, int):
            print(error.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    atexit._run_exitfuncs()
    sys.exit(status)


def _redirect(folder: Path, env: Mapping[str, str]) -> None:
    """The standard streams, to and from files, encoded as Python would."""
    encoding = env.get("PYTHONIOENCODING", "utf-8")
    for number, (name, flags) in enumerate(
        (("in", os.O_RDONLY), *((name, os.O_WRONLY | os.O_CREAT | os.O_APPEND) for name in _OUT))
    ):
        descriptor = os.open(folder / name, flags)
        os.dup2(descriptor, number)
        os.close(descriptor)
    raw = [open(number, mode, closefd=False) for number, mode in enumerate(("rb", "wb", "wb"))]  # noqa: SIM115
    sys.stdin, sys.stdout = (io.TextIOWrapper(stream, encoding) for stream in raw[:2])
    sys.stderr = io.TextIOWrapper(raw[2], encoding, "backslashreplace", write_through=True)


def _run(arguments: list[str]) -> None:
    sys.path[:] = [path for path in sys.path if path and path != str(ROOT)]
    if arguments[0] == "-m":
        sys.path.insert(0, os.getcwd())
        sys.argv = arguments[1:]
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    elif arguments[0] == "-c":
        sys.path.insert(0, "")
        sys.argv = ["-c", *arguments[2:]]
        main = types.ModuleType("__main__")
        sys.modules["__main__"] = main
        exec(compile(arguments[1], "<string>", "exec"), main.__dict__)
    else:
        sys.path.insert(0, str(Path(arguments[0]).resolve().parent))
        sys.argv = arguments
        runpy.run_path(arguments[0], run_name="__main__")


def _die_with_the_server() -> None:
    """A test process that is killed takes the commands with it (where the system can)."""
    try:
        from torch.multiprocessing import _prctl_pr_set_pdeathsig

        _prctl_pr_set_pdeathsig(signal.SIGKILL)
    except Exception:
        return
