"""Which learning rate and which weight decay: the same grids and the same rule for every optimizer.

The best is the one with the lowest final *validation* loss on seed 0.

Learning rates are a factor of two apart, by default five, centred on the default; while the best is
the lowest or the highest tried, as many more as lie on one side are tried beyond it, at most twice.

Weight decays, with the learning rate that was chosen, reach from a tenth of the default to ten
times it, as many as there are learning rates, and no further: below a tenth it hardly acts in runs
as short as these, and so a widened grid would follow the noise.
"""

from collections.abc import Callable, Sequence

from muonkit.lab.train import Result

POINTS = 5
FACTOR = 2.0
EXTENSIONS = 2
DECAY_REACH = 10.0

#: Trains with each of these values (or gives back what it gave before), in their order.
Attempt = Callable[[Sequence[float]], Sequence[Result]]


def _value(centre: float, factor: float, power: int) -> float:
    """``centre``·``factor``^``power`` to six digits, so that it reads the same in every place."""
    return float(f"{centre * factor**power:.6g}") if power else centre


def _best(centre: float, factor: float, reach: int, extensions: int, attempt: Attempt) -> float:
    """The value with the lowest validation loss; the lowest value if all diverged."""
    losses: dict[int, float] = {}

    def attempt_all(powers: Sequence[int]) -> None:
        results = attempt([_value(centre, factor, power) for power in powers])
        for power, result in zip(powers, results, strict=True):
            losses[power] = float("inf") if result.val_loss is None else result.val_loss

    def best() -> int:
        # Of equal ones the lower: where all diverged, the way to go is down.
        return min(losses, key=lambda power: (losses[power], power))

    attempt_all(range(-reach, reach + 1))
    for _ in range(extensions):
        if best() == min(losses):
            attempt_all(range(best() - reach, best()))
        elif best() == max(losses):
            attempt_all(range(best() + 1, best() + reach + 1))
        else:
            break
    return _value(centre, factor, best())


def best_rate(centre: float, attempt: Attempt, points: int = POINTS) -> float:
    """The learning rate with the lowest validation loss.

    Args:
        centre: the middle of the grid.
        points: in the grid before it is widened; odd, 3 at least.
    """
    return _best(centre, FACTOR, points // 2, EXTENSIONS, attempt)


def best_decay(centre: float, attempt: Attempt, points: int = POINTS) -> float:
    """The weight decay with the lowest validation loss, ``points`` of them, ``centre`` included."""
    reach = points // 2
    return _best(centre, DECAY_REACH ** (1 / reach), reach, 0, attempt)
