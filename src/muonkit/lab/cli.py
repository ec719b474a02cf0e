"""The command line: ``muonkit compare TASK``, ``new-task``, ``monitor``, ``route`` and ``plan``.

Every error of the user's is one line on standard error with its remedy, and exit status 2; 1 is
a failure while running, 130 is Ctrl-C. ``--debug`` shows the traceback.
"""

import sys
import traceback
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import typer

import muonkit
from muonkit._text import one_of, shown
from muonkit.distributed.machines import MACHINES
from muonkit.lab.errors import Interrupted, LabError, TaskError
from muonkit.lab.optimizers import OPTIMIZERS
from muonkit.lab.output import Console, any_stream, say
from muonkit.lab.plan_layouts import LAYOUTS
from muonkit.lab.rules import routed, rules_of
from muonkit.lab.shapes import MODELS
from muonkit.lab.tasks import TASKS, Budget
from muonkit.options import CHOICES, DEFAULTS
from muonkit.scale import ROUTED

app = typer.Typer(
    name="muonkit",
    help="Muon for a whole PyTorch model: compare optimizers on real data, see how a model is "
    "routed, and what a step will cost on many ranks.",
    add_completion=False,
    rich_markup_mode=None,
)

# What `muonkit plan` knows the size of an element of.
DTYPES = [name for name in CHOICES["exchange_dtype"] if name != "auto"]

_TASK_LIST = "\n".join(f"  {t.name:<11} {t.summary}; {t.budget}" for t in TASKS.values())
_OPTIMIZER_LIST = "\n".join(f"  {o.name:<15} {o.summary}" for o in OPTIMIZERS.values())

_COMPARE_HELP = f"""Train TASK with several optimizers and report on them.

All get the same initial weights, the same batches, the same number of steps and the same
learning-rate schedule (linear warm-up, linear decay to zero). Stopped, by Ctrl-C or otherwise, the
same command goes on where it was.

\b
Tasks:
{_TASK_LIST}

\b
Your own task (`muonkit new-task mytask` writes one to begin with):
  mytask.py:task      a function that returns model, train, validation, loss
  package.module:name the same in a module

\b
Optimizers:
{_OPTIMIZER_LIST}

\b
Examples:
  muonkit compare gpt
  muonkit compare gpt --optimizers muonw,adamw,sgd --sweep --sweep-decay --seeds 3 --jobs 2
  muonkit compare mnist --epochs 3 --lr muonw=2e-3,adamw=1e-3
  MUONKIT_DATA=/data muonkit compare cifar10 --out runs/cifar
  muonkit compare mytask.py:task --steps 200 --sweep

\b
MUONKIT_DATA is a folder that has mnist/ and cifar10/ with the official files; without it they are
downloaded to MUONKIT_CACHE (default: ~/.cache/muonkit).
"""

_NEW_TASK_HELP = """Write NAME.py, a task of your own for `muonkit compare NAME.py:task`.

It trains as it is, on data that it makes; comments say what to change. A file that is there already
is left as it is.

\b
Examples:
  muonkit new-task mytask
  muonkit compare mytask.py:task --steps 200
"""

_ROUTE_HELP = """Print which parameter of SPEC gets which algorithm and view, and why.

Parameters that differ only in the index of a layer share a line, which counts them.

\b
SPEC is one of
  mymodel.py:factory       a model, or something that makes one when called without arguments
  package.module:factory   the same in a module
  gpt2, llama, bert, ...   a model type of transformers (built without memory or network)
  PATH, OWNER/NAME         a config.json or its folder; a model on the Hugging Face hub

The first two import that file or module and call the factory: they run its code. The other
kinds run no code but transformers': what a folder or the hub has beside its config.json is neither
run nor loaded.

\b
Examples:
  muonkit route gpt2
  muonkit route mytask.py:model
  muonkit route my_package.model:build --json
  muonkit route llama --rule '*.down_proj.weight=adamw'
"""

_PLAN_HELP = f"""Predict what one optimizer step costs every rank of a mesh.

FLOPs, bytes in and out, memory and time of muonkit's step, beside all-gather schemes and AdamW's
ZeRO-1: from shapes and rates, nothing is measured. The optimizer's own planner makes the plan.

\b
Models:   {", ".join(MODELS)}; or your own:
          FILE.py:factory, package.module:factory, a Hugging Face model type or id, a config.json
Mesh:     axes from left to right, neighbours in a node last: dp, fsdp (or shard), tp, ep; pp first
Layouts:  by default what the axes say: dp is zero1; fsdp is fsdp; dp,fsdp is hsdp; tp is tp;
          fsdp,tp is fsdp_tp; dp,tp is dp_tp_zero1; with ep it is ep (experts over ep, the rest
          over fsdp and ep). --layout ddp keeps the state whole; with --layout fsdp, fsdp_tp or ep
          and no axis fsdp, dp is the axis of shards.

\b
Examples:
  muonkit plan --model llama-8b --mesh dp=8,tp=8
  muonkit plan --model llama-70b --mesh dp=4,fsdp=64 --exchange-dtype bfloat16
  muonkit plan --model kimi-k2 --mesh fsdp=64,ep=8,tp=8 --plot kimi.png --json kimi.json
  muonkit plan --model mypackage.models:build --mesh fsdp=8
"""


_MONITOR_HELP = """Draw what muonkit.Monitor recorded: every matrix over the steps, and spectra.

monitor-layers.png has a row for each matrix: update-to-weight ratio, stable rank of the momentum,
orthogonality error. monitor-spectra.png has the singular values of some matrices' momentum, and of
the update made of it. The last sample is summed up in the terminal.

\b
RUN is one of
  FILE.jsonl   what muonkit.Monitor(optimizer, to="FILE.jsonl") writes
  FOLDER       a run's folder, with monitor.jsonl

\b
Examples:
  muonkit compare gpt --monitor 20 --out runs/gpt
  muonkit monitor runs/gpt/runs/muonw-lr0.016-seed0
  muonkit monitor run.jsonl --layers '*.attention.*' --out .
"""


def _rates(
    text: str | None, option: str = "--lr", *, zero: bool = False
) -> dict[str | None, float]:
    """``0.01`` or ``muonw=0.02,adamw=0.001`` as values by optimizer; 0 is one where ``zero``."""
    rates: dict[str | None, float] = {}
    for part in text.split(",") if text else ():
        name, equals, value = part.rpartition("=")
        try:
            rate = float(value)
        except ValueError:
            rate = float("nan")
        if not (0 < rate < float("inf") or (zero and rate == 0)):
            expected = "neither 0 nor a positive number" if zero else "no positive number"
            raise LabError(
                f"{option} {text}: {value!r} is {expected}; write {option} 1e-3, or "
                f"{option} muonw=2e-3,adamw=1e-3"
            )
        of = name.strip() if equals else None
        if of in rates:
            raise LabError(
                f"{option} {text}: two values for {of or 'all optimizers'}; write {option} 1e-3, "
                f"or {option} muonw=2e-3,adamw=1e-3"
            )
        rates[of] = rate
    return rates


def _budget(steps: int | None, epochs: int | None) -> Budget | None:
    if steps and epochs:
        raise LabError(f"--steps {steps} and --epochs {epochs}: give one of them")
    if steps:
        return Budget(steps, "steps")
    return Budget(epochs, "epochs") if epochs else None


Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


@app.command("compare", help=_COMPARE_HELP)
def compare_command(
    task: Annotated[str, typer.Argument(metavar="TASK", help="What to train.")],
    optimizers: Annotated[
        str, typer.Option(metavar="A,B,...", help="Which optimizers to compare.")
    ] = "muonw,adamw",
    lr: Annotated[
        str | None,
        typer.Option(metavar="X | NAME=X,...", help="Peak learning rates, for all or by name."),
    ] = None,
    sweep: Annotated[
        bool,
        typer.Option(
            "--sweep",
            help="First choose each optimizer's learning rate by halving: five, a factor of 2 "
            "apart, in runs of a quarter of the steps, wider if the best is at the edge; then the "
            "best and its neighbours in whole runs; lowest validation loss.",
        ),
    ] = False,
    sweep_embedding_lr: Annotated[
        bool,
        typer.Option(
            "--sweep-embedding-lr",
            help="Then choose a rate of its own for AdamW's embeddings and head (of a Muon: for "
            "all that it leaves to AdamW), likewise.",
        ),
    ] = False,
    sweep_decay: Annotated[
        bool,
        typer.Option(
            "--sweep-decay",
            help="Then choose each optimizer's weight decay, from a tenth of its default to ten "
            "times it, in whole runs.",
        ),
    ] = False,
    sweep_full: Annotated[
        bool,
        typer.Option(
            "--sweep-full",
            help="In sweeps train every value in whole runs, on all of --sweep-seeds.",
        ),
    ] = False,
    sweep_points: Annotated[
        int, typer.Option(metavar="N", help="Values in each sweep's grid; an odd number.")
    ] = 5,
    sweep_seeds: Annotated[
        int,
        typer.Option(
            min=1,
            metavar="N",
            help="Seeds that choose in a sweep: between the better two; all, if in full.",
        ),
    ] = 1,
    weight_decay: Annotated[
        str | None,
        typer.Option(metavar="X | NAME=X,...", help="Weight decays, for all or by name."),
    ] = None,
    embedding_lr: Annotated[
        str | None,
        typer.Option(metavar="X | NAME=X,...", help="Rates of embeddings and head, likewise."),
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Runs per optimizer.")] = 1,
    steps: Annotated[int | None, typer.Option(min=1, help="Length of a run.")] = None,
    epochs: Annotated[int | None, typer.Option(min=1, help="Length in passes.")] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Examples per step.")] = None,
    evaluations: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Validations per run.")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for everything written [default: runs/TASK-HASH]."),
    ] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads of a run.")] = None,
    jobs: Annotated[
        int,
        typer.Option(
            min=1,
            metavar="N",
            help="Train N runs at a time, each in its own process, with one thread unless "
            "--threads says more. Losses do not depend on it; seconds do.",
        ),
    ] = 1,
    checkpoint_every: Annotated[
        float, typer.Option(min=0.0, metavar="SECONDS", help="Time between checkpoints.")
    ] = 15.0,
    monitor: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help="Record every N steps what the optimizers of muonkit do; pictures in the report.",
        ),
    ] = None,
    rule: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATTERN=ALGORITHM[:VIEW]",
            help="Overrule a route of the model, as `muonkit route` does; may be repeated.",
        ),
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(
            metavar="cpu | cuda", help="Where to train [default: cuda where there is one]."
        ),
    ] = None,
    same_task: Annotated[
        bool,
        typer.Option(
            "--same-task",
            help="Go on after an edit of your own task that does not change what is trained.",
        ),
    ] = False,
    debug: Debug = False,
) -> None:
    from muonkit.lab.compare import compare, comparison

    asked = comparison(
        task,
        [name.strip() for name in optimizers.split(",")],
        lr=_rates(lr),
        sweep=sweep,
        seeds=seeds,
        budget=_budget(steps, epochs),
        batch_size=batch_size,
        threads=threads,
        sweep_decay=sweep_decay,
        points=sweep_points,
        sweep_seeds=sweep_seeds,
        weight_decay=_rates(weight_decay, "--weight-decay", zero=True),
        jobs=jobs,
        evaluations=evaluations,
        monitor=monitor,
        device=_device(device),
        sweep_embedding_lr=sweep_embedding_lr,
        full=sweep_full,
        embedding_lr=_rates(embedding_lr, "--embedding-lr"),
        rules=rule or (),
    )
    compare(asked, out, checkpoint_seconds=checkpoint_every, same_task=same_task)


def _device(name: str | None) -> str:
    import torch

    there = torch.cuda.is_available()
    if name not in (None, "cpu", "cuda"):
        raise LabError(f"--device {name}: write cpu or cuda")
    if name == "cuda" and not there:
        raise LabError("--device cuda: torch sees no GPU here; leave it out, or write cpu")
    return name or ("cuda" if there else "cpu")


@app.command("new-task", help=_NEW_TASK_HELP)
def new_task_command(
    name: Annotated[str, typer.Argument(metavar="NAME", help="The file, without or with .py.")],
    debug: Debug = False,
) -> None:
    from muonkit.lab.new_task import command_of, write_task

    path = write_task(name)
    say(f"wrote {shown(path)}; it runs as it is: muonkit compare {shown(command_of(path))}")


@app.command("route", help=_ROUTE_HELP)
def route_command(
    spec: Annotated[str, typer.Argument(metavar="SPEC", help="The model.")],
    as_json: Annotated[
        bool, typer.Option("--json", help="Print JSON, with an entry for every parameter.")
    ] = False,
    every: Annotated[
        bool, typer.Option("--all", help="Print a line for every parameter: fold no layers.")
    ] = False,
    adjust_lr_fn: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help=f"The learning-rate scale to show: {one_of(CHOICES['adjust_lr_fn'])}.",
        ),
    ] = ROUTED,
    rule: Annotated[
        list[str] | None,
        typer.Option(metavar="PATTERN=ALGORITHM[:VIEW]", help="Overrule; may be repeated."),
    ] = None,
    per_head: Annotated[
        bool, typer.Option("--per-head", help="Make every attention head a matrix of its own.")
    ] = False,
    debug: Debug = False,
) -> None:
    from muonkit.lab.specs import load_model

    routes = routed(load_model(spec), rules_of(rule), scale=adjust_lr_fn, per_head=per_head)
    say(routes.to_json() if as_json else routes.table(fold=not every))


@app.command("plan", help=_PLAN_HELP)
def plan_command(
    model: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="One of the models above, or your own, as `muonkit route` takes it.",
        ),
    ],
    mesh: Annotated[str, typer.Option(metavar="AXIS=N,...", help="The mesh of ranks.")],
    layout: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help=f"{one_of(LAYOUTS)} [default: what the mesh's axes say].",
        ),
    ] = None,
    device: Annotated[
        str, typer.Option(help=f"{one_of(MACHINES)}: products and default rates.")
    ] = "cuda",
    node: Annotated[int, typer.Option(min=1, help="Ranks in a node.")] = 8,
    flops: Annotated[
        float | None, typer.Option(min=1.0, metavar="RATE", help="Products, FLOP/s of a rank.")
    ] = None,
    intra: Annotated[
        float | None, typer.Option(min=1.0, metavar="RATE", help="Bytes/s within a node.")
    ] = None,
    inter: Annotated[
        float | None, typer.Option(min=1.0, metavar="RATE", help="Bytes/s between nodes.")
    ] = None,
    memory: Annotated[
        float | None, typer.Option(min=1.0, metavar="RATE", help="Bytes/s of a rank's memory.")
    ] = None,
    dtype: Annotated[
        str, typer.Option(help=f"Of parameters, gradients and state: {one_of(DTYPES)}.")
    ] = "float32",
    exchange_dtype: Annotated[
        str, typer.Option(help=f"On the way between ranks: {one_of(CHOICES['exchange_dtype'])}.")
    ] = DEFAULTS["exchange_dtype"],
    after: Annotated[
        str,
        typer.Option(help=f"The stage after the product: none, {one_of(CHOICES['after'])}."),
    ] = "none",
    replicas: Annotated[
        str, typer.Option(help=f"Copies by a placement: {one_of(CHOICES['replicas'])}.")
    ] = DEFAULTS["replicas"],
    fraction: Annotated[
        float, typer.Option(help="Of each matrix's rows, how many a step takes: in (0, 1].")
    ] = DEFAULTS["fraction"],
    selection: Annotated[
        str, typer.Option(help=f"Among which rows: {one_of(CHOICES['selection'])}.")
    ] = DEFAULTS["selection"],
    period: Annotated[
        int, typer.Option(min=1, help="Steps from one of whole matrices to the next (MuonBP).")
    ] = DEFAULTS["period"],
    tp: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATTERN=ROLE",
            help="What tensor parallelism cuts of your own model: colwise, rowwise, vocab or "
            "replicated [default: its tp_plan]; may be repeated.",
        ),
    ] = None,
    rule: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATTERN=ALGORITHM[:VIEW]", help="Overrule a route of your own model."
        ),
    ] = None,
    plot: Annotated[Path | None, typer.Option(metavar="FILE", help="Write a picture.")] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write all figures.")
    ] = None,
    debug: Debug = False,
) -> None:
    from muonkit.lab.plan import assumptions, check_folders, forecast, show, write
    from muonkit.lab.plan_models import find_model, parse_roles

    check_folders(plot=plot, json=json_file)
    assume = assumptions(
        device,
        node,
        dtype,
        exchange_dtype,
        after,
        replicas,
        fraction,
        selection,
        period,
        flops=flops,
        intra=intra,
        inter=inter,
        memory=memory,
    )
    shapes = find_model(model, parse_roles(tp or ()), rules_of(rule))
    found = forecast(shapes, mesh, layout, assume)
    console = Console()
    write(found, plot, json_file)
    # A table that is cut off tells nothing: a pipe, or a narrow terminal, gets it whole.
    least = 118 if period == 1 else 137
    show(Console(width=max(console.width, least)), found)


@app.command("monitor", help=_MONITOR_HELP)
def monitor_command(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The recording.")],
    layers: Annotated[
        str, typer.Option(metavar="PATTERN", help="Only matrices with such names.")
    ] = "*",
    out: Annotated[
        Path | None, typer.Option(help="Folder for the pictures [default: beside the recording].")
    ] = None,
    debug: Debug = False,
) -> None:
    from muonkit.lab.monitor import write

    console = Console()
    write(run, out, layers, Console(width=max(console.width, 118)))


def _version(asked: bool) -> None:
    if asked:
        say(f"muonkit {muonkit.__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    pass


def _line(error: BaseException) -> tuple[str, int]:
    """The one line and the exit status for ``error``."""
    if isinstance(error, Interrupted):
        return f"{error}: the same command goes on from there", error.exit_status
    if isinstance(error, LabError):
        return f"error: {error}", error.exit_status
    if isinstance(error, KeyboardInterrupt | typer.Abort):
        return "stopped: the same command goes on from the last checkpoint", 130
    usage: Any = getattr(error, "format_message", None)  # a click.ClickException, by any vendor
    if usage is not None:
        message = " ".join(usage().split()).rstrip(".")
        context = getattr(error, "ctx", None)
        command = context.command_path if context is not None else "muonkit"
        return f"error: {message}: see {command} --help", 2
    if isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename else ""
        return f"error: {where}{error.strerror or error}; --debug shows where", 1
    text = " ".join(str(error).split())
    return f"error: {type(error).__name__}: {text}; --debug shows where", 1


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: what follows the program's name (default: ``sys.argv``'s).

    Returns:
        The exit status.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        with any_stream():
            return _run(words)
    except OSError as error:  # what was printed could not be written
        return _failed(error, words)


def _run(words: list[str]) -> int:
    streams = sys.stdout, sys.stderr
    try:
        command = typer.main.get_command(app)
        status = command.main(args=words or ["--help"], prog_name="muonkit", standalone_mode=False)
        if status != 130:
            return status if isinstance(status, int) else 0
        # Typer turns a KeyboardInterrupt into this status without a word.
        raise KeyboardInterrupt
    except SystemExit as error:
        # What Typer makes of a reader that left while it printed its help. It has put others in
        # place of the streams, too.
        if not isinstance(error.__context__, BrokenPipeError):
            raise
        sys.stdout, sys.stderr = streams
        return 0
    except (Exception, KeyboardInterrupt) as error:
        return _failed(error, words)


def _failed(error: BaseException, words: list[str]) -> int:
    """Say it in one line, if anybody can read it; the exit status. An error of the user's own code
    is preceded by its traceback.
    """
    text, status = _line(error)
    with suppress(OSError):
        if "--debug" in words:
            traceback.print_exception(error)
        elif isinstance(error, TaskError) and error.trace:
            print(_printable(error.trace), end="", file=sys.stderr)
        print(shown(text), file=sys.stderr)
    return status


def _printable(text: str) -> str:
    """Lines in which nothing acts on a terminal."""
    return "".join(f"{shown(line)}\n" for line in text.splitlines())


if __name__ == "__main__":
    sys.exit(main())
