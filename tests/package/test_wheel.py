"""The built wheel, installed in an empty environment and used from outside the checkout."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from email.message import Message
from email.parser import Parser
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import muonkit._cli
from muonkit._install import install_line
from tests.helpers.paths import ROOT


def run(*command: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run to the end, with nothing of this checkout on the path; the caller judges the status."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    return subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from the source distribution as a package index would have it."""
    out = tmp_path_factory.mktemp("dist")
    built = run(
        sys.executable, "-m", "build", "--no-isolation", "--outdir", out, ROOT, cwd=out.parent
    )
    assert built.returncode == 0, built.stdout + built.stderr
    (path,) = out.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of an environment that holds the wheel; torch is lent by a .pth file."""
    home = tmp_path_factory.mktemp("environment")
    venv.create(home, with_pip=False, system_site_packages=False)
    python = home / "bin" / "python"
    done = run(
        sys.executable, "-m", "pip", "--python", python,
        "install", "--quiet", "--no-deps", "--no-index", wheel,
        cwd=home,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    # The path alone is lent: .pth files that stand there, an editable muonkit's among them, are
    # not read again.
    (site_packages,) = home.glob("lib/python*/site-packages")
    (site_packages / "lent.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python


@pytest.fixture(scope="module")
def names(wheel: Path) -> list[str]:
    with zipfile.ZipFile(wheel) as archive:
        return archive.namelist()


def read(wheel: Path, suffix: str) -> str:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(suffix))
        return archive.read(name).decode()


@pytest.fixture(scope="module")
def metadata(wheel: Path) -> Message:
    return Parser().parsestr(read(wheel, ".dist-info/METADATA"))


def test_the_installed_package_is_imported_from_outside(
    installed: Path, metadata: Message, tmp_path: Path
) -> None:
    shown = run(
        installed, "-I", "-c",
        "import muonkit, torch; print(muonkit.__file__); print(muonkit.__version__)",
        cwd=tmp_path,
    )  # fmt: skip
    assert shown.returncode == 0, shown.stderr
    path, version = shown.stdout.split()
    assert Path(path).is_relative_to(installed.parents[1])
    assert version == metadata["Version"]


def test_the_wheel_holds_the_whole_package_and_nothing_else(names: list[str]) -> None:
    ours = {
        f"muonkit/{path.relative_to(ROOT / 'src' / 'muonkit').as_posix()}"
        for path in (ROOT / "src" / "muonkit").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert "muonkit/py.typed" in ours
    ours.add("muonkit_pytest.py")  # the way to muonkit.testing, which pytest imports in every run
    assert {name for name in names if ".dist-info/" not in name} == ours


def test_the_licence_is_in_the_wheel(names: list[str], metadata: Message) -> None:
    assert [name for name in names if name.endswith(".dist-info/licenses/LICENSE")]
    assert metadata["License-Expression"] == "MIT"


def test_only_torch_is_required(metadata: Message) -> None:
    requirements = [Requirement(line) for line in metadata.get_all("Requires-Dist", [])]
    core = [each for each in requirements if "extra ==" not in str(each.marker)]
    assert [each.name for each in core] == ["torch"]
    # A range: an exact pin would take the user's own torch away.
    assert [bound.operator for bound in core[0].specifier] == [">="]
    assert set(metadata.get_all("Provides-Extra", [])) == {
        "lab",
        "dev",
        "docs",
        "testing",
        "tutorial",
    }
    assert metadata["Requires-Python"] == ">=3.11"


def test_the_console_script_starts(
    wheel: Path, installed: Path, metadata: Message, tmp_path: Path
) -> None:
    points = read(wheel, ".dist-info/entry_points.txt")
    assert "muonkit = muonkit._cli:main" in points
    assert "[pytest11]\nmuonkit = muonkit_pytest" in points
    shown = run(installed.parent / "muonkit", "--version", cwd=tmp_path)
    assert shown.returncode == 0, shown.stderr
    assert metadata["Version"] in shown.stdout


def test_without_the_lab_extra_the_command_names_the_remedy(
    installed: Path, tmp_path: Path
) -> None:
    script = installed.parent / "muonkit"
    # None in sys.modules is Python's own way to make an import fail as if nothing were installed.
    hide = (
        "import runpy, sys; sys.modules.update(dict.fromkeys(('typer', 'rich')));"
        f"runpy.run_path({str(script)!r}, run_name='__main__')"
    )
    shown = run(installed, "-I", "-c", hide, cwd=tmp_path)
    assert shown.returncode == 2
    assert shown.stdout == ""
    (line,) = shown.stderr.splitlines()
    assert install_line("lab") in line
    assert "typer" in line or "rich" in line


def test_the_line_that_installs_names_the_repository_once_it_is_known(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The package is on no index: `pip install "muonkit[lab]"` would find nothing, or another's."""
    assert install_line("lab") == 'pip install ".[lab]" in a checkout of muonkit'
    given = Message()
    given["Project-URL"] = "Repository, https://example.org/muonkit"
    monkeypatch.setattr("importlib.metadata.metadata", lambda _: given)
    assert install_line("lab") == 'pip install "muonkit[lab] @ git+https://example.org/muonkit"'


def test_a_fault_of_our_own_is_not_called_a_missing_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "muonkit.lab.cli", None)
    with pytest.raises(ModuleNotFoundError, match=r"muonkit\.lab\.cli"):
        muonkit._cli.main()
