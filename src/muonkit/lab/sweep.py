"""Which learning rate: the same grid for every optimizer, widened when the best lies at its edge.

The best is the one with the lowest final *validation* loss on seed 0. The grid has five points a
factor of two apart, centred on the default; while the best is the lowest or the highest tried,
two more points are tried beyond it, at most twice.
"""

from collections.abc import Callable

from muonkit.lab.train import Result

FACTOR = 2.0
REACH = 2
EXTENSIONS = 2


def rate(centre: float, power: int) -> float:
    """``centre``·2^``power`` to six digits, so that it reads the same in every place."""
    return float(f"{centre * FACTOR**power:.6g}")


def best_rate(
    centre: float, attempt: Callable[[float], Result], more: Callable[[int], None]
) -> float:
    """The learning rate with the lowest validation loss; the lowest one if all diverged.

    Args:
        centre: the middle of the grid.
        attempt: trains with one learning rate (or gives back what it gave before).
        more: is told how many further attempts follow.
    """
    losses: dict[int, float] = {}

    def attempt_all(powers: range) -> None:
        more(len(powers))
        for power in powers:
            result = attempt(rate(centre, power))
            losses[power] = float("inf") if result.val_loss is None else result.val_loss

    def best() -> int:
        # Of equal ones the lower: where all diverged, the way to go is down.
        return min(losses, key=lambda power: (losses[power], power))

    attempt_all(range(-REACH, REACH + 1))
    for _ in range(EXTENSIONS):
        if best() == min(losses):
            attempt_all(range(best() - REACH, best()))
        elif best() == max(losses):
            attempt_all(range(best() + 1, best() + REACH + 1))
        else:
            break
    return rate(centre, best())
