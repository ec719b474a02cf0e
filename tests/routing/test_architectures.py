"""Routing against tables that are written out: tests/routing/tables, reviewed by eye."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import pytest

from muonkit.routing.routes import route
from tests.helpers import architectures

if TYPE_CHECKING:
    from torch import nn

pytestmark = [
    # PEFT asks transformers for a name that transformers 5 is about to drop.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]


@pytest.fixture(params=sorted(architectures.ARCHITECTURES))
def named(request: pytest.FixtureRequest) -> tuple[str, nn.Module]:
    if request.param not in ("resnet", "convnext", "torch_transformer"):
        pytest.importorskip("transformers").logging.set_verbosity_error()
    if "lora" in request.param or "dora" in request.param:
        pytest.importorskip("peft")
    return request.param, architectures.ARCHITECTURES[request.param]()


def test_the_table_is_the_one_written_out(named: tuple[str, nn.Module]) -> None:
    name, model = named
    file = architectures.TABLES / f"{name}.txt"
    found = str(route(model, scale=architectures.SCALE))
    assert found.splitlines() == file.read_text(encoding="utf-8").splitlines()


def test_pitfall_17_every_trainable_parameter_is_claimed_once(named: tuple[str, nn.Module]) -> None:
    _, model = named
    groups = route(model).param_groups()
    claims = Counter(id(param) for group in groups for _, param in group["params"])
    assert set(claims.values()) == {1}
    # Frozen ones wait in their groups too.
    assert set(claims) == {id(p) for p in model.parameters()}


def test_every_architecture_has_a_table_and_no_table_is_left_over() -> None:
    written = {file.stem for file in architectures.TABLES.glob("*.txt")}
    assert written == set(architectures.ARCHITECTURES)


def test_the_documented_tables_are_the_tested_ones() -> None:
    text = architectures.PAGE.read_text(encoding="utf-8")
    for name in architectures.ARCHITECTURES:
        table = (architectures.TABLES / f"{name}.txt").read_text(encoding="utf-8")
        assert f"## {name}\n\n```text\n{table}```" in text, (
            "run python -m tests.helpers.architectures"
        )
