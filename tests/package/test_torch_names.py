"""Private and young names of torch stand in `muonkit._torch` alone, with their fallbacks.

Whatever else the package touched would break with a torch that has it not, and nobody would know
where to look. `make test-oldest` runs the tests on the oldest torch that `pyproject.toml` admits.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

import pytest

from tests.helpers.paths import SOURCE

HOME = "_torch.py"

# Not torch's: of named tuples, and of os.
OTHERS = {"_asdict", "_exit", "_fields", "_replace"}
# transformers', of its configurations.
OTHERS |= {"_attn_implementation", "_experts_implementation"}
# DGL's, in which its layers keep their widths.
OTHERS |= {"_in_feats", "_in_src_feats", "_out_feats"}

# Public, but not in every torch that pyproject.toml admits (2.9 and later), as documented there.
YOUNG = {"get_capabilities", "is_acl_available", "reduce_scatter_single", "all_gather_single"}


def _is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def own_names(tree: ast.AST) -> Iterator[str]:
    """The private names that a file defines, or gives to its own objects."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.attr


def foreign_names(tree: ast.AST, own: set[str]) -> Iterator[tuple[int, str]]:
    """(line, name) of all private names that are not ours, and of young ones."""
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Attribute):
            names = [node.attr]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("torch"):
            names = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
        elif isinstance(node, ast.Import):
            parts = [alias.name.split(".") for alias in node.names]
            names = [name for some in parts if some[0] == "torch" for name in some]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            # As getattr and a module's or function's __dict__ take it.
            names = [node.value] if re.fullmatch(r"_?[a-z]\w*", node.value) else []
        for name in names:
            if name in YOUNG or (
                _is_private(name)
                and name not in own | OTHERS
                # torch's manual documents these, and every torch has them.
                and not name.startswith("_foreach_")
            ):
                yield node.lineno, name


def violations(sources: dict[str, str]) -> list[str]:
    trees = {name: ast.parse(text) for name, text in sources.items()}
    own = {name for tree in trees.values() for name in own_names(tree)}
    return [
        f"{name}:{line}: {what} belongs into {HOME}"
        for name, tree in trees.items()
        if name != HOME
        for line, what in foreign_names(tree, own)
    ]


def test_private_and_young_names_of_torch_have_one_home() -> None:
    paths = sorted(SOURCE.rglob("*.py"))
    sources = {str(p.relative_to(SOURCE)): p.read_text(encoding="utf-8") for p in paths}
    assert HOME in sources
    assert violations(sources) == []


@pytest.mark.parametrize(
    "line",
    [
        "root = mesh._get_root_mesh()",
        "own = tensor._local_tensor",
        "from torch.distributed.tensor._utils import compute_local_shape_and_global_offset",
        "from torch.distributed.tensor.placement_types import _StridedShard",
        "import torch._dynamo",
        "torch._C._functorch.is_functorch_wrapped_tensor(tensor)",
        "function.__dict__['_dynamo_marked_constant'] = True",
        "getattr(dist, 'reduce_scatter_single')",
        "torch.cpu.get_capabilities()",
        "for p in module._parameters.values(): pass",
    ],
)
def test_a_planted_name_is_found(line: str) -> None:
    ours = (
        "class A:\n    def f(self):\n        self._mine = torch._foreach_add_\n        self._mine"
    )
    assert violations({HOME: line, "other.py": ours}) == []
    assert len(violations({HOME: "", "other.py": f"{ours}\n\n{line}"})) >= 1
