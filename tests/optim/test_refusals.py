"""What the optimizer refuses: in one or two lines, with the remedy, before anything is written."""

from __future__ import annotations

import sys
import types
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from muonkit import Muon, MuonW, RoutingError
from tests.helpers import internals
from tests.helpers.optim import mlp, parameter, set_gradients

# --- what is refused ---------------------------------------------------------------------------


def test_sparse_gradients_are_refused_before_anything_is_written() -> None:
    model = nn.ModuleDict({"embed": nn.Embedding(10, 6, sparse=True), "body": nn.Linear(6, 6)})
    groups = [
        {"params": [model["body"].weight]},
        {"params": [("embed.weight", model["embed"].weight)], "algorithm": "adamw", "lr": 0.1},
    ]
    groups[0]["params"] = [("body.weight", model["body"].weight)]
    optimizer = Muon(groups)
    model["body"](model["embed"](torch.tensor([1, 2]))).sum().backward()
    before = model["body"].weight.detach().clone()
    with pytest.raises(RuntimeError, match=r"sparse gradients: embed\.weight .*sparse=False"):
        optimizer.step()
    assert torch.equal(model["body"].weight, before)
    assert not any(v.any() for state in optimizer.state.values() for v in state.values())


@pytest.mark.parametrize("algorithm", ["muon", "adamw"])
def test_complex_and_integer_parameters_are_refused(algorithm: str) -> None:
    """AdamW trains complex ones: tests/optim/test_complex_parameters.py."""
    group = {"algorithm": algorithm, "lr": 0.1}
    if algorithm == "muon":
        with pytest.raises(RuntimeError, match=r"complex64; AdamW trains it .*'ignore'"):
            Muon([{"params": [nn.Parameter(torch.zeros(2, 2, dtype=torch.complex64))], **group}])
    with pytest.raises(TypeError, match=r"torch.int64.*buffer"):
        Muon([{"params": [torch.zeros(2, 2, dtype=torch.int64)], **group}])
    with pytest.raises(RuntimeError, match="sparse parameters"):
        Muon([{"params": [torch.eye(2).to_sparse()], **group}])


@pytest.mark.parametrize("algorithm", ["muon", "adamw"])
def test_a_parameter_that_cannot_be_written_to_is_refused_at_once(algorithm: str) -> None:
    """A step would have written to others before torch refused it."""
    group = {"algorithm": algorithm, "lr": 0.1}
    expanded = nn.Parameter(torch.zeros(4, 1).expand(4, 4))
    with pytest.raises(ValueError, match=r"expanded: .*nn\.Parameter\(tensor\.clone\(\)\)"):
        Muon([{"params": [parameter(3, 3), expanded], **group}])
    Muon([{"params": [parameter(3, 3), expanded.requires_grad_(False)], **group}])
    Muon([{"params": [nn.Parameter(torch.zeros(1, 4).expand(1, 4))], **group}])
    with pytest.raises(ValueError, match="run one batch through the lazy module"):
        Muon([{"params": [nn.LazyLinear(3).weight], **group}])


def test_a_number_of_numpys_is_one() -> None:
    w = parameter(4, 4)
    w.grad = torch.ones(4, 4)
    optimizer = Muon([w], lr=np.float32(0.5), weight_decay=np.float64(0.0))
    before = w.detach().clone()
    optimizer.step()
    assert not torch.equal(w, before)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        (
            {"lr": float("inf")},
            ValueError,
            "Learning rate should be >= 0 and < inf|>= 0 but is: inf",
        ),
        ({"lr": "0.1"}, TypeError, "Learning rate should be a number but is: '0.1'"),
        ({"lr": np.array(0.1)}, TypeError, r"should be a number .*array\(0.1\); write float"),
        ({"lr": Fraction(1, 10)}, TypeError, r"should be a number .*; write float"),
        ({"weight_decay": "0"}, TypeError, "weight decay should be a number"),
        ({"ns_coefficients": (1.0, float("nan"), 1.0)}, ValueError, "3 values .finite."),
        ({"lr": float("nan")}, ValueError, "Learning rate should be >= 0 but is: nan"),
        ({"momentum": 1.0}, ValueError, "momentum should be >= 0 and < 1"),
        ({"eps": -1.0}, ValueError, "eps should be"),
        ({"ns_steps": 0}, ValueError, "from 1 to 99"),
        ({"ns_coefficients": "polar"}, ValueError, "'polar_express'"),
        ({"ns_dtype": "int8"}, ValueError, "'auto', 'float64', 'float32'"),
        ({"ns_coefficients": "cans", "ns_dtype": "bfloat16"}, ValueError, "no safety factor"),
        ({"ns_form": "gram!"}, ValueError, "unknown ns_form"),
        ({"adjust_lr_fn": "muP"}, ValueError, "'original', 'match_rms_adamw', 'spectral'"),
        ({"nonfinite": "ignore"}, ValueError, "'propagate', 'skip', 'raise'"),
        ({"period": 2, "fraction": 0.5}, ValueError, "give one of them"),
    ],
)
def test_wrong_options_are_refused(options: dict, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        Muon([parameter(3, 3)], **options)
    with pytest.raises(error, match=words):
        MuonW(mlp(), **options)
    with pytest.raises(error, match=words):  # in a group as well
        Muon([{"params": [parameter(3, 3)], **options}])


def test_wrong_groups_are_refused() -> None:
    p = [parameter(3, 3)]
    with pytest.raises(ValueError, match="'muon', 'adamw'"):
        Muon([{"params": p, "algorithm": "sgd"}])
    with pytest.raises(TypeError, match="not a set"):
        Muon([{"params": set(p)}])
    with pytest.raises(ValueError, match=r"use_muon=True and algorithm='adamw'"):
        Muon([{"params": p, "algorithm": "adamw", "use_muon": True}])
    with pytest.raises(ValueError, match=r"no lr of its own.*adamw_lr"):
        Muon([{"params": p, "use_muon": False}], lr=0.02)
    with pytest.raises(ValueError, match=r"betas should be two numbers in \[0, 1\)"):
        Muon([{"params": p, "use_muon": False, "lr": 0.1, "betas": (0.9, 1.0)}])
    with pytest.raises(ValueError, match=r"'flatten' .convolution., 'experts'"):
        Muon([parameter(4, 3, 2, 2)])
    with pytest.raises(ValueError, match="train it with AdamW"):
        Muon([parameter(4)])
    with pytest.raises(ValueError, match=r"my.weight: view .* cuts 3 rows in 2"):
        Muon([{"params": [("my.weight", p[0])], "view": "split(rows=2)"}])


def test_adamws_arguments_are_checked_before_there_is_a_group() -> None:
    with pytest.raises(ValueError, match="betas should be"):
        Muon([parameter(3, 3)], adamw_betas=(0.9, 1.5))
    with pytest.raises(TypeError, match=r"no argument 'betas'; AdamW's is called adamw_betas"):
        MuonW(mlp(), betas=(0.9, 0.95))
    with pytest.raises(TypeError, match=r"no argument 'fused'; nothing stands .* leave it out"):
        MuonW(mlp(), fused=True)
    with pytest.raises(TypeError, match=r"no argument 'muon_lr'; it is called lr"):
        MuonW(mlp(), muon_lr=0.1)
    with pytest.raises(TypeError, match=r"no argument 'params'; .*Write MuonW.*muonw\(args"):
        MuonW(mlp(), params=mlp().parameters())
    with pytest.raises(TypeError, match=r"no argument 'wd'; it is called weight_decay"):
        MuonW(mlp(), wd=0.1)
    with pytest.raises(TypeError, match=r"no argument 'wdd'; it has lr, weight_decay, .*ns_form"):
        MuonW(mlp(), wdd=0.1)
    with pytest.raises(TypeError, match="a dict with 'params'"):
        Muon([parameter(3, 3)]).add_param_group({"lr": 1.0})


def test_a_group_broken_later_is_refused_before_anything_is_written() -> None:
    params = [parameter(4, 4), parameter(4, 4)]
    optimizer = Muon([{"params": params[:1]}, {"params": params[1:]}], lr=0.1)
    optimizer.param_groups[1]["view"] = "split(rows=3)"
    set_gradients(params)
    before = params[0].detach().clone()
    with pytest.raises(ValueError, match="4 rows in 3"):
        optimizer.step()
    assert torch.equal(params[0], before)
    with pytest.raises(TypeError, match="a view is a string, got list"):
        Muon([{"params": params, "view": ["matrix"]}])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_momentum_of_one_element_is_a_number(dtype: torch.dtype) -> None:
    one, other = (parameter(6, 4, dtype=dtype) for _ in range(2))
    of_tensor, of_number = Muon([one], momentum=torch.tensor([0.9])), Muon([other], momentum=0.9)
    for step in range(2):
        set_gradients([one], step)
        set_gradients([other], step)
        of_tensor.step()
        of_number.step()
    torch.testing.assert_close(one, other)
    with pytest.raises(ValueError, match=r"momentum should be one number but has the shape \(2,\)"):
        Muon([one], momentum=torch.tensor([0.9, 0.9]))


def test_a_list_in_a_list_of_options_is_looked_at_again() -> None:
    p = parameter(6, 4)
    optimizer = Muon([p], ns_coefficients=[[3.4445, -4.775, 2.0315] for _ in range(5)])
    set_gradients([p])
    optimizer.step()
    before = p.detach().clone()
    optimizer.param_groups[0]["ns_coefficients"][0][0] = float("nan")
    with pytest.raises(ValueError, match="nothing was changed"):
        optimizer.step()
    assert torch.equal(p, before)


def test_a_scheduled_lr_has_no_parameter_looked_at_again(monkeypatch: pytest.MonkeyPatch) -> None:
    looked_at: list[str] = []
    internals.spy_on_validation(monkeypatch, looked_at)
    params = [parameter(6, 4), parameter(4, 4)]
    optimizer = Muon(params)
    assert len(looked_at) == 2
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 1 / (1 + t))
    for step in range(3):
        set_gradients(params, step)
        optimizer.step()
        scheduler.step()
        assert len(looked_at) == 4  # once more at the first step
    optimizer.param_groups[0]["adjust_lr_fn"] = "spectral"
    settled = len(looked_at)
    optimizer.step()
    assert len(looked_at) == settled + 2
    optimizer.param_groups[0]["lr"] = -1.0
    with pytest.raises(ValueError, match="nothing was changed"):
        optimizer.step()
    assert len(looked_at) == settled + 2


@pytest.mark.parametrize("scale", ["original", "match_rms_adamw", "spectral", "unit_rms"])
@pytest.mark.parametrize("shape", [(5, 0), (0, 5)])
def test_a_matrix_without_entries_is_taken(shape: tuple[int, int], scale: str) -> None:
    p = parameter(*shape)
    optimizer = Muon([p, parameter(4, 4)], adjust_lr_fn=scale)
    set_gradients([p])
    optimizer.step()
    optimizer.describe()


# --- flat shards ----------------------------------------------------------------------------------

WHOLE = r"shard with fully_shard \(FSDP2\), or take DDP and share the state out with zero=1"


def of_zero_3(shape: tuple[int, ...]) -> nn.Parameter:
    """A stand-in with the attributes that DeepSpeed documents: between two passes a parameter is
    empty, and says what it was.
    """
    p: Any = nn.Parameter(torch.empty(0))
    p.ds_id, p.ds_shape, p.ds_status = 0, torch.Size(shape), "NOT_AVAILABLE"
    return p  # type: ignore[no-any-return]


@pytest.mark.parametrize("algorithm", ["muon", "adamw"])
def test_parameters_of_deepspeeds_zero_3_are_refused(algorithm: str) -> None:
    group = {"params": [("w", of_zero_3((8, 6)))], "algorithm": algorithm}
    with pytest.raises(ValueError, match=rf"w .* parameter \(8, 6\) that DeepSpeed.*{WHOLE}"):
        Muon([group], adamw_lr=0.1)


def test_models_of_deepspeeds_zero_3_are_refused() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    for layer in model:
        layer.weight = of_zero_3((4, 4))
    with pytest.raises(RoutingError, match=rf"0\.weight .* DeepSpeed's ZeRO-3 has sh.*{WHOLE}"):
        MuonW(model, lr=0.1)


@pytest.mark.parametrize("ranks", [1, 2])
def test_megatrons_shards_are_refused_where_there_are_several(
    ranks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stand-in with the attributes and the module that Megatron documents; it marks the matrices
    of a single rank too.
    """
    p: Any = nn.Parameter(torch.ones(4, 6))
    p.tensor_model_parallel, p.partition_dim, p.partition_stride = True, 0, 1
    Muon([p])
    state: Any = types.ModuleType("megatron.core.parallel_state")
    state.get_tensor_model_parallel_world_size = lambda: ranks
    monkeypatch.setitem(sys.modules, state.__name__, state)
    if ranks == 1:
        Muon([p])
        return
    with pytest.raises(ValueError, match=r"Megatron's tensor parallelism cuts\. Muon needs shards"):
        Muon([p])
    p.allreduce = False  # of an expert, which may be cut otherwise
    Muon([p])


@pytest.mark.parametrize("algorithm", ["muon", "adamw"])
@pytest.mark.parametrize("count", [1, 3])
def test_a_vector_in_place_of_a_groups_parameters_is_refused(algorithm: str, count: int) -> None:
    """As DeepSpeed's ZeRO-1 and ZeRO-2 leave the groups of an optimizer that they are given."""
    params = [nn.Parameter(torch.ones(4, 6)) for _ in range(count)]
    named = [(f"w{i}", p) for i, p in enumerate(params)]
    optimizer = Muon([{"params": named, "algorithm": algorithm}], adamw_lr=0.1)
    flat = nn.Parameter(torch.ones(12 * count))
    flat.grad = torch.ones_like(flat)
    optimizer.param_groups[0]["params"] = [flat]
    with pytest.raises(ValueError, match=rf"one vector of .* ZeRO-1 and ZeRO-2 .*{WHOLE}"):
        optimizer.step()
    assert torch.equal(flat, torch.ones_like(flat))


@pytest.mark.parametrize(
    ("group", "words"),
    [
        ({"algorithm": "adamw", "view": "flatten"}, "adamw got 'view'.*'algorithm': 'muon'"),
        ({"algorithm": "adamw", "momentum": 0.9, "ns_steps": 3}, "'momentum', 'ns_steps'"),
        ({"use_muon": False, "adamw_lr": 0.1}, "'adamw_lr', which it does not read: it has lr,"),
        ({"betas": (0.9, 0.99)}, "muon got 'betas'.*'algorithm': 'adamw'"),
        ({"adamw_eps": 1e-6}, "muon got 'adamw_eps'"),
    ],
)
def test_options_of_the_other_algorithm_are_refused(group: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Muon([{"params": [parameter(4, 4)], **group}], adamw_lr=0.1)


def test_names_are_all_or_none() -> None:
    p, q = parameter(4, 4), parameter(4, 4)
    remedy = r"\(name, parameter\), as model\.named_parameters\(\) has them, or none"
    with pytest.raises(ValueError, match=f"names for 1 of its 2 parameters; give .*{remedy}"):
        Muon([{"params": [("p", p), q]}])
    named, unnamed = Muon([("p", p)]), Muon([p])
    with pytest.raises(ValueError, match=f"has no names, and .*{remedy}"):
        named.add_param_group({"params": [q]})
    with pytest.raises(ValueError, match=f"has names, and .*{remedy}"):
        unnamed.add_param_group({"params": [("q", q)]})
    assert len(named.param_groups) == len(unnamed.param_groups) == 1


def test_a_state_dict_of_other_groups_is_refused_with_the_remedy() -> None:
    ours = MuonW(mlp())
    before = ours.state_dict()
    theirs = torch.optim.AdamW(mlp().parameters()).state_dict()
    with pytest.raises(ValueError, match=r"different number of parameter groups: 1 group .*Build"):
        ours.load_state_dict(theirs)
    shorter = ours.state_dict()
    shorter["param_groups"][0] = {
        **shorter["param_groups"][0],
        "params": shorter["param_groups"][0]["params"][:1],
        "param_names": [],
    }
    with pytest.raises(ValueError, match=r"has 1 parameters in it, and .*Build the optimizer"):
        ours.load_state_dict(shorter)
    assert before["param_groups"] == ours.state_dict()["param_groups"]


ODD = "a\x1b[2J\nb"


def test_names_are_shown_as_data() -> None:
    """In the errors of the core; where names are compared they stay what they are."""
    with pytest.raises(TypeError, match=r"a\\x1b\[2J\\nb of shape") as refused:
        Muon([(ODD, torch.zeros(2, 2, dtype=torch.int64))])
    assert str(refused.value).isprintable()
    p = parameter(4, 4)
    optimizer = Muon([(ODD, p)], nonfinite="raise")
    p.grad = torch.full_like(p, torch.nan)
    with pytest.raises(FloatingPointError) as broken:
        optimizer.step()
    assert str(broken.value).isprintable()
    state = optimizer.state_dict()
    assert state["param_groups"][0]["param_names"] == [ODD]
    optimizer.load_state_dict(state)
    other = parameter(4, 4)
    kept = optimizer.state[p]["momentum_buffer"] = torch.ones(4, 4)
    optimizer.param_groups[0]["params"] = [other]  # goes on with the state of its name
    optimizer.state_dict()
    assert torch.equal(optimizer.state[other]["momentum_buffer"], kept)
