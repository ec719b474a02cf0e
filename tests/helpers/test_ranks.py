"""The harness of the distributed tests: what hangs, raises or dies is reported, by rank."""

from __future__ import annotations

import os
import signal
import time

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from muonkit._torch import whole_tensor
from tests.helpers import zoo
from tests.helpers.ranks import Cases, Ranks, counted_collectives, run

CASES = Cases()


@CASES.on(2, value=[3, 4])
def adds(value: int) -> float:
    total = torch.full((), float(value + dist.get_rank()))
    dist.all_reduce(total)
    return total.item()


def _names() -> tuple[str, str]:
    """What this torch calls the two collectives (2.13 renamed them)."""
    if hasattr(dist, "all_gather_single"):
        return "all_gather_single", "reduce_scatter_single"
    return "all_gather_into_tensor", "reduce_scatter_tensor"


@CASES.on(2)
def counts_what_leaves_the_rank() -> list[tuple[str, int]]:
    with counted_collectives() as calls:
        me = dist.get_rank()
        out = torch.empty(3)
        dist.all_to_all_single(
            out, torch.ones(3), [1, 2] if me else [2, 1], [1, 2] if me else [2, 1]
        )
        gather, scatter = _names()
        getattr(dist, gather)(torch.empty(6), torch.ones(3))
        work = getattr(dist, scatter)(torch.empty(3), torch.ones(6), async_op=True)
        work.wait()
    dist.all_to_all_single(torch.empty(2), torch.ones(2))  # after it: not counted
    return calls


def works() -> int:
    return int(adds(1))


def hangs() -> None:
    if dist.get_rank() == 0:
        time.sleep(60)
    dist.barrier()


def raises_on_one_rank() -> None:
    if dist.get_rank() == 0:
        raise ValueError("a cause to be found")
    dist.barrier()


def raises_on_all_ranks() -> None:
    pytest.fail("the same everywhere")


def raises_at_different_points() -> None:
    if dist.get_rank() == 0:
        # Started and left behind: the next sum of this rank would meet the other's first.
        dist.all_reduce(torch.ones(()), async_op=True)
    raise ValueError("out of step")


def dies() -> None:
    if dist.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()


def warns() -> None:
    import warnings

    warnings.warn("not to be overlooked", stacklevel=1)


def returns_what_cannot_be_sent() -> object:
    return lambda: None


def test_a_hang_is_reported_with_every_ranks_stack_and_what_follows_is_not_run() -> None:
    before = time.monotonic()
    outcomes = run(2, [works, hangs, adds_later], timeout=1.5)
    assert time.monotonic() - before < 30
    assert outcomes["works"].check() == (3, 3)
    assert not outcomes["hangs"].ok
    for error, line in zip(outcomes["hangs"].errors, ("hangs", "barrier"), strict=True):
        assert error is not None
        assert "still running" in error
        assert f"in {line}" in error
    with pytest.raises(AssertionError, match="not run: case 'hangs' left the ranks out of step"):
        outcomes["adds_later"].check()


def adds_later() -> float:
    return adds(5)


def test_an_error_on_one_rank_is_told_with_where_the_others_were() -> None:
    outcome = run(2, [raises_on_one_rank], timeout=60, grace=0.5)["raises_on_one_rank"]
    report = outcome.report()
    assert "ValueError: a cause to be found" in report
    assert "still running" in report
    assert "in barrier" in report


def test_an_error_on_all_ranks_is_told_once_and_the_next_case_runs() -> None:
    outcomes = run(2, [raises_on_all_ranks, works, warns, returns_what_cannot_be_sent, works_again])
    assert outcomes["raises_on_all_ranks"].report().count("the same everywhere") == 2  # code, error
    assert "not to be overlooked" in outcomes["warns"].report()
    assert "pickle" in outcomes["returns_what_cannot_be_sent"].report()
    for name in ("works", "works_again"):
        assert outcomes[name].check() == (3, 3)


def works_again() -> int:
    return works()


def test_ranks_that_raise_out_of_step_run_nothing_more() -> None:
    outcomes = run(2, [raises_at_different_points, works], grace=1.0)
    assert "out of step" in outcomes["raises_at_different_points"].report()
    assert "not run" in outcomes["works"].report()


def test_a_rank_that_dies_is_named_with_its_signal() -> None:
    outcomes = run(2, [dies, works], grace=2.0)
    error = outcomes["dies"].errors[1]
    assert error is not None
    assert "killed by SIGKILL" in error
    # gloo tells the other rank that the connection is gone.
    assert outcomes["dies"].errors[0] is not None
    assert "not run" in outcomes["works"].report()


# --- the zoo's layouts: parts by definition, against torch's own ---------------------------------

TRAINED = ["fsdp2", "hsdp", "fsdp2_tp"]


def lays_out(layout: str) -> None:
    """Every rank holds what it should, in parameters and in gradients set from a seed."""
    model, _ = zoo.build(layout)
    alone = dict(zoo.Zoo().named_parameters())
    for name, full in zoo.assemble_parameters(model).items():
        assert torch.equal(full, alone[name]), name
    zoo.set_gradients(model, step=3)
    gradients = {name: p.grad for name, p in model.named_parameters()}
    for name, full in zoo.assemble(gradients).items():
        expected = zoo.full_random(f"gradient of {name}", full.shape, 3)
        assert torch.equal(full, expected), name
        if isinstance(gradients[name], DTensor):
            # By torch's own rules: its strides on the mesh, its all-gather (unless that is wrong).
            assert torch.equal(whole_tensor(gradients[name]), expected), name
            cut_twice = any(hasattr(p, "split_factor") for p in gradients[name].placements)
            if not (cut_twice and torch.__version__.startswith("2.9.")):
                assert torch.equal(gradients[name].full_tensor(), expected), name


CASES.on(4, layout=[name for name in zoo.LAYOUTS if name != "hsdp_tp"])(lays_out)
CASES.on(8, layout=["fsdp2", "hsdp_tp"])(lays_out)


@CASES.on(4, layout=TRAINED)
def trains_as_one_process(layout: str) -> None:
    model, _ = zoo.build(layout)
    alone = zoo.Zoo()
    loss, expected = model(zoo.tokens()), alone(zoo.tokens())
    loss.backward()
    expected.backward()
    # float32 sums in another order; the gradients of a layer are sums over 20 tokens.
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    gradients = zoo.assemble({name: p.grad for name, p in model.named_parameters()})
    for name, p in alone.named_parameters():
        assert zoo.deviation(gradients[name], p.grad) < 1e-5, name


@CASES.on(2)
def replicas_that_differ_are_found() -> None:
    with pytest.raises(AssertionError, match=r"w: rank 1 differs"):
        zoo.assemble({"w": torch.full((3,), float(dist.get_rank()))})


@pytest.mark.parametrize(("world_size", "case"), CASES.ids())
def test_a_case_runs_on_every_rank(world_size: int, case: str, ranks: Ranks) -> None:
    values = ranks.outcome(world_size, case).check()
    if case.startswith("adds"):
        expected: object = 2 * int(case[-1]) + 1
    elif case.startswith("counts"):
        expected = [("all_to_all_single", 4), *((name, 12) for name in _names())]
    else:
        expected = None  # asserts by itself, on the ranks
    assert values == (expected,) * world_size
