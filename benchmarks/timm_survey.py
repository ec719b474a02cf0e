"""How timm's models are routed: `python benchmarks/timm_survey.py [name or pattern ...]`.

Without names it takes the first of all models of one file that differ in sizes alone, as their
names have it; `--all` takes every one.

Needs `pip install timm` (it is no dependency; where torchvision is missing, the names of it that
timm asks for are stood in for: no model calls them while it is built).
Models are built on the meta device. timm says itself which layer is the classifier and which the
first convolution (`default_cfg`), so a table is held against that; whatever else a reader should
look at is listed as doubtful: raised, a head or stem that timm does not know, a matrix that AdamW
gets for another reason than being a head, stem, embedding, table or depthwise convolution, a raw
parameter that goes to Muon, a fused layer that may not be one. docs/routing-survey.md has the last
run, and what was found by reading it.
"""

from __future__ import annotations

import argparse
import fnmatch
import importlib.abc
import importlib.machinery
import importlib.util
import re
import sys
import types
import warnings
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

import muonkit
from muonkit.routing.routes import route

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from muonkit.routing.routes import Route

# Reasons that need no second look: AdamW's for a matrix, and Muon's.
_CLEAR = re.compile(
    r"output head|first convolution|linear embedding of the input|embedding|positional"
    r"|token or positional|depthwise convolution|bias \(a table|elementwise|broadcast|norm "
    r"|small table|per-channel filters|[0-9]+ experts, each flattened"
)
_PLAIN = re.compile(
    r"hidden linear|hidden convolution|fused|two fused|recurrent|attention|router"
    r"|transposed convolution|[0-9]+ (transposed )?convolution groups"
)
_FUSED = re.compile(r"[._]?(qkv|kv|qk|to_kv)(_proj)?[.]weight$")


@dataclass
class Surveyed:
    """One model: what raised, or its counts and what is doubtful, as "parameter: why"."""

    name: str
    family: str = ""
    raised: str = ""
    muon: int = 0
    adamw: int = 0
    doubtful: list[str] = field(default_factory=list)


# -- torchvision, where it is missing --------------------------------------------------------------


class _Standin(type(nn.Module)):  # type: ignore[misc]
    def __getattr__(cls, name: str) -> str:
        if name.startswith("_"):
            raise AttributeError(name)
        return name


class _Module(types.ModuleType):
    __path__: tuple[str, ...] = ()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Standin(name, (nn.Module,), {})


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(
        self, name: str, path: object = None, target: object = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name.split(".")[0] != "torchvision":
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return _Module(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        pass


def import_timm() -> Any:
    """timm, with a stand-in for a torchvision that is not there."""
    if importlib.util.find_spec("torchvision") is None:
        sys.meta_path.append(_Finder())
    import timm

    return timm


# -- one model -------------------------------------------------------------------------------------


def examine(timm: Any, name: str) -> Surveyed:
    """Build and route one model."""
    found = Surveyed(name, _family(timm, name))
    try:
        with torch.device("meta"):
            model = timm.create_model(name)
    except Exception as error:
        found.raised = f"not built: {type(error).__name__}: {str(error)[:80]}"
        return found
    try:
        routes = list(route(model))
    except ValueError as error:
        found.raised = f"not routed: {' '.join(str(error).splitlines()[1:2])}"
        return found
    found.muon = sum(r.algorithm == "muon" for r in routes)
    found.adamw = sum(r.algorithm == "adamw" and _is_matrix(r) for r in routes)
    found.doubtful = [*_against_timm(model, routes), *_second_look(routes)]
    return found


def _is_matrix(r: Route) -> bool:
    return sum(extent != 1 for extent in r.shape) > 1


def _is_head(r: Route) -> bool:
    return r.reason.startswith("output head")


def _is_stem(r: Route) -> bool:
    return "stem" in r.reason


def _against_timm(model: nn.Module, routes: Sequence[Route]) -> Iterable[str]:
    """Heads and stems that timm knows and `route` does not, or the other way round."""
    config = getattr(model, "default_cfg", None) or {}
    for what, key, is_one in (("head", "classifier", _is_head), ("stem", "first_conv", _is_stem)):
        known = config.get(key) or ()
        known = (known,) if isinstance(known, str) else tuple(known)
        names = {f"{k}.weight" for k in known} & {r.name for r in routes if _is_matrix(r)}
        for r in routes:
            if r.name in names and not is_one(r):
                yield f"{what} missed: {_row(r)}"
            if names and r.name not in names and is_one(r) and _is_matrix(r):
                yield f"{what} that timm does not name: {_row(r)}"
    if getattr(model, "num_classes", 1) and not any(map(_is_head, routes)):
        yield "no head"


def _second_look(routes: Sequence[Route]) -> Iterable[str]:
    for r in routes:
        if r.algorithm == "adamw" and _is_matrix(r) and not _CLEAR.match(r.reason):
            yield f"AdamW: {_row(r)}"
        if r.algorithm == "muon" and not _PLAIN.match(r.reason):
            yield f"Muon: {_row(r)}"
        if _FUSED.search(r.name) and r.view in ("matrix", "flatten"):
            yield f"fused by name, kept whole: {_row(r)}"
        if "by shape" in r.reason:
            yield f"fused by shape: {_row(r)}"


def _row(r: Route) -> str:
    """Name and reason; the shape is left out so that sizes of one family read alike."""
    return f"{re.sub(r'(?<=[.])[0-9]+(?=[.])', '*', r.name)} ({r.reason}; {r.view or 'adamw'})"


# -- all of them -----------------------------------------------------------------------------------


_SIZE = re.compile(
    r"(?<![a-z])(tiny|small|base|medium|large|giant|huge|gigantic|enormous|nano|pico|femto|atto|zepto"
    r"|micro|mini|x*[smlt]|b|g|h|p|so|little|reduced|wee|pwee|dwee|plus|clip|dlittle|betwixt"
    r"|mediumd|xlarge|xxlarge|xxtiny|in21k|in22k|in22ft1k)?[0-9.]*(?![a-z])"
)


def one_of_each(timm: Any, names: Iterable[str]) -> list[str]:
    """The first of all names of one file that are one name but for sizes."""
    kinds: dict[tuple[str, str], str] = {}
    for name in names:
        sizeless = re.sub(r"[0-9]+", "", _SIZE.sub("", name))
        kinds.setdefault((_family(timm, name), sizeless.strip("_")), name)
    return list(kinds.values())


def _family(timm: Any, name: str) -> str:
    return str(timm.models._registry._model_to_module.get(name, ""))


def survey(patterns: Sequence[str], every: bool = False) -> list[Surveyed]:
    """Examine the models whose name matches a pattern; without patterns all, or one of each."""
    timm = import_timm()
    names = timm.list_models()
    if patterns:
        names = [n for n in names if any(fnmatch.fnmatchcase(n, p) for p in patterns)]
    elif not every:
        names = one_of_each(timm, names)
    found = []
    for name in names:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found.append(examine(timm, name))
        print(f"\r{len(found)} of {len(names)}: {name}".ljust(79), end="", file=sys.stderr)
    print(file=sys.stderr)
    return found


def report(found: Sequence[Surveyed]) -> list[str]:
    """Markdown: counts, what raised, what is doubtful with the models it occurs in."""
    built = [s for s in found if not s.raised.startswith("not built")]
    routed = [s for s in built if not s.raised]
    doubtful = [s for s in routed if s.doubtful]
    lines = [
        "| | models | families |",
        "|---|---|---|",
        *(
            f"| {what} | {len(some)} | {len({s.family for s in some})} |"
            for what, some in (
                ("asked for", found),
                ("built", built),
                ("routed", routed),
                ("to be read by eye", doubtful),
            )
        ),
    ]
    kinds: dict[str, list[Surveyed]] = defaultdict(list)
    for s in found:
        for kind in [s.raised] if s.raised else sorted(set(s.doubtful)):
            kinds[kind].append(s)
    by_family: Counter[tuple[str, str]] = Counter()
    for kind, some in kinds.items():
        for s in some:
            by_family[s.family, kind] += 1
    lines += ["", "| family | models | what |", "|---|---|---|"]
    lines += [f"| {f} | {n} | {kind} |" for (f, kind), n in sorted(by_family.items())]
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("pattern", nargs="*", help="names, or patterns as in fnmatch")
    parser.add_argument("--all", action="store_true", help="every model, whatever its size")
    given = parser.parse_args()
    found = survey(given.pattern, given.all)
    timm = sys.modules["timm"]
    print(f"timm {timm.__version__}, torch {torch.__version__}, muonkit {muonkit.__version__}\n")
    print("\n".join(report(found)))
    return 1 if any(s.raised for s in found) else 0


if __name__ == "__main__":
    sys.exit(main())
