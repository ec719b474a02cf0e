"""A model's routes in few lines, for tables that a reader can check: verdict, then names.

    embedding  transformer.{wte, wpe}
    transpose  transformer.h.*.attn.c_proj  transformer.h.*.mlp.{c_fc, c_proj}

The verdict is the view of a Muon matrix, and of an AdamW one what it is: head, embedding, stem, or
adamw. The index of a layer is written `*` wherever the verdict does not depend on it, `.weight` is
left out, names under one module share its name before braces. Frozen parameters are left out, and
vectors, unless they are output heads or embeddings.

`python -m tests.helpers.routing_compact` writes tests/routing/reviewed anew from what `route` says
today: read every line that changed before you keep it.
"""

from __future__ import annotations

import itertools
import re
import textwrap
from collections import defaultdict
from typing import TYPE_CHECKING

from tests.helpers.paths import TESTS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from torch import nn

    from muonkit.routing.routes import Route, Routes

REVIEWED = TESTS / "routing" / "reviewed"
_INDEX = re.compile(r"(?<=\.)\d+(?=\.|$)|^\d+(?=\.)")


def compact(routes: Routes) -> list[str]:
    """Lines of `verdict  names`, verdicts in the order of their first parameter, wrapped."""
    kept = [r for r in routes if r.algorithm != "frozen" and not _is_plain_vector(r)]
    names = {r.name: _short(r.name) for r in kept}
    verdicts = {r.name: verdict(r) for r in kept}
    stars = _collapse(names, verdicts)
    groups: dict[str, dict[str, None]] = defaultdict(dict)
    for r in kept:
        groups[verdicts[r.name]].setdefault(stars[r.name])
    width = max((len(v) for v in groups), default=0)
    lines = []
    for said, found in groups.items():
        indent = " " * (width + 2)
        lines += textwrap.wrap(
            _braces(list(found)),
            100,
            initial_indent=said.ljust(width + 2),
            subsequent_indent=indent,
            break_long_words=False,
            break_on_hyphens=False,
        )
    return lines


def read(name: str) -> dict[str, list[str]]:
    """The reviewed tables of one file, by model."""
    tables: dict[str, list[str]] = {}
    for section in (REVIEWED / f"{name}.txt").read_text(encoding="utf-8").split("\n\n"):
        title, *lines = section.strip().splitlines()
        tables[title.strip("[]")] = lines
    return tables


def write(name: str, tables: Iterable[tuple[str, list[str]]]) -> None:
    """Write one file of tables."""
    sections = ["\n".join([f"[{title}]", *lines]) for title, lines in tables]
    (REVIEWED / f"{name}.txt").write_text("\n\n".join(sections) + "\n", encoding="utf-8")


def verdict(r: Route) -> str:
    """The view of a Muon matrix; of an AdamW one what it is."""
    if r.view is not None:
        return r.view
    if r.reason.startswith("output head"):
        return "head"
    if "stem" in r.reason:
        return "stem"
    return "embedding" if "embedding" in r.reason else "adamw"


def _is_plain_vector(r: Route) -> bool:
    vector = sum(extent != 1 for extent in r.shape) <= 1
    return vector and verdict(r) not in ("head", "embedding") and r.view is None


def _short(name: str) -> str:
    name = re.sub(r"\.parametrizations\.weight\.original1$", "", name)
    return name.removesuffix(".weight")


def _collapse(names: dict[str, str], verdicts: dict[str, str]) -> dict[str, str]:
    """Every name with as many of its indices starred as leave its verdict the same.

    All of them, or all but the last, or none.
    """
    pending, stars = list(names), {}
    for keep in (0, 1, 99):
        found = defaultdict(set)
        for name in names:
            found[_star(names[name], keep)].add(verdicts[name])
        for name in list(pending):
            if len(found[_star(names[name], keep)]) == 1 or keep == 99:
                stars[name] = _star(names[name], keep)
                pending.remove(name)
    return stars


def _star(name: str, keep: int) -> str:
    spans = list(_INDEX.finditer(name))
    for match in reversed(spans[: max(len(spans) - keep, 0)]):
        name = name[: match.start()] + "*" + name[match.end() :]
    return name


def _braces(names: list[str]) -> str:
    parts = []
    for prefix, group in itertools.groupby(names, lambda n: n.rpartition(".")[0]):
        tails = [n.rpartition(".")[2] for n in group]
        dot = f"{prefix}." if prefix else ""
        parts.append(f"{dot}{tails[0]}" if len(tails) == 1 else f"{dot}{{{', '.join(tails)}}}")
    return "  ".join(parts)


def main() -> None:
    """Write all tables as `route` gives them now."""
    from muonkit.routing.routes import route
    from tests.helpers import models_own as zoo_own
    from tests.helpers import models_transformers as zoo_transformers

    builds: list[tuple[str, Iterable[str], Callable[[str], nn.Module]]] = [
        ("own", zoo_own.MODELS, zoo_own.build),
        ("transformers", zoo_transformers.CONFIGS, zoo_transformers.build),
    ]
    for name, models, build in builds:
        write(name, ((model, compact(route(build(model)))) for model in models))


if __name__ == "__main__":
    main()
