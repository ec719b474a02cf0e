"""A sample as trackers want it: numbers by name, and samples of distributions by name."""

from __future__ import annotations

import importlib
from collections import Counter
from typing import Any

__all__ = ["histograms", "load", "scalars"]

# Keys of a record that are no measurements.
_NAMES = frozenset({"name", "index", "group", "algorithm", "members", "owners", "rank"})


def load(module: str, package: str) -> Any:
    """Import a tracker.

    Raises:
        ImportError: it is not installed; with the command that installs it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f"this sink needs {package}, which cannot be imported ({error}): pip install {package}"
        ) from None


def scalars(sample: dict[str, Any]) -> dict[str, float]:
    """Every number of a sample that there is, by its path::

    group/0 muon/update_rms         matrix/blocks.0.qkv.weight[1]/orthogonality_error
    matrix/head.weight/momentum/stable_rank        parameter/norm.weight/update_norm
    rank/0/bytes_to_owners
    """
    found: dict[str, float] = {"skipped": float(sample["skipped"])}
    for place, record in _placed(sample):
        for key, value in record.items():
            if key == "spectra":
                for kind, spectrum in value.items():
                    for measure, number in (spectrum or {}).items():
                        if measure != "quantiles":
                            found[f"{place}/{kind}/{measure}"] = number
            elif key == "nonfinite":
                found |= {f"{place}/nonfinite/{kind}": n for kind, n in value.items()}
            elif key not in _NAMES and value is not None:
                found[f"{place}/{key}"] = value
    return found


def histograms(sample: dict[str, Any]) -> dict[str, list[float]]:
    """The quantiles of every spectrum, as equally many singular values."""
    return {
        f"{place}/{kind}": spectrum["quantiles"]
        for place, record in _placed(sample)
        for kind, spectrum in record.get("spectra", {}).items()
        if spectrum and "quantiles" in spectrum
    }


def _placed(sample: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """The records, and what their numbers are called after."""
    parts = Counter(record["name"] for record in sample["matrices"])
    placed = [(f"group/{r['group']} {r['algorithm']}", r) for r in sample["groups"]]
    for record in sample["matrices"]:
        index = f"[{record['index']}]" if parts[record["name"]] > 1 else ""
        placed.append((f"matrix/{record['name']}{index}", record))
    placed += [(f"parameter/{r['name']}", r) for r in sample["parameters"]]
    return placed + [(f"rank/{r['rank']}", r) for r in sample["ranks"]]
