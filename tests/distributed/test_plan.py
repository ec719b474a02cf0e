"""The plan: everything once, equal things together, never above the cap."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from muonkit.distributed.plan_batches import Item, make_batches

items = st.builds(
    Item,
    key=st.sampled_from("ab"),
    device=st.sampled_from(["cpu", "cuda"]),
    matrices=st.integers(1, 4),
    rows=st.sampled_from([4, 16, 96, 700]),
    cols=st.sampled_from([4, 27, 144, 900]),
    itemsize=st.just(4),
).map(lambda item: item._replace(key=(item.key, item.device)))


@given(st.lists(items, max_size=30), st.sampled_from([1, 10_000, 10**9]))
def test_batches_are_complete_capped_and_hold_their_matrices(
    given_items: list[Item], cap: int
) -> None:
    batches = make_batches(tuple(given_items), cap)
    assert sorted(i for batch in batches for i in batch.positions) == list(range(len(given_items)))
    for batch in batches:
        mine = [given_items[i] for i in batch.positions]
        assert len({item.key for item in mine}) == 1
        assert list(batch.positions) == sorted(batch.positions)
        for item in mine:
            same = (item.rows, item.cols) == (batch.rows, batch.cols)
            sides = sorted((item.rows, item.cols))
            assert same or (sides[0] <= batch.rows and sides[1] <= batch.cols)
        nbytes = sum(item.matrices * batch.rows * batch.cols * item.itemsize for item in mine)
        assert nbytes <= cap or len(mine) == 1


def matrices(*shapes: tuple[int, int], device: str = "cpu") -> tuple[Item, ...]:
    return tuple(Item("fp32", device, 1, rows, cols, 4) for rows, cols in shapes)


def test_equal_shapes_share_a_batch_and_large_ones_are_not_padded() -> None:
    gpt2 = matrices((2304, 768), (768, 768), (3072, 768), (768, 3072)) * 3
    batches = make_batches(gpt2)
    assert [(b.rows, b.cols) for b in batches] == [tuple(item[3:5]) for item in gpt2[:4]]
    assert {len(b.positions) for b in batches} == {3}


def test_small_shapes_share_a_batch_by_padding() -> None:
    """The convolutions of a ResNet-20's first stage: one batch."""
    (batch,) = make_batches(matrices((16, 27), *[(16, 144)] * 6))
    assert (batch.rows, batch.cols) == (16, 144)
    # A tall matrix is transposed into a wide batch.
    (batch,) = make_batches(matrices((8, 20), (20, 8)))
    assert (batch.rows, batch.cols) == (8, 20)


def test_equal_shapes_over_the_cap_are_several_batches() -> None:
    many = matrices(*[(100, 100)] * 5)
    assert [b.positions for b in make_batches(many, cap=90_000)] == [(0, 1), (2, 3), (4,)]
    # As few as the cap allows, and of about equal size.
    many = matrices(*[(100, 100)] * 12)
    assert [len(b.positions) for b in make_batches(many, cap=7 * 40_000)] == [6, 6]


def test_a_joined_batch_keeps_the_order() -> None:
    (batch,) = make_batches(matrices((4, 4), (4, 27), (4, 4)))
    assert batch.positions == (0, 1, 2)


def test_many_shapes_are_planned_at_once() -> None:
    """Joining is for the handful of shapes of a real model; looking at all pairs is cubic."""
    shapes = [(8 + i, 9 + 7 * i % 500) for i in range(500)]
    assert len(make_batches(matrices(*shapes))) == 500
