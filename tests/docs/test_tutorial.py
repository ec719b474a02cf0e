"""The tutorial's notebooks run, in their short form; what their text claims is asserted in them.

They are kept as text (docs/tutorial/*.py) and executed as a reader's Jupyter would: in a kernel,
from the folder that they are in.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from muonkit._install import install_line
from tests.helpers import warm
from tests.helpers.paths import ROOT, SHARED

TUTORIAL = ROOT / "docs" / "tutorial"
NOTEBOOKS = sorted(TUTORIAL.glob("[0-9][0-9]_*.py"))
DATA = SHARED / "data"  # where a checkout has data sets beside it; else the digits

names = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def environment(data: Path = DATA) -> dict[str, str]:
    """As a reader has it, but for the short form; conftest's back end for plots shows none.

    Args:
        data: where data sets are looked for; a folder that is missing says at once what a download
            without a network says after its timeouts.
    """
    kept = {key: value for key, value in os.environ.items() if key != "MPLBACKEND"}
    return {**kept, "MUONKIT_TUTORIAL": "quick", "MUONKIT_DATA": str(data)}


# Kernels that wait for the next notebook, by their environment.
_kernels: dict[tuple[tuple[str, str], ...], Any] = {}

# As in a kernel of its own, but for what was imported: that takes longer than most notebooks.
_ANEW = """
get_ipython().run_line_magic("reset", "-f")
__spec__ = None  # which multiprocessing asks of the main module
import matplotlib.pyplot
matplotlib.pyplot.close("all")
del matplotlib
"""


@pytest.fixture(scope="module", autouse=True)
def _no_kernel_is_left() -> Iterator[None]:
    yield
    for manager in _kernels.values():
        manager.shutdown_kernel(now=True)
    _kernels.clear()


def executed(text: str, data: Path = DATA, **variables: str) -> Any:
    """The notebook with its outputs.

    Args:
        variables: of the environment, besides.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell raised.
    """
    jupytext = pytest.importorskip("jupytext", reason=install_line("tutorial"))
    nbclient = pytest.importorskip("nbclient", reason=install_line("tutorial"))
    pytest.importorskip("ipykernel", reason=install_line("tutorial"))
    from jupyter_client.manager import KernelManager

    notebook = jupytext.reads(f"# %%{_ANEW}\n{text}", fmt="py:percent")
    env = {**environment(data), **variables}
    key = tuple(sorted({"MUONKIT_DATA": str(data), **variables}.items()))
    with warnings.catch_warnings():
        # Of jupyter's own packages and the sockets between them and the kernel; not of the cells',
        # which are in another process and come back as text.
        warnings.simplefilter("ignore")
        if key not in _kernels:
            _kernels[key] = KernelManager(kernel_name="python3")
            _kernels[key].start_kernel(env=env, cwd=str(TUTORIAL))
        client = nbclient.NotebookClient(notebook, km=_kernels[key], timeout=240)
        try:
            client.execute()
        finally:
            if client.kc is not None:
                client.kc.stop_channels()
    del notebook.cells[0]
    return notebook


def outputs(notebook: Any) -> list[Any]:
    return [output for cell in notebook.cells for output in cell.get("outputs", [])]


def printed(notebook: Any, stream: str) -> str:
    return "".join(output.text for output in outputs(notebook) if output.get("name") == stream)


# The others run in `make test-all`, where they take up to half of a minute each.
OFTEN = ("05", "07", "08")


@pytest.mark.parametrize(
    "path",
    [
        pytest.param(path, marks=[] if path.name[:2] in OFTEN else [pytest.mark.whole])
        for path in NOTEBOOKS
    ],
    ids=lambda path: path.stem,
)
def test_notebook_runs(path: Path) -> None:
    notebook = executed(path.read_text(encoding="utf-8"))
    assert printed(notebook, "stderr") == ""  # no warnings
    assert printed(notebook, "stdout")
    # Every figure that is drawn is shown.
    shown = sum("image/png" in output.get("data", {}) for output in outputs(notebook))
    assert shown >= path.read_text(encoding="utf-8").count("plt.show()")


# What a CPU with bf16 units says of itself; the products are right without them, but slow. Read at
# the start of every interpreter, so that the ranks of notebook 6 have it too.
BF16_UNITS = """
import torch

features = torch.cpu.get_capabilities()
torch.cpu.get_capabilities = lambda: {**features, "avx512_bf16": True}
"""


@pytest.mark.whole
@pytest.mark.parametrize(
    "path",
    [path for path in NOTEBOOKS if path.name[:2] in ("03", "06", "08")],
    ids=lambda p: p.stem,
)
def test_notebook_runs_where_products_are_in_bfloat16(path: Path, tmp_path: Path) -> None:
    """Those that hold results to a tolerance."""
    (tmp_path / "sitecustomize.py").write_text(BF16_UNITS)
    check = '\n\n# %%\nassert torch.cpu.get_capabilities()["avx512_bf16"]\n'
    paths = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    executed(path.read_text(encoding="utf-8") + check, PYTHONPATH=paths)


@pytest.mark.parametrize("whole", [False, True], ids=["its data", "all of it"])
@pytest.mark.whole
def test_without_data_the_digits_stand_in(tmp_path: Path, whole: bool) -> None:
    text = (TUTORIAL / "04_experiments.py").read_text(encoding="utf-8")
    names = "mnist", "cifar10"
    if not whole:
        first, setup, *_ = text.split("\n# %%\n")
        asked = [f"print(task_or_digits({name!r})[1].description)" for name in names]
        text = "\n# %%\n".join([first, setup, *asked])
    notebook = executed(text, data=tmp_path / "missing")
    for name in names:
        said = f"NOTE: {name} is not to be had, scikit-learn's digits stand in for it."
        assert said in printed(notebook, "stdout")


def test_a_false_claim_fails() -> None:
    nbclient = pytest.importorskip("nbclient", reason=install_line("tutorial"))
    with pytest.raises(nbclient.exceptions.CellExecutionError, match="AssertionError"):
        executed("# %%\nassert 1 + 1 == 3\n")


@names
def test_notebook_without_the_extra_is_one_line(path: Path, tmp_path: Path) -> None:
    """As in an environment where muonkit alone is installed."""
    code = (
        "import runpy, sys\n"
        "for name in [name for name in sys.modules if name.startswith('muonkit.lab.')]:\n"
        "    del sys.modules[name]\n"
        "sys.modules['matplotlib'] = sys.modules['muonkit.lab'] = None\n"
        f"runpy.run_path({str(path)!r})"
    )
    done = warm.run(["-c", code], cwd=tmp_path, env=environment())
    assert done.returncode == 1
    assert len(done.stderr.strip().splitlines()) == 1
    assert 'in a checkout of muonkit, pip install ".[tutorial]"' in done.stderr


@names
def test_notebook_has_its_parts(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    code = re.findall(r"^# %%(?! \[)", text, re.MULTILINE)
    assert 5 <= len(code) <= 15
    number = path.stem.split("_")[0].removeprefix("0")
    assert f"# # {number}. " in text
    remembered, exercises = text.index("# ## What to remember"), text.index("# ## Exercises")
    answers = text.index("<details><summary>Answers</summary>")
    assert remembered < exercises < answers
    # Colab: the first cell installs muonkit where it is not there, and only there.
    first = text.index('# %% tags=["hide-input"]\n')
    assert text.index('find_spec("muonkit") is None') < text.index("# %%", first + 1)
    # The page begins with what came out: in words, and what one of the cells shows.
    assert "**Result.**" in text[:first]
    assert text.count('"result"') == 1


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """docs/notebooks.py, on copies of two notebooks, one with a file beside it."""
    for name in ("jupytext", "nbformat"):
        pytest.importorskip(name, reason=install_line("docs"))
    spec = importlib.util.spec_from_file_location("notebooks", ROOT / "docs" / "notebooks.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for name in ("08_lessons.py", "08_lessons.ipynb", "06_many_ranks.py", "06_many_ranks.ipynb"):
        shutil.copy(TUTORIAL / name, tmp_path)
    shutil.copy(TUTORIAL / "ranks.py", tmp_path)
    monkeypatch.setattr(module, "TUTORIAL", tmp_path)
    return module


@pytest.mark.parametrize(
    ("file", "change", "why"),
    [
        ("08_lessons.py", ("torch.manual_seed(0)", "torch.manual_seed(1)"), "are of other code"),
        ("08_lessons.py", ("Muon is forty lines", "Muon is fifty lines"), "its text is another"),
        ("08_lessons.py", ('["hide-input"]', '["result"]'), "its text is another"),
        ("ranks.py", ("def ", "def  "), "are of other code"),
        ("08_lessons.ipynb", ("", ""), "it was never executed"),
    ],
)
def test_a_build_of_the_site_ends_where_a_notebook_is_stale(
    site: Any, tmp_path: Path, file: str, change: tuple[str, str], why: str
) -> None:
    from mkdocs.exceptions import PluginError

    site.on_config(None)
    path = tmp_path / file
    if path.suffix == ".ipynb":
        path.unlink()
    else:
        path.write_text(path.read_text("utf-8").replace(*change, 1), encoding="utf-8")
    with pytest.raises(PluginError, match=rf"stale notebooks .*{why}.*run `make tutorial`"):
        site.on_config(None)


def test_a_new_version_makes_every_notebook_stale(
    site: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("muonkit.__version__", "99.0.0")
    assert all("other code" in (site.stale(source) or "") for source in site.sources())


def test_text_is_renewed_without_executing_anything(
    site: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "08_lessons.py"
    path.write_text(path.read_text("utf-8").replace("forty lines", "41 lines", 1), "utf-8")
    before = site.nbformat.read(site.kept(path), 4)
    monkeypatch.setattr(site, "execute", None)
    assert site.renew(path) == "text renewed"
    assert site.stale(path) is None
    after = site.nbformat.read(site.kept(path), 4)
    assert [c.get("outputs") for c in after.cells] == [c.get("outputs") for c in before.cells]
    assert "41 lines" in after.cells[0].source


def test_the_address_is_said_once_and_used_in_cells_and_badges(
    site: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "08_lessons.py"
    page, _ = site.page(site.nbformat.read(site.kept(path), 4), path.stem)
    assert ("Open in Colab" in page) is (site.repository() is not None)
    address = "https://github.com/owner/muonkit"
    monkeypatch.setattr(site, "repository", lambda: address)
    assert site.stale(path) == "its text is another"
    site.renew(path)
    notebook = site.nbformat.read(site.kept(path), 4)
    assert f'REPOSITORY = "{address}"' in notebook.cells[1].source
    page, pictures = site.page(notebook, path.stem)
    assert (
        "(https://colab.research.google.com/github/owner/muonkit/blob/main/docs/tutorial/"
        "08_lessons.ipynb)"
    ) in page
    # What the cells printed and drew is on the page, the result first, plumbing folded.
    assert page.index("gradient times   torch.optim.Muon") < page.index("[the notebook]")
    assert page.count('<details class="code"') == path.read_text("utf-8").count('"hide-input"')
    assert {"08_lessons-1.svg", "08_lessons-1-dark.svg"} == set(pictures)


def test_muon_from_scratch_is_forty_lines() -> None:
    text = (TUTORIAL / "03_from_scratch.py").read_text(encoding="utf-8")
    source = text[text.index("def newton_schulz") : text.index("# ## Is it right?")]
    lines = [line for line in source.splitlines() if line and not line.startswith("#")]
    assert len(lines) <= 40


def test_the_page_lists_every_notebook() -> None:
    page = (TUTORIAL / "index.md").read_text(encoding="utf-8")
    linked = set(re.findall(r"\]\((\d\d_\w+\.py)\)", page))
    assert linked == {path.name for path in NOTEBOOKS}
    assert len(NOTEBOOKS) == 8
