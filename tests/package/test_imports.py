"""Imports point one way, and `import muonkit` stays cheap.

The layers are read from the source with `ast`, every import counts: at the top, inside a function,
under `TYPE_CHECKING`, or by `import_module("...")`. All of them are arrows between the concepts.
"""

from __future__ import annotations

import ast
import functools
import json
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

import muonkit
from tests.helpers.paths import BENCHMARKS, DOCS, ROOT, SOURCE, TESTS

# High to low. A module imports from the layers below its own, or from its own where that closes no
# circle. A room is a module, or a folder with all that is in it; of `distributed` every file is.
# `muonkit` is the package's __init__: the public names, which nothing below may import. `scale` is
# low since the routing table prints the scale of each parameter.
LAYERS: tuple[tuple[str, ...], ...] = (
    ("lab", "testing", "_cli", "__main__"),
    ("muonkit",),
    ("integrations", "monitor", "convert", "qk_clip"),
    ("muonw", "mup", "distributed.ddp_hook"),
    ("optim",),
    ("distributed.step_plan", "distributed.rank_dtypes", "state", "settle", "saved", "checks"),
    ("distributed.sharded", "gradients", "step"),
    ("distributed.layout", "validate", "describe"),
    ("groups",),
    ("routing", "batching", "adamw", "distributed.planner"),
    ("distributed.owners", "distributed.meshes"),
    ("distributed.selected", "distributed.outbound"),
    ("distributed.plan", "distributed.exchange"),
    ("distributed.plan_batches", "distributed.machines", "distributed.transfers"),
    ("distributed.blocks",),
    ("distributed.param_layout", "distributed.nodes"),
    ("options", "int8"),
    ("selection",),
    ("distributed", "distributed.placement", "newton_schulz", "period", "scale", "stages", "views"),
    ("_compile", "_install", "_shards", "_text"),
    ("_torch",),
)
BY_FILE = ("distributed",)
HEIGHT = {room: -index for index, rooms in enumerate(LAYERS) for room in rooms}

# Rooms that may use packages beyond torch and the standard library; the lab extra brings the lab's,
# and an integration is for those who have its framework. The kernels' Triton comes with torch.
FREE_ROOMS = frozenset({"lab", "_cli", "integrations"})
EXTRA_PACKAGES = {"newton_schulz": frozenset({"triton"}), "testing": frozenset({"pytest"})}

# Placement and plan are plain arithmetic, so that 4,096 ranks are simulated without a tensor.
TORCHLESS = frozenset(
    {
        *(f"muonkit.distributed.{name}" for name in ("plan", "planner", "owners", "plan_batches")),
        *(f"muonkit.distributed.{name}" for name in ("placement", "param_layout", "machines")),
        *(f"muonkit.distributed.{name}" for name in ("transfers", "nodes", "blocks")),
        "muonkit.newton_schulz.forms",
    }
)
# A folder that knows of nothing else of ours but what talks to torch.
ALONE = {"newton_schulz": frozenset({"newton_schulz", "_compile", "_text", "_torch"})}

# torch alone loads about two thousand modules; ours are a few dozen at most, standard library's
# included, which is what keeps `import muonkit` under a tenth of a second on top of it.
MOST_NEW_MODULES = 71

Sources = Mapping[str, str]


def read_sources(root: Path) -> dict[str, str]:
    """Dotted module name -> source text, of every module below the package folder `root`."""
    sources = {}
    for path in sorted(root.rglob("*.py")):
        parts = (root.name, *path.relative_to(root).with_suffix("").parts)
        sources[".".join(parts).removesuffix(".__init__")] = path.read_text(encoding="utf-8")
    return sources


def room_of(module: str) -> str:
    """The name that stands in LAYERS: `muonkit.lab.data` -> `lab`, `muonkit` -> `muonkit`,
    `muonkit.distributed.plan` -> `distributed.plan`.
    """
    parts = module.split(".")[1:]
    if not parts:
        return module
    return ".".join(parts[:2]) if parts[0] in BY_FILE else parts[0]


def _package_of(module: str, sources: Sources) -> str:
    is_package = module == "muonkit" or any(other.startswith(module + ".") for other in sources)
    return module if is_package else module.rpartition(".")[0]


def _from_targets(node: ast.ImportFrom, module: str, sources: Sources) -> Iterator[str]:
    base = node.module or ""
    if node.level:
        package = _package_of(module, sources).split(".")
        anchor = package[: len(package) - node.level + 1]
        base = ".".join([*anchor, base] if base else anchor)
    for alias in node.names:
        submodule = f"{base}.{alias.name}"
        # `from muonkit import views` imports a module; `from torch import distributed` may.
        yield submodule if submodule in sources or base == "torch" else base


def _dynamic_target(node: ast.Call) -> str | None:
    called = node.func.attr if isinstance(node.func, ast.Attribute) else None
    called = node.func.id if isinstance(node.func, ast.Name) else called
    if called not in ("import_module", "__import__") or not node.args:
        return None
    name = node.args[0]
    return name.value if isinstance(name, ast.Constant) and isinstance(name.value, str) else None


def imports_of(module: str, sources: Sources) -> set[str]:
    """Dotted names of everything that `module` imports, relative imports resolved."""
    targets: set[str] = set()
    for node in ast.walk(ast.parse(sources[module])):
        if isinstance(node, ast.Import):
            targets.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            targets.update(_from_targets(node, module, sources))
        elif isinstance(node, ast.Call) and (target := _dynamic_target(node)):
            targets.add(target)
    return targets - {module}


def _is_inside(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def _arrows(graph: Mapping[str, set[str]]) -> Iterator[str]:
    for module, targets in graph.items():
        room = room_of(module)
        for target in sorted(targets):
            if not _is_inside(target, "muonkit"):
                package = target.partition(".")[0]
                known = package in sys.stdlib_module_names or package == "torch"
                extra = EXTRA_PACKAGES.get(room, frozenset())
                if not known and room not in FREE_ROOMS and package not in extra:
                    yield f"{module} imports {target}: the core depends on torch alone"
                if module in TORCHLESS and package == "torch":
                    yield f"{module} imports {target}: it is plain Python, without torch"
            elif room in ALONE and room_of(target) not in ALONE[room]:
                yield f"{module} imports {target}: {room} knows of nothing else of ours"
            elif HEIGHT.get(room_of(target), -99) > HEIGHT.get(room, 99):
                yield f"{module} imports {target}, which stands in a higher layer"


def _unplaced(sources: Sources) -> Iterator[str]:
    for module in sources:
        if room_of(module) not in HEIGHT:
            yield f"{module} has no layer: give it one in LAYERS of tests/package/test_imports.py"


def _inside_graph(graph: Mapping[str, set[str]], start: str) -> set[str]:
    """`start` and every module of the package that it reaches."""
    reached, waiting = set(), [start]
    while waiting:
        module = waiting.pop()
        if module not in reached:
            reached.add(module)
            waiting.extend(target for target in graph[module] if target in graph)
    return reached


def _circles(graph: Mapping[str, set[str]]) -> Iterator[str]:
    for module in graph:
        for target in sorted(graph[module]):
            if target in graph and module in _inside_graph(graph, target):
                yield f"{module} imports {target}, which imports {module} in turn"


def _distributed_orthogonalize(graph: Mapping[str, set[str]]) -> Iterator[str]:
    for start in graph:
        if room_of(start) != "newton_schulz":
            continue
        # What `_torch` imports inside a function is a name of torch's for those who call that.
        for module in sorted(_inside_graph(graph, start) - {"muonkit._torch"}):
            for target in sorted(graph[module]):
                if _is_inside(target, "torch.distributed"):
                    yield f"{start} reaches {target} (by {module}): it sees whole matrices only"


def violations(sources: Sources) -> list[str]:
    """One line for each import that points the wrong way; empty when all is well."""
    graph = {module: imports_of(module, sources) for module in sources}
    rules = (_unplaced(sources), _arrows(graph), _circles(graph), _distributed_orthogonalize(graph))
    return [line for rule in rules for line in rule]


def test_imports_point_one_way() -> None:
    sources = read_sources(SOURCE)
    assert "muonkit.views" in sources
    assert violations(sources) == []


PACKAGE = {"muonkit": "", "muonkit.views": "import torch", "muonkit.lab": "", "muonkit.lab.cli": ""}


def _row(rooms: tuple[str, ...]) -> str:
    """A layer as docs/design.md writes it: a folder's name is left out behind a file of it."""
    shown: list[str] = []
    inside = False
    for room in rooms:
        folder, dot, file = room.partition(".")
        shown.append(f".{file}" if dot and inside else room)
        inside = folder in BY_FILE and bool(dot)
    return "  ".join(shown)


def test_the_page_shows_every_layer_and_every_room() -> None:
    page = (DOCS / "design.md").read_text(encoding="utf-8")
    public = [tuple(room for room in rooms if room[0] != "_") for rooms in LAYERS]
    assert "\n  ↓\n".join(_row(rooms) for rooms in public if rooms) in page
    house = page[page.index("## The house") :].split("```")[1]
    rooms = {path.name for path in SOURCE.iterdir() if path.name[0] not in "_."} - {"py.typed"}
    assert {room for room in rooms if room not in house} == set()


@pytest.mark.parametrize(
    ("module", "source", "complaint"),
    [
        ("muonkit.views", "from muonkit.optim import Muon", "higher layer"),
        ("muonkit.views", "from .optim import Muon", "higher layer"),
        ("muonkit.views", "from . import optim", "higher layer"),
        ("muonkit.views", "def late():\n    import muonkit.lab.cli", "higher layer"),
        ("muonkit.optim", "from muonkit import View", "higher layer"),
        ("muonkit.optim", "importlib.import_module('muonkit.lab')", "higher layer"),
        ("muonkit.optim", "import numpy as np", "torch alone"),
        ("muonkit.views", "import triton", "torch alone"),
        ("muonkit.distributed.plan", "import torch", "without torch"),
        ("muonkit.distributed.placement", "from torch import Tensor", "without torch"),
        ("muonkit.newton_schulz.x", "from torch import distributed", "whole matrices only"),
        ("muonkit.newton_schulz.x", "import torch.distributed as dist", "whole matrices only"),
        ("muonkit.newton_schulz.forms", "import torch", "without torch"),
        ("muonkit.newton_schulz.x", "from muonkit.views import View", "nothing else of ours"),
        ("muonkit.distributed.plan", "import muonkit.distributed.layout", "higher layer"),
        ("muonkit.routing.judge", "from muonkit.groups import x", "higher layer"),
        ("muonkit._helpers", "", "has no layer"),
        ("muonkit.surprise", "", "has no layer"),
        ("muonkit.lab.cli", "from ..surprise import x", "has no layer"),
    ],
)
def test_a_planted_violation_is_found(module: str, source: str, complaint: str) -> None:
    sources = {**PACKAGE, "muonkit.optim": "", module: source}
    if "surprise" in source:
        sources["muonkit.surprise"] = ""
    found = violations(sources)
    assert len(found) == 1
    assert complaint in found[0]
    assert module in found[0] or "surprise" in found[0]


def test_a_circle_in_one_layer_is_found() -> None:
    sources = {
        **PACKAGE,
        "muonkit.state": "from muonkit import checks",
        "muonkit.checks": "from muonkit.settle import settle",
        "muonkit.settle": "from muonkit.state import State",
    }
    assert len(violations(sources)) == 3
    sources["muonkit.settle"] = "from muonkit.views import View"
    assert violations(sources) == []


def test_newton_schulz_may_not_reach_distributed_by_another_module() -> None:
    sources = {
        **PACKAGE,
        "muonkit.newton_schulz.orthogonalizer": "import muonkit._compile",
        "muonkit._compile": "from torch.distributed import ProcessGroup",
    }
    (found,) = violations(sources)
    assert "by muonkit._compile" in found


def test_what_is_allowed_is_not_reported() -> None:
    sources = {
        **PACKAGE,
        "muonkit": "from muonkit.optim import Muon",
        "muonkit.optim": "import math\nimport torch\nfrom . import views",
        "muonkit.distributed.exchange": "import torch.distributed as dist",
        "muonkit.newton_schulz.triton": "import triton",
        "muonkit.lab.cli": "import typer\nfrom muonkit import Muon\nfrom . import data",
        "muonkit.lab.data": "import numpy",
    }
    assert violations(sources) == []


NEW_MODULES = """
import json, sys
import torch
before = set(sys.modules)
import muonkit
print(json.dumps(sorted(set(sys.modules) - before)))
"""


def test_import_adds_no_other_package_and_nothing_distributed() -> None:
    """The causes of a slow import; benchmarks/import_time.py measures the seconds."""
    shown = subprocess.run(
        [sys.executable, "-c", NEW_MODULES], check=True, capture_output=True, text=True, timeout=120
    )
    added: list[str] = json.loads(shown.stdout)
    assert "muonkit.views" in added
    # What torch had not loaded by itself is cost, and torch.distributed is the dearest of it.
    assert [name for name in added if _is_inside(name, "torch.distributed")] == []
    known = {"muonkit", "torch", *sys.stdlib_module_names}
    assert [name for name in added if name.partition(".")[0] not in known] == []
    assert len(added) <= MOST_NEW_MODULES, added


def test_every_public_name_is_listed_by_dir() -> None:
    """Those too that are imported when they are asked for; being listed imports none of them."""
    code = (
        "import sys, muonkit\n"
        "missing = set(muonkit.__all__) - set(dir(muonkit))\n"
        "assert not missing, missing\n"
        "assert 'muonkit.monitor.monitor' not in sys.modules\n"
        "assert all(getattr(muonkit, name) is not None for name in muonkit.__all__)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


# The files that use the package, and that mypy does not read. Those of one folder import one
# another by their stems.
USERS = [*(ROOT / "examples").glob("*.py"), *BENCHMARKS.glob("*.py"), *TESTS.rglob("*.py")]
USERS += DOCS.glob("tutorial/*.py")


@functools.cache
def names_in(source: str) -> set[str]:
    """The names that a module has at its top, whatever defines them."""
    names: set[str] = set()
    # Not what is inside of functions and classes; blocks of `if` and `try` count.
    waiting: list[ast.AST] = [ast.parse(source)]
    while waiting:
        node = waiting.pop()
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            names.update((alias.asname or alias.name).partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        else:
            waiting.extend(ast.iter_child_nodes(node))
    return names


def unknown_names(source: str, modules: Sources) -> list[str]:
    """`from MODULE import NAME` of a known module that has no such name, as "MODULE.NAME"."""
    unknown = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.ImportFrom) or node.level or node.module not in modules:
            continue
        known = names_in(modules[node.module])
        if node.module == "muonkit":
            known |= set(muonkit.__all__)
        for alias in node.names:
            if alias.name not in known and f"{node.module}.{alias.name}" not in modules:
                unknown.append(f"{node.module}.{alias.name}")
    return unknown


def test_what_is_imported_is_there() -> None:
    """A name that moves within the package leaves no script behind, run by a test or not."""
    package, found = read_sources(SOURCE), {}
    for path in USERS:
        siblings = {
            other.stem: other.read_text(encoding="utf-8") for other in path.parent.glob("*.py")
        }
        if unknown := unknown_names(path.read_text(encoding="utf-8"), {**siblings, **package}):
            found[str(path.relative_to(ROOT))] = unknown
    assert len(USERS) > 100
    assert found == {}


def test_a_planted_import_of_a_name_that_moved_is_found() -> None:
    modules = {"muonkit": "", "muonkit.scale": "try:\n    import a as b\nfinally:\n    c = 1"}
    assert unknown_names("from muonkit.scale import b, c", modules) == []
    assert unknown_names("from muonkit import Muon, scale\nfrom other import x", modules) == []
    for source in ("from muonkit.scale import gone", "def f():\n    from muonkit import gone"):
        assert [name.rpartition(".")[2] for name in unknown_names(source, modules)] == ["gone"]
