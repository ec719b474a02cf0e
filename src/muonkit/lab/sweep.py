"""Which learning rate and which weight decay: the same grids and the same rule for every optimizer.

The best is the one with the lowest final *validation* loss, the mean over the seeds that choose:
seed 0 alone unless more are asked for. One that diverges on any of them counts as infinite.

Learning rates are a factor of two apart, by default five, centred on the default; while the best is
the lowest or the highest tried, as many more as lie on one side are tried beyond it, at most twice.

Weight decays, with the learning rate that was chosen, reach from a tenth of the default to ten
times it, as many as there are learning rates, and no further: below a tenth it hardly acts in runs
as short as these, and so a widened grid would follow the noise.
"""

from collections.abc import Generator, Sequence

POINTS = 5
FACTOR = 2.0
EXTENSIONS = 2
DECAY_REACH = 10.0

#: A search in steps: it yields values, is sent the loss with each (infinite where a run diverged),
#: and returns the best. So the searches of several optimizers can go side by side.
Search = Generator[Sequence[float], Sequence[float], float]


def _value(centre: float, factor: float, power: int) -> float:
    """``centre``·``factor``^``power`` to six digits, so that it reads the same in every place."""
    return float(f"{centre * factor**power:.6g}") if power else centre


def _best(centre: float, factor: float, reach: int, extensions: int) -> Search:
    """The value with the lowest validation loss; the lowest value if all diverged."""
    losses: dict[int, float] = {}
    powers = range(-reach, reach + 1)
    for extension in range(extensions + 1):
        found = yield [_value(centre, factor, power) for power in powers]
        losses.update(zip(powers, found, strict=True))
        # Between equal losses the lower rate wins: where all diverged, the way to go is down.
        best = min(losses, key=lambda power: (losses[power], power))
        if extension == extensions or min(losses) < best < max(losses):
            break
        powers = (
            range(best - reach, best) if best == min(losses) else range(best + 1, best + reach + 1)
        )
    return _value(centre, factor, best)


def best_rate(centre: float, points: int = POINTS) -> Search:
    """The learning rate with the lowest validation loss.

    Args:
        centre: the middle of the grid.
        points: in the grid before it is widened; odd, 3 at least.
    """
    return _best(centre, FACTOR, points // 2, EXTENSIONS)


def best_decay(centre: float, points: int = POINTS) -> Search:
    """The weight decay with the lowest validation loss, ``points`` of them, ``centre`` included."""
    reach = points // 2
    return _best(centre, DECAY_REACH ** (1 / reach), reach, 0)
