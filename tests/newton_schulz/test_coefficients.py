"""Schedules: their bands, their lengths, and what is refused."""

from __future__ import annotations

import pytest
import torch

from muonkit.newton_schulz.coefficients import KELLER, SCHEDULES, resolve


def scalar_map(name: str, s: torch.Tensor, steps: int = 5) -> torch.Tensor:
    iterations = resolve(name, steps)
    s = s / iterations.margin
    for a, b, c in iterations.triples:
        s = a * s + b * s**3 + c * s**5
    return s


# The output ranges of the table in docs/choosing.md: over [1e-3, 1] and over [1e-2, 1].
RANGES = [
    ("keller", 5, (0.47, 1.20), (0.68, 1.13)),
    ("you", 5, (0.475, 1.145), (0.978, 1.032)),
    ("polar_express", 5, (0.876, 1.124), (0.876, 1.124)),
    ("polar_express", 6, (0.9988, 1.0012), (0.9988, 1.0012)),
    ("polar_express", 7, (1.0, 1.0), (1.0, 1.0)),
    ("polar_express_1.05", 5, (0.73, 1.12), (0.85, 1.12)),
    ("polar_express_1.01", 5, (0.85, 1.12), (0.87, 1.12)),
    ("polar_express_1.02", 5, (0.85, 1.14), (0.86, 1.14)),
    ("cans", 5, (0.884, 1.120), (0.884, 1.120)),
    ("cubic5", 5, (0.12, 1.30), (0.77, 1.30)),
    ("aol4", 4, (0.12, 1.15), (0.97, 1.15)),
    ("deepseek_v4", 10, (1.0000, 1.0005), (1.0000, 1.0005)),
]


@pytest.mark.parametrize(("name", "steps", "wide", "narrow"), RANGES)
def test_output_ranges_are_the_published_ones(
    name: str, steps: int, wide: tuple[float, float], narrow: tuple[float, float]
) -> None:
    # The table is printed to as many digits as it has: half a unit of the last one.
    for low, published in ((1e-3, wide), (1e-2, narrow)):
        s = torch.logspace(torch.tensor(low).log10().item(), 0, 200_001, dtype=torch.float64)
        values = scalar_map(name, s, steps)
        for got, said in ((values.min(), published[0]), (values.max(), published[1])):
            digits = len(f"{said}".partition(".")[2])
            assert got.item() == pytest.approx(said, abs=0.501 * 10 ** -max(digits, 2))


@pytest.mark.parametrize("name", SCHEDULES)
def test_declared_bands_are_tight(name: str) -> None:
    s = torch.logspace(-3, 0, 400_001, dtype=torch.float64)
    values = scalar_map(name, s)
    low, high = SCHEDULES[name].band
    assert low <= values.min() <= low + 0.002
    assert high - 0.002 <= values.max() <= high


def test_pitfall_6_a_composed_schedule_is_never_cut() -> None:
    for name, schedule in SCHEDULES.items():
        for steps in range(1, schedule.shortest):
            if schedule.tail is None and steps == 5:
                continue  # torch's default, which stands for the schedule's own length
            with pytest.raises(ValueError, match=f"{name}.*(leave ns_steps out|at least 5)"):
                resolve(name, steps)
    with pytest.raises(ValueError, match="made for 5 steps"):
        resolve("cans", 6)


def test_pitfall_6_each_table_has_its_own_safety_factor() -> None:
    raw = resolve("polar_express").triples
    for name, s in (("polar_express_1.05", 1.05), ("polar_express_1.01", 1.01)):
        for (a, b, c), (sa, sb, sc) in zip(raw, resolve(name).triples, strict=True):
            assert (sa * s, sb * s**3, sc * s**5) == pytest.approx((a, b, c), rel=1e-12)
    # The 2% are in that table's coefficients already; its input is divided by 1.02 as well.
    assert resolve("polar_express_1.02").margin == 1.02


def test_longer_schedules_repeat_their_tail() -> None:
    assert resolve("keller", 7).triples == (KELLER,) * 7
    assert resolve("polar_express", 9).triples[-2:] == ((1.875, -1.25, 0.375),) * 2
    assert resolve("polar_express_1.01", 8).triples[-1] == (1.875, -1.25, 0.375)
    assert len(resolve("deepseek_v4").triples) == 10


def test_triples_and_sequences() -> None:
    triple = (2.0, -1.5, 0.5)
    assert resolve(triple, 3).triples == (triple,) * 3
    assert resolve([2, -1.5, 0.5], 3).triples == (triple,) * 3
    assert resolve((triple, KELLER)).triples == (triple, KELLER)
    assert resolve([list(triple), list(KELLER)], 2).triples == (triple, KELLER)


@pytest.mark.parametrize(
    ("coefficients", "steps", "error", "words"),
    [
        ("polar-express", 5, ValueError, "one of 'keller'"),
        ((1.0, 2.0), 5, ValueError, "exactly 3 values"),
        ((), 5, ValueError, "empty"),
        (((1.0, 2.0),), 1, ValueError, "exactly 3 values"),
        ((KELLER, KELLER), 7, ValueError, "contradicts the 2 triples"),
        (KELLER, 0, ValueError, "from 1 to 99"),
        (KELLER, 100, ValueError, "from 1 to 99"),
        (KELLER, 2.5, TypeError, "whole number"),
        (None, 5, TypeError, "name, a triple"),
    ],
)
def test_misuse_is_refused(
    coefficients: object, steps: int, error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        resolve(coefficients, steps)


# Transcribed a second time, from the publications: bands hardly notice one wrong digit.
PUBLISHED = {
    "you": """4.0848 -6.8946 2.9270  3.9505 -6.3029 2.6377  3.7418 -5.5913 2.3037
        2.8769 -3.1427 1.2046  2.8366 -3.0525 1.2012""",
    "polar_express_1.02": """8.156554524902461 -22.48329292557795 15.878769915207462
        4.042929935166739 -2.808917465908714 0.5000178451051316
        3.8916678022926607 -2.772484153217685 0.5060648178503393
        3.285753657755655 -2.3681294933425376 0.46449024233003106
        2.3465413258596377 -1.7097828382687081 0.42323551169305323""",
    "polar_express": """8.28721201814563 -23.595886519098837 17.300387312530933
        4.107059111542203 -2.9478499167379106 0.5448431082926601
        3.9486908534822946 -2.908902115962949 0.5518191394370137
        3.3184196573706015 -2.488488024314874 0.51004894012372
        2.300652019954817 -1.6689039845747493 0.4188073119525673""",
    "cans": """8.4703 -25.1081 18.6293  4.1828 -3.1087 0.5806  3.9619 -2.9541 0.5630
        3.2866 -2.4647 0.5074  2.2737 -1.6447 0.4162""",
    "aol4": """3.9505 -6.3029 2.6377  3.7418 -5.5913 2.3037
        2.8769 -3.1427 1.2046  2.8366 -3.0525 1.2012""",
    "cubic5": """3.3656576 -3.3420992 0  2.5744352 -1.4957376 0  2.5368962 -1.4312570 0
        2.4418906 -1.2764040 0  2.2230472 -0.9630650 0""",
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_digit_is_the_published_one(name: str) -> None:
    written = [number for triple in resolve(name, 5).triples for number in triple]
    assert written == [float(number) for number in PUBLISHED[name].split()]


def test_no_schedule_turns_a_direction_around() -> None:
    """A table that is published for AOL, beginning (4.0098, -7.0585, 2.4635), does above 0.88."""
    s = torch.linspace(1e-3, 1, 10_001, dtype=torch.float64)
    for name in SCHEDULES:
        assert scalar_map(name, s).min() > 0, name
