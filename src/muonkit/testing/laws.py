"""The laws in one process, each a short function that raises on the smallest input that breaks it.

A law judges an optimizer by what it does to weights and never by how it does it. Where weights
begin at zero, a step's update is -W / lr, exactly; whatever can be said of the optimizer's own
updates among themselves is said so, in float64: two inputs that must give the same update, or the
same but for a factor. So no schedule of coefficients, no order of products and no option is
presumed.

Two updates are the same when they differ by less than `SAME` of their norm, by the dtype of the
products. Inputs have singular values between 0.25 and 1: there the Newton-Schulz iterations are
contracting or flat. Two roundings of one input in bfloat16 were found up to 15 % apart (Polar
Express, whose first polynomial is the steepest); what the laws look for is 40 % and more.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import io
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from muonkit._text import shortened, unknown
from muonkit.testing.adapter import CLAIMS, SAME, Subject, told

__all__ = [
    "LAWS",
    "Broken",
    "Finding",
    "Law",
    "check",
    "given",
    "judge",
    "law",
    "matrix",
    "see_reasons",
]

# Small to large: the first that breaks a law is the smallest input.
SHAPES = ((2, 3), (8, 8), (4, 16), (16, 4), (32, 32))


class Broken(AssertionError):
    """A law does not hold."""


@dataclass(frozen=True)
class Law:
    """A law: what it states, what has to be claimed for it, and what went wrong elsewhere.

    Attributes:
        claims: keys of `CLAIMS`, all of which it needs.
        elsewhere: where it was broken in public, or why it matters.
        world_size: the number of ranks; 0 for one process that knows of none.
    """

    name: str
    function: Callable[[Subject], None]
    states: str
    claims: tuple[str, ...]
    elsewhere: str
    world_size: int = 0

    def missing(self, subject: Subject) -> list[str]:
        """What it needs and the subject does not claim."""
        return [claim for claim in self.claims if not subject.claims(claim)]


@dataclass(frozen=True)
class Finding:
    """What became of one law.

    Attributes:
        verdict: "pass", "fail" or "does not claim".
        input: the smallest input that breaks it; "" where it holds.
        message: what was found there, or what is not claimed.
        deliberate: why the optimizer breaks it on purpose; "" where nothing was said.
    """

    law: str
    verdict: str
    input: str = ""
    message: str = ""
    deliberate: str = ""

    def __str__(self) -> str:
        told = f": {self.input}: {self.message}" if self.input else f": {self.message}"
        return f"{self.law}: {self.verdict}{told if self.message else ''}"


LAWS: dict[str, Law] = {}


def law(
    *claims: str, elsewhere: str = "", world_sizes: Sequence[int] = (0,)
) -> Callable[[Callable[[Subject], None]], Callable[[Subject], None]]:
    """Register a function as a law, on each number of ranks; its docstring is what it states."""

    def register(function: Callable[[Subject], None]) -> Callable[[Subject], None]:
        assert set(claims) <= CLAIMS.keys()
        states = " ".join((function.__doc__ or "").split())
        for size in world_sizes:
            name = function.__name__ + (f"-on-{size}-ranks" if size else "")
            assert name not in LAWS
            needs = claims or ("matrices",)
            LAWS[name] = Law(name, function, states, needs, " ".join(elsewhere.split()), size)
        return function

    return register


def check(subject: Subject, laws: Iterable[str] | None = None) -> list[Finding]:
    """Hold a subject to the laws of one process, or to those that are named.

    Raises:
        LookupError: a law of that name does not exist, or one that the subject breaks on purpose.
        ValueError: one of them is for several ranks, which `muonkit.testing.check_on_ranks` has.
    """
    see_reasons(subject)
    names = [law.name for law in LAWS.values() if not law.world_size] if laws is None else laws
    findings = []
    for name in names:
        if name not in LAWS:
            raise LookupError(unknown("law", name, LAWS))
        if LAWS[name].world_size:
            raise ValueError(f"{name} is a law on ranks: use muonkit.testing.check_on_ranks")
        findings.append(judge(LAWS[name], subject))
    return findings


def see_reasons(subject: Subject) -> None:
    """See that what is broken on purpose are laws.

    Raises:
        LookupError: one of them is none.
    """
    functions = {law.function.__name__: None for law in LAWS.values()}
    for name, _ in subject.deliberate:
        if name not in LAWS and name not in functions:
            raise LookupError(unknown("law in Subject's deliberate,", name, functions))


def judge(law: Law, subject: Subject) -> Finding:
    """Try one law on a subject, in this process."""
    if missing := law.missing(subject):
        what = "; ".join(CLAIMS[claim] for claim in missing)
        return Finding(law.name, "does not claim", message=what)
    torch.manual_seed(0)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what an optimizer warns of is no law
            law.function(subject)
    except (Exception, SystemExit) as error:
        on = getattr(error, "smallest_input", "")
        what = shortened(error, 300) if isinstance(error, Broken) else told(error)
        return Finding(law.name, "fail", on, what, subject.why(law.name))
    return Finding(law.name, "pass")


@contextlib.contextmanager
def given(what: str) -> Iterator[None]:
    """Whatever is raised inside says on which input it was."""
    try:
        yield
    except (Exception, SystemExit) as error:
        if not hasattr(error, "smallest_input"):
            error.smallest_input = what  # type: ignore[union-attr]
        raise


# --- inputs and measures ------------------------------------------------------------------------


def matrix(
    rows: int, cols: int, *, seed: int = 0, rank: int | None = None, least: float = 0.25
) -> Tensor:
    """Singular values from 1 down to `least`, in random directions; exactly zero beyond `rank`."""
    return _matrix(rows, cols, seed, rank, least).clone()


@functools.lru_cache(maxsize=1024)
def _matrix(rows: int, cols: int, seed: int, rank: int | None, least: float) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    k = min(rows, cols)
    U = torch.linalg.qr(torch.randn(rows, k, generator=generator, dtype=torch.float64)).Q
    V = torch.linalg.qr(torch.randn(cols, k, generator=generator, dtype=torch.float64)).Q
    values = torch.linspace(1, least, k, dtype=torch.float64)
    if rank is not None:
        values[rank:] = 0
    made: Tensor = ((U * values) @ V.mT).float()
    return made


def stack(*shape: int, seed: int = 0) -> Tensor:
    """Matrices as above along the first dim."""
    return torch.stack([matrix(*shape[1:], seed=seed + i) for i in range(shape[0])])


def kernel(*shape: int, seed: int = 0) -> Tensor:
    """A convolution's gradient, out x in x kh x kw, whose matrix is as above."""
    return matrix(shape[0], math.prod(shape[1:]), seed=seed).view(shape)


def zeros_like(gradients: Sequence[Tensor], dtype: torch.dtype | None = None) -> list[nn.Parameter]:
    return [nn.Parameter(torch.zeros_like(g, dtype=dtype)) for g in gradients]


def give(params: Sequence[nn.Parameter], gradients: Sequence[Tensor | None]) -> None:
    """Fresh gradients, that nothing else holds."""
    for p, g in zip(params, gradients, strict=True):
        p.grad = None if g is None else g.detach().to(p.dtype).clone()


def run(
    subject: Subject,
    params: Sequence[nn.Parameter],
    steps: Sequence[Sequence[Tensor | None]],
    *,
    lr: float = 1.0,
    weight_decay: float = 0.0,
    blocks: int | None = None,
) -> Optimizer:
    optimizer = subject.optimizer(params, lr=lr, weight_decay=weight_decay, blocks=blocks)
    for gradients in steps:
        give(params, gradients)
        optimizer.step()
    return optimizer


def updates(
    subject: Subject,
    gradients: Sequence[Tensor],
    *,
    dtype: torch.dtype | None = None,
    blocks: int | None = None,
) -> list[Tensor]:
    """The first step's updates, in float64: of all parameters in one optimizer."""
    params = zeros_like(gradients, dtype)
    run(subject, params, [gradients], blocks=blocks)
    return [-p.detach().double() for p in params]


def update(subject: Subject, gradient: Tensor, **options: Any) -> Tensor:
    """The first step's update of one parameter that is trained alone."""
    return updates(subject, [gradient], **options)[0]


def off(got: Tensor, expected: Tensor) -> float:
    """The norm of the difference, in units of the expected one's; infinite for a NaN."""
    got, expected = got.detach().double(), expected.detach().double()
    size = float(expected.norm())
    difference = float((got - expected).norm())
    if not math.isfinite(difference):
        return math.inf
    if not size:
        return math.inf if difference else 0.0
    return difference / size


def same(
    subject: Subject, got: Tensor, expected: Tensor, what: str, dtype: torch.dtype | None = None
) -> None:
    """The two are one update, up to the roundings of the products.

    Args:
        dtype: that the weights are kept in, where it is not float32.

    Raises:
        Broken: they are not.
    """
    most = max(SAME[subject.products], SAME[dtype or torch.float32])
    if expected.norm() == 0:
        raise Broken(f"{what}: nothing moved, and a nonzero gradient was given")
    found = off(got, expected)
    if math.isinf(found):
        raise Broken(f"{what}: not finite here")
    if not found <= most:
        raise Broken(f"{what}: off by {100 * found:.3g} % of its norm, at most {100 * most:g} %")


def same_direction(
    subject: Subject, got: Tensor, expected: Tensor, what: str, dtype: torch.dtype | None = None
) -> None:
    """The same, but for a factor: both are divided by their norms."""
    got, expected = (t.double() / t.double().norm().clamp_min(1e-300) for t in (got, expected))
    same(subject, got, expected, what, dtype)


def shape_of(tensor: Tensor) -> str:
    return " × ".join(map(str, tensor.shape))


# --- the orthogonalization ----------------------------------------------------------------------


@law(elsewhere="without it an optimizer that ignored its gradient kept every law")
def the_update_is_near_the_polar_factor(subject: Subject) -> None:
    """Where the gradient's singular values lie between 0.25 and 1, what the first step subtracts
    has a cosine above 0.9 with the gradient's polar factor (U V^T of its singular value
    decomposition), on wide, tall and square matrices."""
    # Singular values in [0.68, 1.14], Keller Jordan's, have a cosine of 0.97 with ones.
    for rows, cols in (*SHAPES, (16, 16)):
        with given(f"a {rows} × {cols} gradient"):
            gradient = matrix(rows, cols)
            U, _, Vh = torch.linalg.svd(gradient.double(), full_matrices=False)
            got, polar = update(subject, gradient), U @ Vh
            cosine = float((got * polar).sum() / (got.norm() * polar.norm()))
            if not cosine > 0.9:  # NaN is neither
                raise Broken(f"the cosine is {cosine:.3g}")


@law(elsewhere="schedules that are cut short, or have another table's safety factor")
def singular_values_are_alike(subject: Subject) -> None:
    """Where the gradient's singular values lie between 0.03 and 1, those of the update lie within a
    factor of 2 of one another."""
    # Keller Jordan's five steps, the loosest in use, leave them in [0.68, 1.14]: 1.7. The smallest
    # of 32 is here 0.009 of the norm, which two or three steps leave too small.
    for rows, cols in SHAPES:
        for least in (0.25, 0.03):
            with given(f"a {rows} × {cols} gradient with singular values from {least} to 1"):
                gradient = matrix(rows, cols, least=least)
                values = torch.linalg.svdvals(update(subject, gradient))
                # A NaN is in no range, and an update of zeros has no direction.
                if not 0 < values[0] <= 2 * values[-1]:
                    raise Broken(f"they lie between {values[-1]:.3g} and {values[0]:.3g}")


@law(
    elsewhere="the Gram form in 16-bit dtypes gave singular values up to 20; one library made it "
    "the default and took it back the next day"
)
def low_rank_is_bounded(subject: Subject) -> None:
    """A gradient without full rank (unused experts, zero rows, tiny batches) gives an update that
    is finite, and no singular value of which exceeds 2.2 times the smallest of a well-conditioned
    gradient of the shape."""
    # 1.5 at most (the law on orthogonalizers), where well-conditioned ones are 0.68 at least.
    for rows, cols in SHAPES:
        base = torch.linalg.svdvals(update(subject, matrix(rows, cols)))[-1]
        for rank in sorted({1, max(1, min(rows, cols) // 2)}):
            with given(f"a {rows} × {cols} gradient of rank {rank}"):
                largest = torch.linalg.svdvals(update(subject, matrix(rows, cols, rank=rank)))[0]
                if not 0 < largest <= 2.2 * base:
                    raise Broken(
                        f"a singular value of {largest:.3g}, where full rank has {base:.3g}"
                    )


@law(elsewhere="0/0 in row norms made a whole block of rows NaN")
def zero_moves_nothing(subject: Subject) -> None:
    """A zero gradient moves nothing, and zero rows in a gradient leave everything finite."""
    for rows, cols in SHAPES:
        with given(f"a {rows} × {cols} gradient of zeros"):
            p = nn.Parameter(matrix(rows, cols, seed=1))
            before = p.detach().clone()
            run(subject, [p], [[torch.zeros(rows, cols)]] * 2)
            if not torch.equal(p, before):
                raise Broken(f"the weight moved by {off(p, before):.3g} of its norm")
        with given(f"a {rows} × {cols} gradient whose first row is zero"):
            gradient = matrix(rows, cols)
            gradient[0] = 0
            if not update(subject, gradient).isfinite().all():
                raise Broken("the update is not finite")


def _scaled_alike(subject: Subject, factors: Sequence[float]) -> None:
    for rows, cols in SHAPES:
        expected = update(subject, matrix(rows, cols))
        for factor in factors:
            with given(f"a {rows} × {cols} gradient times {factor:g}"):
                got = update(subject, factor * matrix(rows, cols))
                same(subject, got, expected, "the update of the gradient times 1")


@law(elsewhere="eps in the norm, at the magnitudes of gradients in a large batch")
def scale_of_gradient_is_nothing(subject: Subject) -> None:
    """A gradient times any factor between 0.001 and 1,000 gives the same update."""
    _scaled_alike(subject, (1e-1, 10, 1e-3, 1e3))


@law(
    elsewhere="torch 2.13: times 1e-12 eps swamps the norm of a 64 × 64 gradient, and the update "
    "is 250 times too small"
)
def tiny_gradients_are_nothing(subject: Subject) -> None:
    """A gradient times 1e-12 or 1e-30, which float32 represents, gives the same update."""
    _scaled_alike(subject, (1e-12, 1e-30))


@law(
    elsewhere="torch 2.13: a 64 × 64 gradient times 1e19 overflows in its squared norm and moves "
    "nothing"
)
def huge_gradients_are_nothing(subject: Subject) -> None:
    """A gradient times 1e12 or 1e30, which float32 represents, gives the same update."""
    _scaled_alike(subject, (1e12, 1e30))


@law(elsewhere="a branch for tall matrices that forgets to transpose back, or norms by rows")
def transpose_commutes(subject: Subject) -> None:
    """The transposed gradient gives the transposed update, up to the factor of the shape."""
    for rows, cols in ((2, 3), (8, 32), (16, 64)):
        with given(f"a {rows} × {cols} gradient and its transpose"):
            one = update(subject, matrix(rows, cols))
            two = update(subject, matrix(rows, cols).mT.contiguous())
            same_direction(subject, two.mT, one, "the transposed update")


@law(
    elsewhere="a norm without keepdim sums over the batch (HeavyBall, once); parameters of one "
    "shape orthogonalized together (Dion with flatten=True)"
)
def many_are_as_one_by_one(subject: Subject) -> None:
    """Matrices in one optimizer, of one shape or several and of very different magnitudes, get the
    updates that they get alone."""
    for shapes in (((4, 6), (4, 6)), ((4, 6), (6, 4), (4, 6), (8, 8))):
        gradients = [10.0 ** (2 * i % 5) * matrix(*shape, seed=i) for i, shape in enumerate(shapes)]
        with given("gradients " + ", ".join(shape_of(g) for g in gradients)):
            for i, (got, g) in enumerate(zip(updates(subject, gradients), gradients, strict=True)):
                same(subject, got, update(subject, g), f"number {i + 1} of them")


# --- shapes -------------------------------------------------------------------------------------


@law("convolutions", elsewhere="convolutions that are batched over kernel positions")
def a_convolution_is_a_matrix(subject: Subject) -> None:
    """A convolution out × in × kh × kw gets the update of the matrix out × (in · kh · kw), up to
    the factor of the shape."""
    for shape in ((2, 1, 2, 2), (8, 4, 3, 3), (32, 2, 3, 3)):
        with given(f"a {' × '.join(map(str, shape))} gradient"):
            got = update(subject, kernel(*shape)).flatten(1)
            expected = update(subject, kernel(*shape).flatten(1))
            same_direction(subject, got, expected, "the matrix's update")


@law(
    "convolutions",
    elsewhere="update.view(len(update), -1) raises in channels_last, the fast layout on a CPU "
    "(Keller Jordan's)",
)
def channels_last_is_nothing(subject: Subject) -> None:
    """A convolution in the memory format channels_last gets the same update."""
    for shape in ((2, 3, 2, 2), (8, 4, 3, 3)):
        with given(f"a {' × '.join(map(str, shape))} gradient in channels_last"):
            gradient = kernel(*shape)
            got = update(subject, gradient.to(memory_format=torch.channels_last))
            same(subject, got, update(subject, gradient), "the update in the default format")


@law("experts", elsewhere="experts flattened to one matrix; a norm over the whole stack")
def experts_are_separate(subject: Subject) -> None:
    """Each matrix of a stack E × m × n gets the update that it gets alone, up to the factor of the
    shape; one expert's gradient, a hundred times larger, changes no other's."""
    for shape in ((2, 2, 3), (3, 4, 8), (4, 8, 4)):
        with given(f"a {' × '.join(map(str, shape))} gradient, the first expert's times 100"):
            gradient = stack(*shape)
            gradient[0] *= 100
            got = update(subject, gradient)
            for one, g in zip(got, gradient, strict=True):
                same_direction(subject, one, update(subject, g), "the expert's own update")


@law("heads", elsewhere="fused q, k, v orthogonalized as one matrix")
def fused_blocks_are_separate(subject: Subject) -> None:
    """Each block of a fused parameter gets the update that it gets alone, up to the factor of the
    shape; one head's gradient, a hundred times larger, changes no other's."""
    for blocks, rows, cols in ((2, 2, 3), (3, 4, 8), (4, 8, 4)):
        with given(f"{blocks} blocks of {rows} × {cols}, the first one's gradient times 100"):
            gradients = stack(blocks, rows, cols)
            gradients[0] *= 100
            got = update(subject, gradients.flatten(0, 1), blocks=blocks).view(blocks, rows, cols)
            for one, g in zip(got, gradients, strict=True):
                same_direction(subject, one, update(subject, g), "the block's own update")


@law(elsewhere="momentum that takes a transposed parameter's strides")
def strides_are_nothing(subject: Subject) -> None:
    """A parameter that is no contiguous memory, or whose gradient is not, is trained alike."""
    for rows, cols in ((2, 3), (8, 32)):
        gradients = [matrix(rows, cols, seed=i) for i in range(2)]
        expected = nn.Parameter(torch.zeros(rows, cols))
        run(subject, [expected], [[g] for g in gradients])
        for what in ("parameter", "gradient"):
            with given(f"a {rows} × {cols} {what} that is a transpose"):
                p = nn.Parameter(torch.zeros(cols, rows).T if what == "parameter" else 0 * expected)
                optimizer = subject.optimizer([p])
                for g in gradients:
                    p.grad = g.clone() if what == "parameter" else g.T.contiguous().T
                    optimizer.step()
                same(subject, p.detach(), expected.detach(), "two steps of a contiguous one")


# --- factors on the learning rate ---------------------------------------------------------------


def _factor(subject: Subject, got: Tensor, rows: int, cols: int) -> None:
    # Keller Jordan's steps leave singular values in [0.68, 1.14], other schedules near 1: their
    # mean tells a factor of sqrt(2) or more from none.
    assert subject.scale is not None
    expected = subject.scale(rows, cols)
    mean = float(torch.linalg.svdvals(got).mean())
    if not 0.65 * expected <= mean <= 1.3 * expected:
        raise Broken(
            f"singular values are {mean:.3g} on average, {expected:.3g} is documented for "
            f"{rows} × {cols}"
        )


@law("scale", elsewhere="a flag for the factor that is inverted, or a factor applied twice")
def the_factor_is_the_documented_one(subject: Subject) -> None:
    """The singular values of a matrix's update are the documented factor of its shape, within
    [0.65, 1.3]."""
    for rows, cols in ((8, 8), (4, 32), (32, 4), (8, 128), (128, 8)):
        with given(f"a {rows} × {cols} gradient"):
            _factor(subject, update(subject, matrix(rows, cols)), rows, cols)


@law(
    "scale",
    "convolutions",
    elsewhere="kernel height over width instead of out / (in · kh · kw) (Keller Jordan's, "
    "DeepSpeed)",
)
def the_factor_of_a_convolution(subject: Subject) -> None:
    """A convolution has the documented factor of the matrix out × (in · kh · kw)."""
    for shape in ((16, 1, 1, 4), (64, 1, 2, 2), (4, 8, 2, 2)):
        with given(f"a {' × '.join(map(str, shape))} gradient"):
            got = update(subject, kernel(*shape)).flatten(1)
            _factor(subject, got, shape[0], math.prod(shape[1:]))


@law("scale", "experts", elsewhere="the factor of the whole stack's shape")
def the_factor_of_an_expert(subject: Subject) -> None:
    """Each matrix of a stack E × m × n has the documented factor of m × n."""
    for shape in ((2, 16, 2), (16, 2, 16), (16, 16, 2)):
        with given(f"a {' × '.join(map(str, shape))} gradient"):
            for one in update(subject, stack(*shape)):
                _factor(subject, one, *shape[1:])


@law("scale", "heads", elsewhere="the factor of the fused shape instead of each block's")
def the_factor_of_a_block(subject: Subject) -> None:
    """Each block of a fused parameter has the documented factor of the block's shape."""
    for blocks, rows, cols in ((4, 8, 8), (8, 16, 2)):
        with given(f"{blocks} blocks of {rows} × {cols}"):
            gradient = stack(blocks, rows, cols).flatten(0, 1)
            for one in update(subject, gradient, blocks=blocks).view(blocks, rows, cols):
                _factor(subject, one, rows, cols)


# --- gradients and momentum ---------------------------------------------------------------------


@law(
    elsewhere="grad.lerp_ writes into p.grad (Keller Jordan's); X /= norm on the caller's own "
    "tensor (gram-newton-schulz)"
)
def gradients_are_untouched(subject: Subject) -> None:
    """A step neither writes to a gradient nor takes it away."""
    for rows, cols in SHAPES[:4]:
        with given(f"a {rows} × {cols} gradient"):
            p, gradient = nn.Parameter(torch.zeros(rows, cols)), 3 * matrix(rows, cols)
            optimizer = subject.optimizer([p])
            for step in (1, 2):
                p.grad = held = gradient.clone()
                optimizer.step()
                if p.grad is not held:
                    raise Broken(f"p.grad is another object after step {step}")
                if not torch.equal(held, gradient):
                    changed = off(held, gradient)
                    raise Broken(
                        f"the gradient changed in step {step}, by {changed:.3g} of its norm"
                    )


@law(elsewhere="a momentum buffer that is p.grad itself: zero_grad(set_to_none=False) clears it")
def momentum_is_not_the_gradient(subject: Subject) -> None:
    """Gradients that are zeroed and written again in their own memory train as fresh ones do."""
    for rows, cols in SHAPES[:3]:
        gradients = [matrix(rows, cols, seed=i) for i in range(3)]
        fresh = nn.Parameter(torch.zeros(rows, cols))
        run(subject, [fresh], [[g] for g in gradients])
        with given(f"three {rows} × {cols} gradients in one memory"):
            p = nn.Parameter(torch.zeros(rows, cols))
            kept = torch.zeros(rows, cols)
            optimizer = subject.optimizer([p])
            for g in gradients:
                p.grad = kept
                kept.copy_(g)
                optimizer.step()
                kept.zero_()
            same(subject, p.detach(), fresh.detach(), "three steps with fresh gradients")


def _direction(subject: Subject, gradients: Sequence[Tensor]) -> Tensor:
    """U of the last step, but for a factor, in float64: sum and average differ by one."""
    assert subject.momentum is not None
    M = torch.zeros_like(gradients[0], dtype=torch.float64)
    for g in gradients:
        M = subject.momentum * M + g.double()
    return gradients[-1].double() + subject.momentum * M if subject.nesterov else M


@law(
    "momentum",
    elsewhere="torch 2.13 in bfloat16 without Nesterov: the momentum is normalized in place",
)
def the_momentum_is_the_documented_one(subject: Subject) -> None:
    """The step after k gradients goes along the orthogonalized U of its equations: the optimizer's
    own first update of U in float64. So too where the second gradient takes back the first, which
    it does for this momentum alone."""
    for rows, cols in SHAPES[:4]:
        cases = {}
        for k in (2, 4):
            # Of growing magnitude: a momentum that was normalized in place weighs the past
            # otherwise.
            gradients = [10.0**i * matrix(rows, cols, seed=i) for i in range(k)]
            gradients[-1] = gradients[-1] * 0.05
            cases[f"{k} gradients {rows} × {cols} of growing magnitude"] = gradients
        cases[f"two gradients {rows} × {cols}, of which the second takes back the first"] = (
            _taken_back(subject, matrix(rows, cols), matrix(rows, cols, seed=1))
        )
        for what, gradients in cases.items():
            with given(what):
                p = nn.Parameter(torch.zeros(rows, cols))
                optimizer = subject.optimizer([p])
                for g in gradients:
                    before = p.detach().clone()
                    give([p], [g])
                    optimizer.step()
                U = _direction(subject, gradients)
                expected = update(subject, (U / U.norm()).float())
                # The difference of weights of size k: float32 knows it to 1e-6.
                same_direction(subject, before - p.detach(), expected, "the last update")


def _taken_back(subject: Subject, first: Tensor, rest: Tensor) -> list[Tensor]:
    """Two gradients after which U is along `rest`; with a momentum that is 0.01 off, what is left
    of `first` is a quarter as large (0.95, with Nesterov's look-ahead).
    """
    mu = subject.momentum
    assert mu is not None
    share = mu**2 / (1 + mu) if subject.nesterov else mu
    return [first, 0.03 * rest - share * first]


@law("momentum", "bfloat16", elsewhere="as above: momentum and product share memory in bfloat16")
def the_momentum_survives_in_bfloat16(subject: Subject) -> None:
    """The same with weights and gradients in bfloat16."""
    for rows, cols in SHAPES[1:4]:
        small, large = matrix(rows, cols).bfloat16(), matrix(rows, cols, seed=1).bfloat16()
        # Of a norm far from one: a momentum that was normalized in place weighs the past otherwise.
        gradients = [large.float() * 100, small.float() * 40]
        with given(f"two {rows} × {cols} gradients in bfloat16, times 100 and 40"):
            p = nn.Parameter(torch.zeros(rows, cols, dtype=torch.bfloat16))
            optimizer = subject.optimizer([p])
            for g in gradients:
                with torch.no_grad():
                    p.zero_()
                give([p], [g])
                optimizer.step()
            U = _direction(subject, gradients)
            expected = update(subject, (U / U.norm()).float())
            got = -p.detach().double()
            same_direction(subject, got, expected, "the last update", torch.bfloat16)


@law(elsewhere="None taken for zeros: momentum goes on, and decay shrinks unused weights")
def no_gradient_no_change(subject: Subject) -> None:
    """A parameter whose gradient is None is not moved while others are, and trains as before once
    it has one again."""
    rows, cols = 4, 6
    with given(f"two {rows} × {cols} parameters; the first has a gradient in steps 1 and 3"):
        g = [matrix(rows, cols, seed=i) for i in range(5)]
        params = [nn.Parameter(matrix(rows, cols, seed=7 + i)) for i in range(2)]
        twin = nn.Parameter(params[0].detach().clone())
        optimizer = subject.optimizer(params)
        give(params, [g[0], g[1]])
        optimizer.step()
        before = [p.detach().clone() for p in params]
        give(params, [None, g[2]])
        optimizer.step()
        if not torch.equal(params[0], before[0]):
            raise Broken(f"it moved by {off(params[0], before[0]):.3g} of its norm in step 2")
        if torch.equal(params[1], before[1]):
            raise Broken("the other one, which has a gradient, did not move in step 2")
        give(params, [g[3], g[4]])
        optimizer.step()
        run(subject, [twin], [[g[0]], [g[3]]])
        same(subject, params[0].detach(), twin.detach(), "its step 3, as if there were no step 2")


@law("decay", elsewhere="a parameter without a gradient, decayed all the same")
def no_gradient_no_decay(subject: Subject) -> None:
    """A parameter whose gradient is None is not decayed, be it one that never had a gradient."""
    rows, cols = 2, 3
    for had in (False, True):
        with given(f"a {rows} × {cols} parameter that {'had' if had else 'never had'} a gradient"):
            params = [nn.Parameter(matrix(rows, cols, seed=i)) for i in range(2)]
            optimizer = subject.optimizer(params, lr=0.1, weight_decay=0.5)
            if had:
                give(params, [matrix(rows, cols, seed=8)] * 2)
                optimizer.step()
            before = params[0].detach().clone()
            give(params, [None, matrix(rows, cols, seed=9)])
            optimizer.step()
            if not torch.equal(params[0], before):
                raise Broken(f"it shrank by {off(params[0], before):.3g}: 0.05 is one decay")


@law("decay", elsewhere="decay that is added to the gradient, or multiplied by the shape's factor")
def decay_is_decoupled(subject: Subject) -> None:
    """With weight decay, a first step takes lr · weight_decay · W more than without; and with a
    zero gradient that alone."""
    lr, decay = 0.1, 0.5
    for rows, cols in ((2, 3), (4, 32), (32, 4)):
        for what, gradient in (
            ("zero", torch.zeros(rows, cols)),
            ("a", matrix(rows, cols, seed=1)),
        ):
            with given(f"a {rows} × {cols} weight, {what} gradient, lr {lr}, decay {decay}"):
                moved = []
                for each in (0.0, decay):
                    p = nn.Parameter(4 * matrix(rows, cols))
                    run(subject, [p], [[gradient]], lr=lr, weight_decay=each)
                    moved.append(p.detach().double())
                expected = lr * decay * 4 * matrix(rows, cols).double()
                # Exact but for float32's rounding of the weights, 1e-7 · 4 against 0.2, and for the
                # updates' where products are rounded at random.
                if not off(moved[0] - moved[1], expected) <= 0.03:
                    share = float((moved[0] - moved[1]).norm() / expected.norm())
                    raise Broken(f"the decay is {share:.3g} of lr · weight_decay · W")


# --- life with the rest of PyTorch --------------------------------------------------------------


def _resumed(subject: Subject, load: bool) -> Tensor:
    """What two steps at another learning rate move after two others: from the saved state with new
    objects, or without a break."""
    shapes = ((4, 6), (6, 4))
    steps = [[matrix(*s, seed=10 * i + j) for j, s in enumerate(shapes)] for i in range(4)]
    params = [nn.Parameter(torch.zeros(s)) for s in shapes]
    optimizer = run(subject, params, steps[:2], lr=0.1)
    for group in optimizer.param_groups:
        group["lr"] = 0.2
    if load:
        file = io.BytesIO()
        torch.save(optimizer.state_dict(), file)
        file.seek(0)
        params = [nn.Parameter(p.detach().clone()) for p in params]
        optimizer = subject.optimizer(params, lr=0.1)
        optimizer.load_state_dict(torch.load(file, weights_only=False))
    before = [p.detach().clone() for p in params]
    for gradients in steps[2:]:
        give(params, gradients)
        optimizer.step()
    return torch.cat([(p.detach() - b).flatten() for p, b in zip(params, before, strict=True)])


@law("checkpoint", elsewhere="wrappers without .state: checkpoints lose the momentum")
def a_resumed_run_goes_on(subject: Subject) -> None:
    """The learning rate is changed after two steps, and the state saved. Loaded into a new
    optimizer, which was made with the rate before, it goes on as if it had not been interrupted."""
    with given("a 4 × 6 and a 6 × 4 parameter, two steps before and two after"):
        expected = _resumed(subject, load=False)
        got = _resumed(subject, load=True)
        same(subject, got, expected, "the uninterrupted run")


@law("checkpoint", elsewhere="states with objects that torch.load refuses since 2.6")
def state_dicts_load_with_weights_only(subject: Subject) -> None:
    """torch.save(optimizer.state_dict()) is loaded by torch.load(..., weights_only=True), its
    default."""
    with given("a 2 × 3 parameter after one step"):
        p = nn.Parameter(torch.zeros(2, 3))
        optimizer = run(subject, [p], [[matrix(2, 3)]])
        file = io.BytesIO()
        torch.save(optimizer.state_dict(), file)
        file.seek(0)
        loaded = torch.load(file, weights_only=True)
        other = subject.optimizer([nn.Parameter(torch.zeros(2, 3))])
        other.load_state_dict(loaded)


@law(
    "checkpoint",
    "bfloat16",
    elsewhere="a state restored in another dtype than the weights': the next step crashes",
)
def a_state_loads_into_another_dtype(subject: Subject) -> None:
    """A state saved with float32 weights is loaded where they are bfloat16, and training goes
    on."""
    with given("a 4 × 6 parameter, in bfloat16 from step 2"):
        p = nn.Parameter(torch.zeros(4, 6))
        optimizer = run(subject, [p], [[matrix(4, 6)]])
        narrow = nn.Parameter(torch.zeros(4, 6, dtype=torch.bfloat16))
        other = subject.optimizer([narrow])
        other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        with torch.no_grad():
            p.zero_()
        for each, by in ((p, optimizer), (narrow, other)):
            give([each], [matrix(4, 6, seed=1)])
            by.step()
        same(subject, narrow.detach(), p.detach(), "the step in float32", torch.bfloat16)


@law("checkpoint", elsewhere="a wrapper that hands over one of its optimizers' groups only")
def copies_train_alike(subject: Subject) -> None:
    """A deepcopy of weights and optimizer trains as they do."""
    with given("a 4 × 6 parameter, copied after two steps"):
        p = nn.Parameter(torch.zeros(4, 6))
        optimizer = run(subject, [p], [[matrix(4, 6, seed=i)] for i in range(2)])
        q, copied = copy.deepcopy((p, optimizer))
        for each, by in ((p, optimizer), (q, copied)):
            with torch.no_grad():
                each.zero_()
            give([each], [matrix(4, 6, seed=5)])
            by.step()
        same(subject, q.detach(), p.detach(), "the original's step 3")


@law(elsewhere="an inner optimizer whose groups no scheduler sees")
def schedulers_reach_every_group(subject: Subject) -> None:
    """A scheduler that divides lr by ten divides the step by ten."""
    with given("a 4 × 6 and a 6 × 4 parameter under LambdaLR"):
        shapes = ((4, 6), (6, 4))
        params = [nn.Parameter(torch.zeros(s)) for s in shapes]
        optimizer = subject.optimizer(params, lr=1.0)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 0.1**t)
        sizes: list[list[float]] = []
        for _ in range(2):
            with torch.no_grad():
                for p in params:
                    p.zero_()
            give(params, [matrix(*s) for s in shapes])  # the same gradient: the same direction
            optimizer.step()
            scheduler.step()
            sizes.append([float(p.detach().norm()) for p in params])
        for first, second in zip(*sizes, strict=True):
            alike = math.isclose(second, first / 10, rel_tol=SAME[subject.products])
            if not first or not alike:
                raise Broken(f"steps of {first:.3g} and then {second:.3g}")


@law("decay", elsewhere="a decay that forgets the schedule")
def decay_follows_the_schedule(subject: Subject) -> None:
    """Where the groups' lr is divided by ten, a step's decay is too."""
    with given("a 2 × 3 weight, zero gradients, lr 0.1 and then 0.01, decay 0.5"):
        p = nn.Parameter(matrix(2, 3))
        optimizer = subject.optimizer([p], lr=0.1, weight_decay=0.5)
        for lr in (0.1, 0.01):
            for group in optimizer.param_groups:
                group["lr"] = lr
            before = p.detach().clone()
            give([p], [torch.zeros(2, 3)])
            optimizer.step()
            found, expected = off(p, before), 0.5 * lr
            # Weights of size one in float32 against a decay of 0.005.
            if not math.isclose(found, expected, rel_tol=1e-3):
                raise Broken(f"a decay of {found:.3g} at lr {lr}, expected {expected:.3g}")


@law(elsewhere="closures called without gradients, or whose loss is lost")
def closures_are_called_once(subject: Subject) -> None:
    """step(closure) calls it once, with gradients enabled, and returns its loss."""
    with given("a 2 × 3 parameter"):
        p = nn.Parameter(torch.ones(2, 3))
        optimizer = subject.optimizer([p], lr=0.1)
        calls: list[bool] = []

        def closure() -> Tensor:
            calls.append(torch.is_grad_enabled())
            optimizer.zero_grad()
            loss = (p * matrix(2, 3)).sum()
            loss.backward()  # type: ignore[no-untyped-call]
            return loss

        expected = float((p * matrix(2, 3)).sum())
        loss: Any = optimizer.step(closure)  # type: ignore[arg-type]
        if calls != [True]:
            raise Broken(f"it was called {len(calls)} times, gradients enabled: {calls}")
        number = isinstance(loss, int | float) or (isinstance(loss, Tensor) and loss.numel() == 1)
        if not number or not math.isclose(float(loss), expected, rel_tol=1e-5):
            raise Broken(f"step returned {shortened(loss, 80)}, the loss is {expected:.3g}")
        if torch.equal(p, torch.ones(2, 3)):
            raise Broken("nothing moved")


@law(elsewhere="states made in the constructor only; parameters that are silently not trained")
def groups_are_added_later(subject: Subject) -> None:
    """A group that add_param_group adds after a step is trained, with its own lr."""
    with given("a 2 × 3 parameter, and another one after a step"):
        first, later = (nn.Parameter(torch.zeros(2, 3)) for _ in range(2))
        optimizer = run(subject, [first], [[matrix(2, 3)]])
        sample = {k: v for k, v in optimizer.param_groups[0].items() if k not in ("params", "name")}
        optimizer.add_param_group({**copy.deepcopy(sample), "params": [later], "lr": 0.5})
        give([first, later], [matrix(2, 3), matrix(2, 3)])
        optimizer.step()
        got, expected = -2 * later.detach().double(), update(subject, matrix(2, 3))
        same(subject, got, expected, "its first update")


@law(elsewhere="an overflow of float16's loss scale enters the momentum, and stays there")
def an_overflow_leaves_no_trace(subject: Subject) -> None:
    """A step that GradScaler skips changes neither weights nor the steps that follow."""
    with given("a 4 × 6 parameter; the second of three gradients is infinite"):
        ends = []
        for overflow in (False, True):
            p = nn.Parameter(torch.zeros(4, 6))
            optimizer = subject.optimizer([p])
            scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
            for i in range(3):
                if i == 1 and not overflow:
                    continue
                factor = math.inf if i == 1 else 1.0
                loss: Any = scaler.scale((p * matrix(4, 6, seed=i) * factor).sum())
                loss.backward()
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad()
            ends.append(p.detach())
        same(subject, ends[1], ends[0], "the run without the overflow")


# --- dtypes -------------------------------------------------------------------------------------


@law("bfloat16", elsewhere="weights that are promoted, or whose update is rounded twice")
def bfloat16_is_float32_rounded(subject: Subject) -> None:
    """A bfloat16 parameter stays one, and gets float32's update to bfloat16's rounding."""
    for rows, cols in SHAPES[:4]:
        with given(f"a {rows} × {cols} parameter in bfloat16"):
            gradient = matrix(rows, cols).bfloat16().float()
            p = nn.Parameter(torch.zeros(rows, cols, dtype=torch.bfloat16))
            run(subject, [p], [[gradient]])
            if p.dtype is not torch.bfloat16:
                raise Broken(f"it is {p.dtype} after a step")
            expected = update(subject, gradient)
            same(subject, -p.detach(), expected, "float32's update", torch.bfloat16)


@law("float64", elsewhere="a float64 gradient that is narrowed before it is normalized")
def float64_keeps_its_range(subject: Subject) -> None:
    """A float64 parameter stays one, and gets the same update of gradients that float32 cannot
    represent."""
    for factor in (1.0, 1e-60, 1e60):
        for rows, cols in SHAPES[:2]:
            with given(f"a {rows} × {cols} gradient in float64 times {factor:g}"):
                p = nn.Parameter(torch.zeros(rows, cols, dtype=torch.float64))
                run(subject, [p], [[factor * matrix(rows, cols).double()]])
                if p.dtype is not torch.float64:
                    raise Broken(f"it is {p.dtype} after a step")
                expected = update(subject, matrix(rows, cols))
                same(subject, -p.detach(), expected, "float32's update of the gradient times 1")
