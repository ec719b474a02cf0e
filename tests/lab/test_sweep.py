"""Sweeps by halving, rates of embeddings and head, and the lines for a script."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import nn

from muonkit.lab import models, report
from muonkit.lab.cli import main
from muonkit.lab.compare import Chosen, Comparison, Session, comparison
from muonkit.lab.errors import LabError
from muonkit.lab.optimizers import OPTIMIZERS, Facts, Given
from muonkit.lab.progress import Lines
from muonkit.lab.results import Curve, Outcome, advice
from muonkit.lab.rules import rules_of
from muonkit.lab.saved import Result
from muonkit.lab.sweep import PART, Trial, Trials, halved_decay, halved_rate
from muonkit.lab.train import Run, lr_factor
from tests.helpers.lab import losses


def halved(
    search: Trials[float], loss_at: Callable[[Trial], float]
) -> tuple[float, list[list[Trial]]]:
    """What a search finds, and its rounds."""
    rounds, trials = [], next(search)
    while True:
        rounds.append(list(trials))
        try:
            trials = search.send([loss_at(trial) for trial in trials])
        except StopIteration as end:
            return end.value, rounds


# --- the search ---


def test_short_runs_choose_where_whole_runs_begin_and_these_decide() -> None:
    # In a short run twice the rate is best.
    def loss(trial: Trial) -> float:
        return math.log(trial.value / (0.02 if trial.part > 1 else 0.01)) ** 2

    found, (short, whole, more) = halved(halved_rate(0.01), loss)
    assert found == 0.01
    assert [t.value for t in short] == [0.0025, 0.005, 0.01, 0.02, 0.04]
    assert {(t.part, t.seed) for t in short} == {(PART, 0)}
    assert [t.value for t in whole] == [0.01, 0.02, 0.04]
    assert [t.value for t in more] == [0.005], "until both neighbours are known to be worse"
    assert {(t.part, t.seed) for t in whole + more} == {(1, 0)}


def test_it_widens_at_an_edge_and_walks_on_in_whole_runs() -> None:
    far, rounds = halved(halved_rate(0.01), lambda t: -t.value)
    tried = [t for each in rounds for t in each]
    assert max(t.value for t in tried if t.part > 1) == 0.64  # as the full sweep
    assert far == max(t.value for t in tried)
    assert len([t for t in tried if t.part == 1]) == 7
    assert len(tried) == len(set(tried))


@pytest.mark.parametrize("seeds", [1, 2, 3])
def test_the_mean_over_seeds_decides_between_the_better_two(seeds: int) -> None:
    # 0.02 is best on seed 0, and 0.01 on the others.
    def loss(trial: Trial) -> float:
        best = 0.02 if trial.seed == 0 else 0.01
        return math.log(trial.value / best) ** 2 * (1 if trial.seed == 0 else 2)

    found, rounds = halved(halved_rate(0.01, seeds=seeds), loss)
    assert found == (0.02 if seeds == 1 else 0.01)
    last = [(t.value, t.seed) for t in rounds[-1]]
    if seeds > 1:
        assert sorted(last) == [(v, s) for v in (0.01, 0.02) for s in range(1, seeds)]


def test_a_value_that_diverges_on_any_seed_counts_as_infinite() -> None:
    def loss(trial: Trial) -> float:
        return math.inf if trial.value > 0.005 and trial.seed else 1 / trial.value

    found, _ = halved(halved_rate(0.01, 3, seeds=2), lambda t: math.inf)
    assert found < 0.01, "where all diverge, the way to go is down"
    found, _ = halved(halved_decay(0.01, 3, seeds=2), loss)
    assert found == 0.01 or math.isfinite(loss(Trial(found, 1, 1)))


def test_decays_are_tried_in_whole_runs() -> None:
    found, rounds = halved(halved_decay(0.1, 5, seeds=2), lambda t: t.value + t.seed)
    assert found == pytest.approx(0.01)
    assert all(t.part == 1 for each in rounds for t in each)
    assert [len(each) for each in rounds] == [5, 2]


# --- a rate of its own for embeddings and head ---


def _model() -> nn.Module:
    torch.manual_seed(0)
    return models.GPT(16, 8, width=16, layers=1, heads=2)


def test_embeddings_and_head_have_their_rate_and_nothing_else_has() -> None:
    model = _model()
    named = {id(p): name for name, p in model.named_parameters()}
    groups = Run("adamw", 0.1, 0, None, 0.8).build(model).param_groups
    rates = {named[id(p)]: group["lr"] for group in groups for p in group["params"]}
    apart = {"tokens.weight", "positions.weight", "head.weight"}
    assert {name for name, rate in rates.items() if rate == 0.8} == apart
    assert {rate for name, rate in rates.items() if name not in apart} == {0.1}
    assert len(rates) == len(named)
    decays = {named[id(p)]: g["weight_decay"] for g in groups for p in g["params"]}
    assert decays["tokens.weight"] == decays["blocks.0.up.weight"] == 0.1
    for group in Run("muonw", 0.1, 0, None, 0.8).build(model).param_groups:
        assert group["lr"] == (0.8 if group["algorithm"] == "adamw" else 0.1)
    with pytest.raises(LabError, match="sgd has no rate of its own"):
        Run("sgd", 0.1, 0, None, 0.8).build(model)


def test_a_run_names_what_it_has_and_a_plain_one_names_nothing() -> None:
    run = Run("adamw", 0.1, 2, 0.5, 0.8, 4)
    assert run.key == "adamw-lr0.1-emb0.8-wd0.5-part4-seed2"
    assert run.fields()["embedding_lr"] == 0.8
    assert Run("adamw", 0.1, 2).key == "adamw-lr0.1-seed2"
    assert Run("adamw", 0.1, 2).fields() == {"optimizer": "adamw", "lr": 0.1, "seed": 2}


def test_what_is_asked_for_belongs_to_the_configuration() -> None:
    plain = comparison("digits", ["muonw", "adamw"])
    given = comparison("digits", ["muonw", "adamw"], embedding_lr={"adamw": 0.01})
    assert given.config() == {**plain.config(), "embedding_lr": {"adamw": 0.01}}
    swept = comparison("digits", ["adamw"], sweep_embedding_lr=True).config()
    assert swept["sweep_embedding_lr"]
    without: list[tuple[str, dict[str, Any]]] = [
        ("--sweep-full", {"full": True}),
        ("--sweep-points 3", {"points": 3}),
        ("--sweep-seeds 2", {"sweep_seeds": 2}),
    ]
    for option, given in without:
        with pytest.raises(LabError, match=f"{option} without a sweep: give --sweep too"):
            comparison("digits", ["adamw"], **given)


def test_rates_of_embeddings_that_an_optimizer_has_not_are_refused() -> None:
    with pytest.raises(LabError, match="none of sgd has a rate of its own for embeddings"):
        comparison("digits", ["sgd"], sweep_embedding_lr=True)
    rates: list[tuple[list[str], dict[str | None, float]]] = [
        (["adamw", "sgd"], {"sgd": 0.01}),
        (["sgd"], {None: 0.01}),
    ]
    for names, given in rates:
        with pytest.raises(LabError, match="--embedding-lr: sgd has one rate for all parameters"):
            comparison("digits", names, embedding_lr=given)
    with pytest.raises(LabError, match="--embedding-lr names 'muonw', which is not compared"):
        comparison("digits", ["adamw"], embedding_lr={"muonw": 0.01})
    both = comparison("digits", ["adamw", "sgd"], embedding_lr={None: 0.01})
    assert both.embedding_lr == {"adamw": 0.01}


class Curves(Session):
    """A session whose runs end with a loss that is lowest where all three values are best."""

    def __init__(self, asked: Comparison, best: tuple[float, float]) -> None:
        self.asked, self.best = asked, best
        self.lines, self.results = Lines(Console(quiet=True)), {}

    def run(self, runs: Sequence[Run]) -> list[Result]:
        for run in runs:
            spec = OPTIMIZERS[run.optimizer]
            rates = run.lr, spec.embedding_rate(run.lr, run.embedding_lr)
            loss = sum(math.log(x / y) ** 2 for x, y in zip(rates, self.best, strict=True))
            self.results[run] = Result(
                *(run.optimizer, run.lr, run.seed, False, 1, loss, loss, None, 0.0, 0.0, 0.0),
                embedding_lr=run.embedding_lr,
                part=run.part,
            )
        return [self.results[run] for run in runs]


@pytest.mark.parametrize(("part", "said"), [(4, "is kept: every"), (1, "has the lowest")])
def test_a_rate_is_the_best_only_if_its_whole_runs_were_sound(
    part: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    session = Curves(comparison("digits", ["adamw"], lr={"adamw": 0.1}, sweep=True), (1.0, 1.0))
    session.lines = Lines(Console(stderr=True))
    for each, is_sound in ((part, True), (1, part == 1)):
        run = Run("adamw", 0.1, 0, part=each)
        session.run([run])
        if not is_sound:
            session.results[run] = replace(session.results[run], val_loss=None)
    session._say_found("adamw", Chosen(0.1, None, None), "lr", 0.1)
    assert f"adamw: lr 0.1 {said}" in capsys.readouterr().err


def test_a_choice_at_the_edge_of_what_was_tried_is_said_to_be(
    capsys: pytest.CaptureFixture[str],
) -> None:
    for best, edge in ((1e9, "largest"), (1e-9, "smallest"), (0.1, None)):
        asked = comparison(
            *("digits", ["adamw"]), lr={"adamw": 0.1}, sweep=True, sweep_embedding_lr=True
        )
        # Of embeddings' rates those that were tried beside the lr that was chosen.
        session = Curves(asked, (0.1, best))
        session.lines = Lines(Console(stderr=True, width=200))
        session._chosen()
        lr, rate = capsys.readouterr().err.splitlines()
        end = "" if edge is None else f", and is the {edge} that was tried"
        assert rate.endswith(f"has the lowest validation loss{end}")
        assert ("that was tried" in lr) == (edge is not None)


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize(("name", "share"), [("adamw", 1.0), ("hyperball", 0.5)])
def test_the_embeddings_sweep_is_centred_on_their_usual_rate(
    name: str, share: float, full: bool
) -> None:
    usual = share * 0.032
    for best, found in ((usual, None), (2 * usual, 2 * usual), (usual / 2, usual / 2)):
        asked = comparison(
            *("digits", [name]), lr={name: 0.032}, sweep_embedding_lr=True, full=full, points=3
        )
        session = Curves(asked, (0.032, best))
        assert session._chosen() == {name: Chosen(0.032, found, None)}
        rates = {report._point(result)[2] for result in session.results.values()}
        assert {usual / 2, usual, 2 * usual} <= rates
        whole = [run.embedding_lr for run in session.results if run.part == 1]
        assert len(whole) == len(set(whole)), "no rate under two names"


def test_the_table_shows_the_rate_that_embeddings_had() -> None:
    ball = OPTIMIZERS["hyperball"]
    groups = ball.build(models.GPT(16, 8, width=16, layers=1, heads=2), 0.032).param_groups
    (rate,) = {group["lr"] for group in groups if group["algorithm"] == "adamw"}
    assert rate == ball.embedding_rate(0.032) == 0.016


# --- the lines for a script ---


def _stepped(model: nn.Module, optimizers: list[Any]) -> torch.Tensor:
    tokens = torch.arange(16).view(2, 8)
    for _ in range(2):
        nn.functional.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten()).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.mark.parametrize("embedding_lr", [None, 0.03])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_lines_make_the_optimizer_that_was_compared(
    name: str, embedding_lr: float | None
) -> None:
    spec = OPTIMIZERS[name]
    if embedding_lr and not spec.has_embedding_lr:
        return
    model = _model()
    names: dict[str, Any] = {"model": copy.deepcopy(model)}
    exec(spec.lines(Given(0.01, 0.2, embedding_lr), Facts()), names)
    ours = list(names["optimizers"]) if "optimizers" in names else [names["optimizer"]]
    found = _stepped(names["model"], ours)
    expected = _stepped(model, [spec.build(model, 0.01, 0.2, embedding_lr)])
    if name == "torch-muon-fp32":  # whose other products a script cannot have
        assert torch.allclose(found, expected, atol=1e-3)
    else:
        assert torch.equal(found, expected)


def test_the_slower_adamw_differs_in_its_beta2() -> None:
    groups = OPTIMIZERS["adamw-0.99"].build(_model(), 0.01).param_groups
    assert {group["betas"] for group in groups} == {(0.9, 0.99)}
    groups = OPTIMIZERS["adamw"].build(_model(), 0.01).param_groups
    assert {group["betas"] for group in groups} == {(0.9, 0.95)}


def test_a_pattern_is_itself_in_the_lines() -> None:
    """Also one that reads as the lines themselves do."""
    given = Given(0.01, 0.2, 0.03, rules_of(["route(model)*,fused=True,=adamw"]))
    for name in ("muonw", "adamw", "torch-muon"):
        lines = OPTIMIZERS[name].lines(given, Facts(is_undecided=True, has_complex=True))
        compile(lines, name, "exec")
        assert "Rule('route(model)*,fused=True,', algorithm=\"adamw\")" in lines
        assert 'undecided="adamw"' in lines


def _outcome(
    name: str, losses: list[float], second: float, diverged: bool = False, seed: int = 0
) -> Outcome:
    """A run of ten steps a validation, of so many seconds a step."""
    steps = [10.0 * i for i in range(len(losses))]
    curve = Curve(steps, [second * step for step in steps], losses)
    last, ms = (None if diverged else losses[-1]), 1e3 * second
    # All but 50 ms of a step are the optimizer's.
    seconds = curve.seconds[-1]
    return Result(name, 0.1, seed, diverged, 20, last, last, None, seconds, ms, ms - 50), curve


@pytest.mark.parametrize(
    ("outcomes", "optimizer", "said"),
    [
        (
            [
                *(_outcome("muonw", [4, 3, 1 + seed], 0.1, seed=seed) for seed in (0, 2)),
                *(_outcome("adamw", [4, 3, 2], 0.1, seed=seed) for seed in (0, 2)),
            ],
            "adamw",
            "That another one pays is not shown here: MuonW came to AdamW's final loss with 1 of 2 "
            "seeds.",
        ),
        (
            [_outcome("muonw", [4, 2, 1], 0.1), _outcome("adamw", [4, 3, 2], 0.1)],
            "muonw",
            "It came to AdamW's final loss in the fewest seconds.",
        ),
        (
            [_outcome("muonw", [4, 2, 1], 0.4), _outcome("adamw", [4, 3, 2], 0.1)],
            "adamw",
            "MuonW does not pay in seconds here: to AdamW's final loss it needed 10 steps, but "
            "4.0 s where AdamW took 2.0 s, since its step takes 400 ms and AdamW's 100 ms.",
        ),
        (
            [_outcome("muonw", [4, 3, 3], 0.1), _outcome("adamw", [4, 3, 2], 0.1)],
            "adamw",
            "MuonW does not pay here, neither in steps nor in seconds: AdamW's final loss was not "
            "reached, with one seed (--seeds 3 tells more).",
        ),
        (
            [_outcome("muonw", [4, 3], 0.1, diverged=True), _outcome("adamw", [4, 3, 2], 0.1)],
            "adamw",
            "MuonW diverged with its only seed.",
        ),
        ([_outcome("adamw", [4, 3, 2], 0.1)], "adamw", "Nothing else was compared."),
        (
            [_outcome("muonw", [4, 3, 1], 0.1), _outcome("adamw", [4, 2], 0.1, diverged=True)],
            "muonw",
            "It ended at the lowest validation loss, of those without a run that diverged. AdamW "
            "diverged with its only seed.",
        ),
        (
            [_outcome("muonw", [4, 2, 3, 5], 0.1), _outcome("adamw", [4, 1, 3, 4], 0.1)],
            "adamw",
            "It had the lowest validation loss, 1.0000, but the loss rose again by the end "
            "(AdamW's at least): train for fewer steps.",
        ),
        (
            [_outcome("muonw", [4, 1, 3], 0.1), _outcome("adamw", [4, 3, 2], 0.1)],
            "muonw",
            "It came to AdamW's final loss in the fewest seconds. Its loss rose after that: stop "
            "it there, or train for fewer steps.",
        ),
        (
            [_outcome("muonw", [4, 3, 1], 0.1), _outcome("sgd", [4, 3, 2], 0.1)],
            "muonw",
            "It ended at the lowest validation loss.",
        ),
    ],
)
def test_what_to_train_with_is_what_paid_in_seconds(
    outcomes: list[Outcome], optimizer: str, said: str
) -> None:
    found = advice(outcomes)
    assert found is not None
    assert (found.optimizer, found.said) == (optimizer, said)
    assert advice([_outcome("muonw", [4, 3], 0.1, diverged=True)]) is None


@pytest.mark.parametrize(
    ("optimizer_ms", "optimizer", "said"),
    [
        (
            20,
            "muonw",
            "It comes to AdamW's final loss in 0.700 s where AdamW takes 1.2 s: something else "
            "used this machine, so this is reckoned with 50 ms of forward and backward for both, "
            "and their own 20 and 10 ms.",
        ),
        (
            90,
            "adamw",
            "MuonW does not pay in seconds here: to AdamW's final loss it needed 10 steps, 1.4 s "
            "where AdamW takes 1.2 s: something else used this machine, so this is reckoned with "
            "50 ms of forward and backward for both, and their own 90 and 10 ms.",
        ),
    ],
)
def test_where_the_machine_was_used_seconds_are_reckoned(
    optimizer_ms: float, optimizer: str, said: str
) -> None:
    """MuonW's forward and backward took 110 ms, AdamW's 50."""
    both = []
    for name, ends, own, passes in (
        ("muonw", [4, 2, 1], optimizer_ms, 110),
        ("adamw", [4, 3, 2], 10, 50),
    ):
        result, curve = _outcome(name, ends, 0.1)
        both.append((replace(result, step_ms=passes + own, optimizer_ms=own), curve))
    found = advice(both)
    assert found is not None
    assert (found.optimizer, found.said) == (optimizer, said)


# --- the command ---


def test_compare_halves_says_what_it_spent_and_ends_with_lines_that_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    words = ["compare", "digits", "--optimizers", "muonw,adamw", "--steps", "8", "--sweep"]
    words += ["--sweep-points", "3", "--sweep-embedding-lr", "--threads", "1"]
    assert main([*words, "--out", str(out)]) == 0
    said = capsys.readouterr().out
    summary = json.loads((out / "summary.json").read_text())
    for row in summary["rows"]:
        name = row["optimizer"]
        swept = [r for r in summary["sweep"] if r["optimizer"] == name]
        assert {r["part"] for r in swept} == {1, PART}
        assert all(r["steps"] == 8 // r["part"] for r in swept)
        assert len({json.dumps([r[k] for k in ("lr", "embedding_lr", "part", "seed")])
                    for r in swept}) == len(swept)  # fmt: skip
        steps = sum(r["steps"] for r in swept)
        spent = f"{name}: its sweep took {len(swept)} runs, {steps:,} steps (as many as"
        assert spent in said.replace("\n", " ")
    page = (out / "report.html").read_text()
    assert "By halving: rates in short runs on seed 0" in page
    assert "its sweep took" in page
    assert '<th scope="col">embedding lr</th>' in page
    # Once more: the searches go the same way, and nothing is trained.
    before = losses(out)
    assert main([*words, "--out", str(out)]) == 0
    assert "was finished already: nothing was trained" in capsys.readouterr().out
    assert losses(out) == before
    # The last lines but one are Python.
    code = said[said.index("In your script: ") :].split("\n\n", 1)[1].rsplit("report: ", 1)[0]
    names: dict[str, Any] = {"model": _model()}
    exec(code, names)
    rates = []
    for _ in range(8):
        rates.append(names["scheduler"].get_last_lr()[0])
        _stepped(names["model"], [names["optimizer"]])
        names["scheduler"].step()
    assert rates == pytest.approx([rates[0] * lr_factor(step, 8) for step in range(8)])
