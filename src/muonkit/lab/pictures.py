"""What all pictures share: an optimizer's colour, sharp files, and a dark form of each.

A picture that a page shows is an SVG, which is sharp at every size, drawn in greys on white with
the colours below. Its dark form has the greys inverted and the colours as they are, so that an
optimizer has one colour everywhere.
"""

import io
import re
from collections.abc import Iterable
from decimal import Decimal
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: Dots per inch of PNGs. At the 8 inches of most pictures, 1,760: over two for every pixel that a
#: page of 840 has for them.
DPI = 220

#: The page of the dark form, where the light one is white, and its text, where that is black. The
#: first is the site's own (mkdocs-material's slate).
DARK_PAGE, DARK_TEXT = (0x1E, 0x21, 0x29), (0xE6, 0xE7, 0xEB)


class Style(NamedTuple):
    """How a curve is told from others: by colour, and in black and white by dashes and marker."""

    color: str
    dash: str
    marker: str


# The first six are Okabe and Ito's colours, told apart with every common kind of colour vision.
STYLES = {
    "muonw": Style("#0072B2", "-", "o"),
    "adamw": Style("#D55E00", "--", "s"),
    "sgd": Style("#009E73", "-.", "^"),
    "normuon": Style("#CC79A7", ":", "D"),
    "torch-muon": Style("#E69F00", "-", "v"),
    "torch-muon-fp32": Style("#56B4E9", "--", "P"),
    "adamw-0.99": Style("#8C510A", ":", "P"),
    # Tol's muted ones; these stand in tables more than in pictures.
    "adamuon": Style("#882255", ":", "X"),
    "muoneq": Style("#332288", "-.", "<"),
    "muon_plus": Style("#44AA99", "--", ">"),
    "hyperball": Style("#999933", "-", "p"),
    "relative_update": Style("#117733", ":", "h"),
    "radial_brake": Style("#AA4499", "-.", "*"),
    "aol4": Style("#888888", "--", "d"),
    "int8": Style("#661100", ":", "v"),
    "dion2": Style("#DDCC77", "-", "8"),
    "nordion2": Style("#88CCEE", "-.", "H"),
}


def style_of(name: str, place: int = 0) -> Style:
    """The style of an optimizer; of anything else, that of its place in a list."""
    return STYLES.get(name) or list(STYLES.values())[place % len(STYLES)]


def human(value: float) -> str:
    """A number as people write it: ``4,096`` and ``0.0123``, three digits and no exponent."""
    return f"{value:,.0f}" if abs(value) >= 999.5 else f"{Decimal(f'{value:.3g}'):f}"


def apart(places: Iterable[float], distance: float) -> list[float]:
    """The places of labels, in the same order, moved until none is nearer to another.

    Each group of labels that would touch is spread evenly about the mean of its own places.
    """
    places = list(places)
    groups: list[list[int]] = []
    for index in sorted(range(len(places)), key=places.__getitem__):
        groups.append([index])
        while len(groups) > 1 and _low(groups[-1], places, distance) < distance + _high(
            groups[-2], places, distance
        ):
            last = groups.pop()
            groups[-1] += last
    moved = places[:]
    for group in groups:
        for rank, index in enumerate(group):
            moved[index] = _low(group, places, distance) + rank * distance
    return moved


def _low(group: list[int], places: list[float], distance: float) -> float:
    middle = sum(places[i] for i in group) / len(group)
    return middle - distance * (len(group) - 1) / 2


def _high(group: list[int], places: list[float], distance: float) -> float:
    return _low(group, places, distance) + distance * (len(group) - 1)


def rendered(figure: "Figure", form: str = "png") -> bytes:
    """The file of a figure; the same bytes from the same figure.

    Args:
        form: a kind of file that matplotlib writes.
    """
    import matplotlib

    image = io.BytesIO()
    metadata = {"Date": None, "Creator": None} if form == "svg" else None
    with matplotlib.rc_context({"svg.hashsalt": "muonkit"}):
        figure.savefig(image, format=form, dpi=DPI, metadata=metadata)
    if form != "svg":
        return image.getvalue()
    # matplotlib ends lines of path data with a blank.
    lines = image.getvalue().decode("utf-8").splitlines()
    return ("\n".join(line.rstrip() for line in lines) + "\n").encode("utf-8")


_GREY = re.compile(r"#([0-9a-fA-F]{2})\1\1\b")


def dark(svg: str) -> str:
    """The dark form of a picture: greys inverted, colours and embedded images as they are.

    What has to stay black or white, such as letters on a colour, is drawn in ``INK`` or ``PAPER``.
    """
    # matplotlib leaves out the fill of what is black: letters, above all.
    svg = svg.replace("<svg ", '<svg fill="#000000" ', 1)
    return _GREY.sub(lambda found: _inverted(int(found[1], 16) / 255), svg)


#: Black and white that are no greys to `dark`.
INK, PAPER = "#000001", "#fffffe"


def _inverted(white: float) -> str:
    """The dark form's colour for a grey, by its share of white."""
    pairs = zip(DARK_PAGE, DARK_TEXT, strict=True)
    return "#" + "".join(f"{round(white * page + (1 - white) * text):02x}" for page, text in pairs)
