"""The plan: everything once, equal things together, never above the cap."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from muonkit.plan import Item, make_batches


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 50)), max_size=30))
def test_batches_are_equal_capped_and_complete(given_items: list[tuple[str, int]]) -> None:
    items = [Item(i, key, size) for i, (key, size) in enumerate(given_items)]
    batches = make_batches(items, cap=60)
    assert sorted(item.position for batch in batches for item in batch) == list(range(len(items)))
    for batch in batches:
        assert len({item.key for item in batch}) == 1
        assert [item.position for item in batch] == sorted(item.position for item in batch)
        assert sum(item.nbytes for item in batch) <= 60 or len(batch) == 1
    # As few as first-come allows: of two neighbours with one key, the second did not fit.
    for key in "abc":
        mine = [batch for batch in batches if batch[0].key == key]
        for one, two in itertools.pairwise(mine):
            assert sum(item.nbytes for item in one) + two[0].nbytes > 60
