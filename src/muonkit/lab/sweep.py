"""Which learning rate, embedding rate and weight decay: the same grids and rules for all.

The best is the one with the lowest final *validation* loss. One that diverges counts as infinite.

*By halving*, the default, in three rounds. First the grid, in runs of a quarter of the steps (each
with the whole schedule) on seed 0: learning rates are a factor of two apart, by default five,
centred on the default; while the best is the lowest or the highest tried, as many more as lie on
one side are tried beyond it, at most twice. Then, in whole runs on seed 0, the best and its two
neighbours, and further ones while the best has a neighbour that no whole run has had, at most four:
what is best in a short run need not be in a long one. Then the better two of these on the
other seeds that choose, and the mean decides.

*In full*, every value of the grid is trained in whole runs on every seed that chooses.

Weight decays, with the learning rate that was chosen, reach from a tenth of the default to ten
times it, as many as there are learning rates, and no further: below a tenth it hardly acts in runs
as short as these, and so a widened grid would follow the noise. For the same reason they are tried
in whole runs only.
"""

import math
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import TypeAlias, TypeVar

POINTS = 5
FACTOR = 2.0
EXTENSIONS = 2
DECAY_REACH = 10.0
#: A short run has this part of the steps.
PART = 4
#: Whole runs that may be added to the first three, one by one.
WALK = 4

_Found = TypeVar("_Found")
_Wanted = TypeVar("_Wanted")
_Key = TypeVar("_Key", int, float)

#: A search in steps: it yields values, is sent the loss with each (infinite where a run diverged),
#: and returns what it found. So the searches of several optimizers can go side by side.
Search: TypeAlias = Generator[Sequence[float], Sequence[float], _Found]


@dataclass(frozen=True)
class Trial:
    """One run of a search: a value, in a run of 1/part of the steps, on a seed."""

    value: float
    part: int = 1
    seed: int = 0


#: As `Search`, run by run.
Trials: TypeAlias = Generator[Sequence[Trial], Sequence[float], _Found]


def side_by_side(
    searches: Mapping[str, Generator[_Wanted, Sequence[float], _Found]],
    losses_of: Callable[[dict[str, _Wanted]], Mapping[str, Sequence[float]]],
) -> dict[str, _Found]:
    """What each of the searches finds.

    Args:
        losses_of: the losses of what those want that are not at their end, asked for together.
    """
    found: dict[str, _Found] = {}
    told: Mapping[str, Sequence[float] | None] = dict.fromkeys(searches)
    while True:
        wanted: dict[str, _Wanted] = {}
        for name, search in searches.items():
            if name in found:
                continue
            try:
                wanted[name] = search.send(told[name])  # type: ignore[arg-type]
            except StopIteration as end:
                found[name] = end.value
        if not wanted:
            return found
        told = losses_of(wanted)


def on_seeds(search: Search[_Found], seeds: int = 1, part: int = 1) -> Trials[_Found]:
    """A search whose values are each tried on so many seeds, and judged by the mean."""
    losses = None
    while True:
        try:
            values = search.send(losses)  # type: ignore[arg-type]
        except StopIteration as end:
            found: _Found = end.value
            return found
        tried = yield [Trial(x, part, seed) for x in values for seed in range(seeds)]
        losses = [fmean(tried[i : i + seeds]) for i in range(0, len(tried), seeds)]


def _value(centre: float, factor: float, power: int) -> float:
    """``centre``·``factor``^``power`` to six digits, so that it reads the same in every place."""
    return float(f"{centre * factor**power:.6g}") if power else centre


def _widened(centre: float, factor: float, reach: int, extensions: int) -> Search[dict[int, float]]:
    """The losses over a grid, by power of the factor; widened while the best is at an edge."""
    losses: dict[int, float] = {}
    powers = range(-reach, reach + 1)
    for extension in range(extensions + 1):
        found = yield [_value(centre, factor, power) for power in powers]
        losses.update(zip(powers, found, strict=True))
        best = _lowest(losses)[0]
        if extension == extensions or min(losses) < best < max(losses):
            break
        powers = (
            range(best - reach, best) if best == min(losses) else range(best + 1, best + reach + 1)
        )
    return losses


def _best(centre: float, factor: float, reach: int, extensions: int) -> Search[float]:
    losses = yield from _widened(centre, factor, reach, extensions)
    return _value(centre, factor, _lowest(losses)[0])


def _lowest(losses: dict[_Key, float]) -> list[_Key]:
    """The keys by their losses; the lower key first where these are equal: where all diverged, the
    way to go is down.
    """
    return sorted(losses, key=lambda key: (losses[key], key))


def best_rate(centre: float, points: int = POINTS) -> Search[float]:
    """The learning rate with the lowest validation loss.

    Args:
        centre: the middle of the grid.
        points: in the grid before it is widened; odd, 3 at least.
    """
    return _best(centre, FACTOR, points // 2, EXTENSIONS)


def best_decay(centre: float, points: int = POINTS) -> Search[float]:
    """The weight decay with the lowest validation loss, ``points`` of them, ``centre`` included."""
    reach = points // 2
    return _best(centre, DECAY_REACH ** (1 / reach), reach, 0)


# --- by halving ------------------------------------------------------------------------------


def halved_rate(centre: float, points: int = POINTS, seeds: int = 1) -> Trials[float]:
    """The learning rate with the lowest validation loss.

    Args:
        centre: the middle of the grid.
        points: in the grid before it is widened; odd, 3 at least.
        seeds: that choose between the better two.
    """
    grid = _widened(centre, FACTOR, points // 2, EXTENSIONS)
    short = yield from on_seeds(grid, part=PART)
    best = _lowest(short)[0]
    whole: dict[int, float] = {}
    for _ in range(WALK + 1):
        missing = [power for power in (best - 1, best, best + 1) if power not in whole]
        if not missing:
            break
        found = yield [Trial(_value(centre, FACTOR, power)) for power in missing]
        whole.update(zip(missing, found, strict=True))
        best = _lowest(whole)[0]
    return (yield from _decided({_value(centre, FACTOR, p): x for p, x in whole.items()}, seeds))


def halved_decay(centre: float, points: int = POINTS, seeds: int = 1) -> Trials[float]:
    """The weight decay with the lowest validation loss, ``points`` of them, ``centre`` included."""
    reach = points // 2
    factor = DECAY_REACH ** (1 / reach)
    losses = yield from on_seeds(_widened(centre, factor, reach, 0))
    return (yield from _decided({_value(centre, factor, p): x for p, x in losses.items()}, seeds))


def _decided(first: dict[float, float], seeds: int) -> Trials[float]:
    """The best of what seed 0 found, after the better two were trained on the other seeds."""
    two = _lowest(first)[:2]
    means = {value: first[value] for value in two}
    sound = [value for value in two if math.isfinite(first[value])]
    if seeds > 1 and len(sound) > 1:
        trials = [Trial(value, seed=seed) for value in two for seed in range(1, seeds)]
        found = iter((yield trials))
        means = {
            value: fmean([first[value], *(next(found) for _ in range(1, seeds))]) for value in two
        }
    return _lowest(means)[0]
