"""Random rows of events: no undocumented exception, nothing written by what was refused."""

from __future__ import annotations

from collections import Counter

from tests.helpers import event_fuzz


def test_sequences_of_events_end_in_a_step_or_in_a_documented_error() -> None:
    counts: Counter[str] = Counter()
    for seed in range(150):
        counts += event_fuzz.run(seed)
    # Every event took place, and most of those that can be refused were, once at least.
    assert {name.rpartition(" ")[0] for name in counts} == {e.__name__ for e in event_fuzz.EVENTS}
    assert counts["step ok"] > 100
    assert sum(name.endswith("refused") for name in counts) >= 10
