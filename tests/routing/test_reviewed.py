"""Routing of whole architectures against tables that were read by eye: tests/routing/reviewed.

What stands there is what is right, not what `route` says: where the two still differ, the model is
named in WRONG with the reason, and the test fails once they agree.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from muonkit.routing.routes import Route, route
from tests.helpers import models_own as zoo_own
from tests.helpers import models_transformers as zoo_transformers
from tests.helpers import routing_compact

if TYPE_CHECKING:
    from torch import nn

OWN = routing_compact.read("own")
TRANSFORMERS = routing_compact.read("transformers")

WRONG: dict[str, str] = {}


def _marked(names: object) -> list[object]:
    return [
        pytest.param(
            name,
            marks=[pytest.mark.xfail(strict=True, reason=WRONG[name])] if name in WRONG else [],
        )
        for name in names  # type: ignore[attr-defined]
    ]


@pytest.mark.parametrize("name", _marked(OWN))
def test_a_model_of_our_own_is_routed_as_reviewed(name: str) -> None:
    _check(zoo_own.build(name), OWN[name])


@pytest.mark.parametrize("name", _marked(TRANSFORMERS))
def test_a_hugging_face_model_is_routed_as_reviewed(name: str) -> None:
    transformers = pytest.importorskip("transformers", minversion="5.24")
    transformers.logging.set_verbosity_error()
    _check(zoo_transformers.build(name), TRANSFORMERS[name])


def test_every_model_has_a_table_and_no_table_is_left_over() -> None:
    assert list(OWN) == list(zoo_own.MODELS)
    assert list(TRANSFORMERS) == list(zoo_transformers.CONFIGS)
    assert set(WRONG) <= {*OWN, *TRANSFORMERS}


def _check(model: nn.Module, expected: list[str]) -> None:
    routes = route(model)
    assert routing_compact.compact(routes) == expected
    assert not [r.name for r in routes if _is_vector(r) and r.algorithm == "muon"]


def _is_vector(r: Route) -> bool:
    """At most one dimension is not one, or the matrix that its view flattens it to is one row."""
    return sum(extent != 1 for extent in r.shape) <= 1 or (r.view == "flatten" and r.shape[0] == 1)
