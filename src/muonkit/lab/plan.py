"""The costs of a step on a mesh that one has not got: ``muonkit plan``.

All figures follow from shapes, placements and assumed rates. Nothing is measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from muonkit.distributed.machines import MACHINES, Machine, machine
from muonkit.lab.errors import LabError, unknown
from muonkit.lab.plan_costs import Assumptions, Vector
from muonkit.lab.plan_layouts import LAYOUTS, Mesh, choose_layout, parse_mesh
from muonkit.lab.plan_schemes import Scheme, schemes, seconds
from muonkit.lab.shapes import ModelShape
from muonkit.lab.store import encoded, write_atomically
from muonkit.options import CHOICES
from muonkit.stages import AFTER

__all__ = [
    "Forecast",
    "assumptions",
    "check_folders",
    "forecast",
    "show",
    "summary",
    "verdict",
    "write",
]

#: Bytes/s of a rank's memory: half of what data sheets say, as
#: `muonkit.distributed.machines.MACHINES`.
MEMORY = {"cpu": 1e10, "cuda": 1.7e12}

_ITEMSIZES = {"float32": 4, "bfloat16": 2}


class Panel(NamedTuple):
    """Stacked bars: for each part its length in every scheme."""

    unit: str
    parts: dict[str, list[float]]


@dataclass(frozen=True)
class Forecast:
    """A model on a mesh, and what each way of doing the step would cost; muonkit's is the first,
    with a period its step of blocks the second.
    """

    model: ModelShape
    layout: str
    mesh: Mesh
    assume: Assumptions
    schemes: list[Scheme]

    @property
    def ranks(self) -> int:
        return self.mesh.ranks * self.mesh.stages


def assumptions(
    device: str = "cuda",
    node: int = 8,
    dtype: str = "float32",
    exchange_dtype: str = "auto",
    after: str = "none",
    replicas: str = "auto",
    fraction: float = 1.0,
    selection: str = "global",
    period: int = 1,
    **rates: float | None,
) -> Assumptions:
    """Assumptions from the command's options.

    Args:
        rates: flops, intra, inter, memory; None is the device's default.

    Raises:
        LabError: an unknown name, or a fraction out of (0, 1].
    """
    if not 0 < fraction <= 1:
        raise LabError(f"--fraction {fraction:g} should be in (0, 1]; 1 takes all rows")
    given = {name: rate for name, rate in rates.items() if rate is not None}
    for what, got, options in (
        ("device", device, MACHINES),
        ("dtype", dtype, _ITEMSIZES),
        ("exchange dtype", exchange_dtype, CHOICES["exchange_dtype"]),
        ("after", after, ("none", *AFTER)),
        ("choice of replicas", replicas, CHOICES["replicas"]),
        ("selection", selection, CHOICES["selection"]),
    ):
        if got not in options:
            raise unknown(what, got, options)
    memory = given.pop("memory", MEMORY[device])
    flops, intra, inter, _ = machine(device, node)
    links = Machine(
        given.get("flops", flops), given.get("intra", intra), given.get("inter", inter), node
    )
    return Assumptions(
        device=device,
        rates=links,
        memory=memory,
        itemsize=_ITEMSIZES[dtype],
        comm_itemsize=_ITEMSIZES.get(exchange_dtype),
        after=after,
        replicas=replicas,
        fraction=fraction,
        selection=selection,
        period=period,
    )


def forecast(model: ModelShape, mesh: str, layout: str | None, assume: Assumptions) -> Forecast:
    """Simulate a step.

    Args:
        model: from `muonkit.lab.plan_models.find_model`.
        mesh: as ``dp=64,tp=8``.
        layout: a key of `LAYOUTS`; None: what the mesh's axes say.

    Raises:
        LabError: an unknown name, a mesh that does not fit the layout or the model, or a stage that
            does not go with a period there.
    """
    name, axes = choose_layout(layout, parse_mesh(mesh), model)
    if axes.stages > max(model.layers, 1):
        remedy = f"write pp={model.layers} or less" if model.layers > 1 else "leave pp out"
        raise LabError(
            f"pp={axes.stages}: {model.name} has {model.layers} layers, expected at least one for "
            f"each stage; {remedy}"
        )
    if "tp" in axes.names and all(p.tp_dim is None for p in model.parameters):
        raise LabError(
            f"the mesh {axes} has an axis tp, but {model.name} has no tensor parallel plan: leave "
            "tp out, or say what is cut, by the names that muonkit route prints, as "
            "--tp '*.q_proj.weight=colwise' --tp '*.o_proj.weight=rowwise'"
        )
    try:
        found = schemes(model, name, axes, assume)
    except ValueError as error:
        raise LabError(str(error)) from error
    return Forecast(model, name, axes, assume, found)


# -- as data --------------------------------------------------------------------------------------


def summary(found: Forecast) -> dict[str, Any]:
    """Everything that is shown, and more, for JSON: bytes, FLOPs and seconds, unrounded."""
    assume = asdict(found.assume)
    assume["rates"] = found.assume.rates._asdict()
    return {
        "model": found.model.name,
        "elements": found.model.elements(),
        "muon_elements": found.model.elements("muon"),
        "mesh": str(found.mesh),
        "ranks": found.ranks,
        "layout": found.layout,
        "assumptions": assume,
        "schemes": [_scheme(scheme, found.assume) for scheme in found.schemes],
    }


def _scheme(scheme: Scheme, assume: Assumptions) -> dict[str, Any]:
    costs, took = scheme.costs, seconds(scheme, assume)
    return {
        "name": scheme.name,
        "flops": {**_spread(costs.flops), "max_over_mean": balance(costs.flops)},
        "lower_bound_of_max_over_mean": scheme.bound,
        "lower_bound_set_by": scheme.bound_by,
        "matrices": _spread(costs.matrices),
        "buckets": scheme.buckets,
        "bytes": {
            "received_in": _spread(costs.received_in),
            "sent_in": _spread(costs.sent_in),
            "received_out": _spread(costs.received_out),
            "sent_out": _spread(costs.sent_out),
            "between_nodes": _spread(costs.between),
            "within_nodes": _spread(costs.within),
            "parameters": _spread(costs.parameters),
            "gradients": _spread(costs.parameters),
            "state": _spread(costs.state),
            "transient": _spread(costs.transient),
            "peak": _spread(peak(scheme)),
        },
        "seconds": {
            "elementwise": took.elementwise,
            "products": took.products,
            "products_bucket_by_bucket": took.chain,
            "exchange": took.exchange,
            "overlapped": took.overlapped,
            "serial": took.serial,
        },
    }


def _spread(figures: Vector) -> dict[str, float]:
    return {"max": float(figures.max()), "mean": float(figures.mean())}


def balance(flops: Vector) -> float:
    """Largest over mean; 1 where there are none."""
    return float(flops.max() / flops.mean()) if flops.any() else 1.0


def peak(scheme: Scheme) -> Vector:
    """Bytes on every rank in the step: parameters, gradients, state and what is transient."""
    costs = scheme.costs
    held: Vector = 2 * costs.parameters + costs.state + costs.transient
    return held


def panels(found: Forecast) -> tuple[str, list[str], list[Panel]]:
    """The contents of the picture: its title, the schemes, and three panels of stacked bars."""
    times = [seconds(scheme, found.assume) for scheme in found.schemes]
    costs = [scheme.costs for scheme in found.schemes]

    def most(name: str) -> list[float]:
        return [float(getattr(cost, name).max()) / 1e9 for cost in costs]

    title = f"{found.model.name}, {found.mesh}: one optimizer step, predicted (nothing is measured)"
    return (
        title,
        [scheme.name for scheme in found.schemes],
        [
            Panel(
                "seconds, serial",
                {
                    "elementwise": [t.elementwise for t in times],
                    "products, if all wait": [t.chain for t in times],
                    "exchange": [t.exchange for t in times],
                },
            ),
            Panel("GB received", {"in": most("received_in"), "out": most("received_out")}),
            Panel(
                "GB of memory",
                {
                    "parameters": most("parameters"),
                    "gradients": most("parameters"),
                    "state": most("state"),
                    "transient, at most": most("transient"),
                },
            ),
        ],
    )


def write(found: Forecast, plot: Path | None, json_file: Path | None) -> None:
    """Write the picture and the figures to these files.

    Raises:
        LabError: matplotlib knows no such kind of picture.
        RunError: a file cannot be written.
    """
    if json_file is not None:
        write_atomically(json_file, encoded(summary(found)), "name another file with --json")
    if plot is not None:
        # Here, because it brings matplotlib, which takes a second.
        from muonkit.lab.plots import bars_plot

        image = bars_plot(*panels(found), plot.suffix.removeprefix(".") or "png")
        write_atomically(plot, image, "name another file with --plot")


def check_folders(**files: Path | None) -> None:
    """Refuse files whose folder is not there, by the names of their options, before all the work.

    Raises:
        LabError: that is so.
    """
    for option, file in files.items():
        if file is not None and not file.parent.is_dir():
            raise LabError(
                f"--{option} {file}: there is no folder {file.parent}; make it, or name another "
                f"file with --{option}"
            )


# -- as a table -----------------------------------------------------------------------------------


def show(console: Console, found: Forecast) -> None:
    """Print the table and what it rests on."""
    model, assume = found.model, found.assume
    console.print(verdict(found), highlight=False, markup=False, soft_wrap=True)
    console.print(
        f"{model.name}: {model.elements():,} parameters, {model.elements('muon'):,} of them "
        f"Muon's; {found.ranks:,} ranks, mesh {found.mesh}\nlayout {found.layout}: "
        f"{LAYOUTS[found.layout].summary}",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )
    shown = Table(title="One optimizer step, per rank: largest (mean)")
    shown.add_column("")
    for scheme in found.schemes:
        shown.add_column(scheme.name.replace(", ", "\n"), justify="right", no_wrap=True)
    for heading, cells in _rows(found.schemes, assume):
        shown.add_row(heading, *cells, end_section=heading in _LAST)
    console.print(shown)
    console.print(_notes(found), highlight=False, markup=False, soft_wrap=True)


def verdict(found: Forecast) -> str:
    """What a step costs, in a few sentences."""
    ours, theirs = found.schemes[0], next(s for s in found.schemes if s.name.startswith("AdamW"))
    took, costs = seconds(ours, found.assume), ours.costs
    fastest, slowest = _time(took.overlapped), _time(took.serial)
    span = fastest if fastest == slowest else f"{fastest} to {slowest}"
    theirs_took = seconds(theirs, found.assume).serial
    sent = float((costs.sent_in + costs.sent_out).max())
    short = " Latencies, which are left out, will be more than that." if took.serial < 1e-4 else ""
    return (
        f"A step takes {span} at the assumed rates, AdamW's {_time(theirs_took)}."
        f"{short} The slowest rank's part of it: products {_time(took.products)}, exchange "
        f"{_time(took.exchange)}, elementwise {_time(took.elementwise)}. A rank sends "
        f"{f'at most {_si(sent)}B' if sent else 'nothing'}; its memory peaks at "
        f"{_si(float(peak(ours).max()))}B, without activations." + _of_period(found, sent)
    )


def _of_period(found: Forecast, sent: float) -> str:
    """What the steps between whole ones cost, where there are any.

    Args:
        sent: bytes in a whole step.
    """
    period = found.assume.period
    if period == 1:
        return ""
    blocks = found.schemes[1]
    took, costs = seconds(blocks, found.assume), blocks.costs
    between = float((costs.sent_in + costs.sent_out).max())
    mean = (sent + (period - 1) * between) / period
    return (
        f" With a period of {period} that is one step of {period}; one of blocks takes "
        f"{_time(took.overlapped)} to {_time(took.serial)}, and a rank sends "
        f"{f'{_si(between)}B' if between else 'nothing'}: {_si(mean)}B a step in the mean."
    )


#: Rows that end a section of the table.
_LAST = ("matrices", "out: sent", "peak memory")


def _rows(found: Sequence[Scheme], assume: Assumptions) -> list[tuple[str, list[str]]]:
    times = [seconds(scheme, assume) for scheme in found]
    costs = [scheme.costs for scheme in found]
    return [
        ("FLOPs", [_pair(c.flops, "") for c in costs]),
        ("max over mean", [f"{balance(c.flops):.3f}" if c.flops.any() else "-" for c in costs]),
        ("  lower bound", ["-" if s.bound is None else f"{s.bound:.3f}" for s in found]),
        ("matrices", [f"{c.matrices.max():,.0f} ({c.matrices.mean():,.1f})" for c in costs]),
        ("in: received", [_pair(c.received_in, "B") for c in costs]),
        ("in: sent", [_pair(c.sent_in, "B") for c in costs]),
        ("out: received", [_pair(c.received_out, "B") for c in costs]),
        ("out: sent", [_pair(c.sent_out, "B") for c in costs]),
        ("parameters", [_pair(c.parameters, "B") for c in costs]),
        ("state", [_pair(c.state, "B") for c in costs]),
        ("transient, at most", [_pair(c.transient, "B") for c in costs]),
        ("peak memory", [_pair(peak(scheme), "B") for scheme in found]),
        ("elementwise", [_time(t.elementwise) for t in times]),
        ("products", [_time(t.products) for t in times]),
        ("  if all wait", [_time(t.chain) for t in times]),
        ("exchange", [_time(t.exchange) for t in times]),
        ("step, overlapped", [_time(t.overlapped) for t in times]),
        ("step, serial", [_time(t.serial) for t in times]),
    ]


def _notes(found: Forecast) -> str:
    assume, ours = found.assume, found.schemes[0]
    rates = assume.rates
    notes = [
        f"Predictions, nothing is measured. Assumed for a rank: {_si(rates.flops)}FLOP/s in "
        f"products, {_si(rates.intra)}B/s within a node of {rates.node}, {_si(rates.inter)}B/s "
        f"between nodes, {_si(assume.memory)}B/s of memory; no latencies. Change them with "
        "--flops, --intra, --inter, --memory, --node.",
        f"Elements have {assume.itemsize} bytes, {assume.comm_bytes} when they are sent. Bytes in: "
        "momentum to those who compute; out: results, and AdamW's parameters. Peak memory: "
        "parameters, gradients, state and what is transient; no activations.",
        f"Load of muonkit: max over mean {balance(ours.costs.flops):.3f}; whoever computed what, "
        f"it would be at least {ours.bound:.3f} ({ours.bound_by}). An owner stores a part of its "
        "matrix." + (f" Exchanges in a row: {ours.buckets}." if ours.buckets else ""),
        "Step, overlapped: products and exchange hide one another wholly. Step, serial: nothing is "
        "hidden, and in every bucket all ranks wait for the busiest. The truth should lie between.",
        "all-gather: every rank gathers every matrix and computes all (torch.optim.Muon on full "
        "tensors). round robin: whole parameters on every rank, owners in turn (Keller Jordan's), "
        "a stack of experts being one parameter. Both with AdamW for the rest. AdamW: for all "
        "parameters.",
    ]
    return "\n".join(notes)


def _pair(figures: Vector, unit: str) -> str:
    largest, mean = float(figures.max()), float(figures.mean())
    if not largest:
        return "0"
    return f"{_si(largest)}{unit} ({_si(mean)})"


def _si(figure: float) -> str:
    """With three digits and a decimal prefix."""
    if not figure:
        return "0 "
    for factor, prefix in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M")):
        if figure >= 0.9995 * factor:
            return f"{_digits(figure / factor)} {prefix}"
    return f"{_digits(figure / 1e3)} k" if figure >= 1e3 else f"{figure:.0f} "


def _digits(figure: float) -> str:
    decimals = 2 if figure < 9.995 else 1 if figure < 99.95 else 0
    return f"{figure:.{decimals}f}"


def _time(took: float) -> str:
    if took >= 0.9995:
        return f"{_digits(took)} s"
    for unit, name in ((1e-3, "ms"), (1e-6, "us"), (1e-9, "ns")):
        if took >= 0.9995 * unit:
            return f"{_digits(took / unit)} {name}"
    return "< 1 ns" if took else "0"
