"""QK-clip in one process: what becomes of the logits, what is refused, and what it lives with."""

from __future__ import annotations

import copy
import dataclasses
import gc
import math
import pickle
import warnings
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from muonkit import MuonW, QKClip, RoutingError
from muonkit.lab.models import GPT
from muonkit.routing.attention import AttentionHeads, HeadSlice
from tests.qk_clip.models import WIDTH, Net, batch

IDS = torch.randint(0, 64, (2, 16), generator=torch.Generator().manual_seed(0))


def still(model: nn.Module) -> torch.optim.Optimizer:
    """An optimizer that moves nothing, so that what moves was clipped."""
    return torch.optim.SGD(model.parameters(), lr=0.0)


def logits_of(clip: QKClip) -> dict[str, Tensor]:
    assert clip.latest is not None
    found: dict[str, Tensor] = clip.latest["max_logits"]
    return found


def step(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor) -> None:
    out = model(x)
    out = out.logits if hasattr(out, "logits") else out
    out.square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


# --- the equation ---------------------------------------------------------------------------------


MODEL_OF = {"GPT2": "GPT2LMHeadModel"}


def transformers_model(name: str, **more: Any) -> nn.Module:
    """A tiny model of transformers', with large weights, in float64."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config: dict[str, Any] = {
        "vocab_size": 64,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "max_position_embeddings": 64,
        "initializer_range": 0.3,
        **more,
    }
    made: nn.Module = getattr(transformers, MODEL_OF.get(name, f"{name}ForCausalLM"))(
        getattr(transformers, f"{name}Config")(**config)
    )
    with torch.no_grad():  # transformers begin with biases of zero
        for p in made.parameters():
            if p.ndim == 1:
                p.add_(0.1 * torch.randn_like(p))
    return made.double().train()


MLA = {
    "moe_intermediate_size": 16,
    "n_routed_experts": 4,
    "n_group": 1,
    "topk_group": 1,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 2,
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
}
MODELS: dict[str, Any] = {
    "lab's GPT, fused": lambda: GPT(64, 16, 32, 2, 4).double(),
    "grouped queries, biases": lambda: Embedded(Net(6, 3, 5)),
    "GPT-2, Conv1D": lambda: transformers_model(
        "GPT2", bos_token_id=1, eos_token_id=2, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0
    ),
    "Llama, grouped queries": lambda: transformers_model("Llama", num_key_value_heads=2),
    "Qwen2, biases": lambda: transformers_model("Qwen2", num_key_value_heads=1),
    "Falcon, fused by group": lambda: transformers_model(
        "Falcon", alibi=False, new_decoder_architecture=True, num_kv_heads=2, bias=True
    ),
    "DeepSeek-V3, MLA": lambda: transformers_model("DeepseekV3", **MLA),
    "DeepSeek-V3, MLA without a latent of queries": lambda: transformers_model(
        "DeepseekV3", **{**MLA, "q_lora_rank": None}
    ),
}


class Embedded(nn.Module):
    """The small model, fed with tokens."""

    def __init__(self, net: Net) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.tokens = nn.Embedding(64, 16, dtype=torch.float64)
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.net(self.tokens(x))
        return out


def all_logits(model: nn.Module) -> list[Tensor]:
    """All logits of the first attention module, (batch, heads, rows, columns)."""
    found: list[Tensor] = []

    class Products(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            kwargs = kwargs or {}
            if func is F.scaled_dot_product_attention:
                q, k = args[:2]
                k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
                found.append(q @ k.mT * (kwargs.get("scale") or q.shape[-1] ** -0.5))
            return func(*args, **kwargs)

    with Products(), torch.no_grad():
        model(IDS)
    return found[:1]


@pytest.mark.parametrize("alpha", [0.0, 0.5, 0.8])
@pytest.mark.parametrize("name", MODELS)
def test_every_logit_is_eta_times_what_it_was(name: str, alpha: float) -> None:
    """Not the largest alone: all of a head, in float64, of the first module, whose input stays."""
    model = MODELS[name]()
    optimizer = still(model)
    clip = QKClip(model, optimizer, 1e-3, alpha=alpha)
    (before,) = all_logits(model)
    kept = {n: p.detach().clone() for n, p in model.named_parameters()}
    step(model, optimizer, IDS)
    (after,) = all_logits(model)
    most = next(iter(logits_of(clip).values()))
    seen = torch.ones(before.shape[-2:], dtype=torch.bool)
    if "biases" not in name or "Qwen" in name:
        seen = seen.tril()
    causal = before.masked_fill(~torch.ones_like(seen).tril(), -math.inf)
    torch.testing.assert_close(most, causal.amax((0, 2, 3)))
    assert clip.latest is not None
    eta = next(iter(clip.latest["eta"].values()))
    groups = len(eta)
    shared = 1e-3 / most.view(groups, -1).amax(1)
    torch.testing.assert_close(eta, shared)
    every = eta.repeat_interleave(len(most) // groups)
    torch.testing.assert_close(after, before * every[:, None, None], rtol=1e-10, atol=1e-13)
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, kept[n])}
    allowed = ("q_proj", "k_proj", "qkv", "c_attn", "query_key_value", "q_b_proj", "kv_b_proj")
    assert all(any(part in n for part in allowed) for n in changed)


def test_values_and_other_rows_stay_as_they_are() -> None:
    model = transformers_model("DeepseekV3", **MLA)
    weight = model.get_parameter("model.layers.0.self_attn.kv_b_proj.weight")
    before = weight.detach().clone().view(4, 16, -1)
    clip = QKClip(model, still(model), 1e-3, measure=False)
    clip.clip({"model.layers.0.self_attn": [1.0, 1e-4, 4.0, 0.0]})
    ratio = weight.detach().view(4, 16, -1) / before
    assert clip.latest is not None
    eta = clip.latest["eta"]["model.layers.0.self_attn"].double()
    torch.testing.assert_close(ratio[:, :8], eta.sqrt()[:, None, None].expand(4, 8, 16))
    assert (ratio[:, 8:] == 1).all()
    assert (ratio[1] == 1).all()
    assert (ratio[3] == 1).all()


def test_q_rope_takes_eta_whole() -> None:
    model = transformers_model("DeepseekV3", **MLA)
    weight = model.get_parameter("model.layers.0.self_attn.q_b_proj.weight")
    rotary = model.get_parameter("model.layers.0.self_attn.kv_a_proj_with_mqa.weight")
    before, shared = weight.detach().clone().view(4, 12, -1), rotary.detach().clone()
    clip = QKClip(model, still(model), 1.0, measure=False)
    clip.clip({"model.layers.0.self_attn": torch.tensor([4.0, 4.0, 4.0, 4.0]).double()})
    ratio = weight.detach().view(4, 12, -1) / before
    torch.testing.assert_close(ratio[:, :8], torch.full_like(ratio[:, :8], 1 / 2))
    torch.testing.assert_close(ratio[:, 8:], torch.full_like(ratio[:, 8:], 1 / 4))
    assert torch.equal(rotary, shared)


def test_below_tau_nothing_changes_bit_for_bit() -> None:
    model = Net()
    before = copy.deepcopy(model.state_dict())
    optimizer = still(model)
    clip = QKClip(model, optimizer, 1e6)
    step(model, optimizer, batch(0))
    assert all((eta == 1).all() for eta in clip.latest["eta"].values())  # type: ignore[index]
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_head_whose_logits_are_not_finite_is_left_alone(bad: float) -> None:
    model = Net()
    before = model.layers[0].q_proj.weight.detach().clone()  # type: ignore[union-attr]
    clip = QKClip(model, still(model), 1.0, measure=False)
    clip.clip({"layers.0": [bad, 1.0, 4.0, 1.0]})
    ratio = model.layers[0].q_proj.weight.detach() / before  # type: ignore[union-attr, operator]
    assert (ratio[:10] == 1).all()
    assert ratio[10:].unique().tolist() == pytest.approx([0.5])
    assert logits_of(clip)["layers.0"].tolist() == [math.inf, 1, 4, 1]


def test_bfloat16_weights_are_rounded_once() -> None:
    model = Net().bfloat16()
    before = model.layers[0].q_proj.weight.detach().clone()  # type: ignore[union-attr]
    clip = QKClip(model, still(model), 1.0, measure=False)
    clip.clip({"layers.0": [3.0, 3.0, 3.0, 3.0]})
    expected = (before.double() * (1 / 3) ** 0.5).bfloat16()
    assert torch.equal(model.layers[0].q_proj.weight, expected)  # type: ignore[union-attr]


# --- what is measured -----------------------------------------------------------------------------


def test_micro_batches_count_together_and_evaluation_does_not() -> None:
    model = Net()
    optimizer = still(model)
    clip = QKClip(model, optimizer, 1e6)
    step(model, optimizer, batch(0))
    whole = logits_of(clip)
    for micro in batch(0).chunk(4):
        model(micro).square().mean().backward()
    model.eval()
    model(100 * batch(0))
    model.train()
    optimizer.step()
    for name, most in logits_of(clip).items():
        torch.testing.assert_close(most, whole[name])


def test_activation_checkpointing_measures_the_same() -> None:
    model = Net()
    optimizer = still(model)
    clip = QKClip(model, optimizer, 1e6)
    step(model, optimizer, batch(0))
    whole = logits_of(clip)
    for reentrant in (False, True):
        x = batch(0).requires_grad_()
        checkpoint(model, x, use_reentrant=reentrant).square().mean().backward()
        optimizer.step()
        assert all(torch.equal(most, whole[name]) for name, most in logits_of(clip).items())


def test_the_first_and_every_nth_step_measure() -> None:
    model = Net()
    optimizer = still(model)
    clip = QKClip(model, optimizer, 0.1, every=3)
    measured = []
    for _ in range(7):
        due = clip.measures
        step(model, optimizer, batch(0))
        assert clip.latest is not None
        assert (clip.latest["step"] == clip.step) == due
        measured.append(due)
    assert measured == [True, False, True, False, False, True, False]
    saved = pickle.loads(pickle.dumps(clip.state_dict()))
    clip.close()
    later = QKClip(model, optimizer, 0.1, every=3)
    later.load_state_dict(saved)
    assert later.step == 7
    assert not later.measures


def test_a_closure_is_measured() -> None:
    model = Net()
    optimizer = still(model)
    clip = QKClip(model, optimizer, 0.1)

    def closure() -> Tensor:
        loss: Tensor = model(batch(0)).square().mean()
        loss.backward()
        return loss

    optimizer.step(closure)  # type: ignore[arg-type]
    assert (logits_of(clip)["layers.0"] > 0).all()


def test_the_forward_pass_and_the_training_are_those_without_it() -> None:
    """Below tau, bit for bit, with Muon's own step too."""
    models = [Net(), Net()]
    optimizers = [MuonW(model, lr=1e-2) for model in models]
    QKClip(models[1], optimizers[1], 1e6)
    for i in range(3):
        for model, optimizer in zip(models, optimizers, strict=True):
            step(model, optimizer, batch(i))
    for one, other in zip(*(model.parameters() for model in models), strict=True):
        assert torch.equal(one, other)


def test_logits_stay_near_tau_in_a_training() -> None:
    model = Net()
    optimizer = MuonW(model, lr=1e-2)
    clip = QKClip(model, optimizer, 2.0)
    for _ in range(10):
        step(model, optimizer, batch(0))
    # After the clipping they are at most tau; the step that follows moves them a little.
    assert max(float(most.max()) for most in logits_of(clip).values()) < 3


def test_torch_compile_is_seen_in_eager_passes() -> None:
    model = GPT(64, 16, 32, 2, 4)
    optimizer = MuonW(model, lr=1e-2)
    compiled: Any = torch.compile(model, backend="aot_eager")
    clip = QKClip(compiled, optimizer, 0.01, every=2)
    step_of = []
    for _ in range(4):
        with torch.compiler.set_stance("force_eager" if clip.measures else "default"):
            step(compiled, optimizer, IDS)
        assert clip.latest is not None
        step_of.append(clip.latest["step"])
    assert step_of == [1, 2, 2, 4]
    clip.close()
    QKClip(compiled, optimizer, 0.01)
    compiled(IDS).square().mean().backward()
    with pytest.raises(RuntimeError, match="set_stance"):
        optimizer.step()


def test_a_compiled_step_clips() -> None:
    model = Net().float()
    optimizer = MuonW(model, lr=1e-2)
    clip = QKClip(model, optimizer, 0.1)
    compiled = torch.compile(optimizer.step, backend="eager")
    for i, take in enumerate((optimizer.step, compiled, compiled)):
        model(batch(i).float()).square().mean().backward()
        take()
    assert clip.step == 3
    assert all(float(most.max()) < 0.2 for most in logits_of(clip).values())


def test_copies_are_not_measured_and_close_leaves_nothing() -> None:
    model = Net()
    optimizer = still(model)
    clip = QKClip(model, optimizer, 0.1)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        other(1e3 * batch(0))
    step(model, optimizer, batch(0))
    first = logits_of(clip)["layers.0"]
    assert first.max() < 1e3
    clip.close()
    clip.close()
    before = copy.deepcopy(model.state_dict())
    step(model, optimizer, batch(0))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert clip.step == 1
    QKClip(model, optimizer, 0.1)


def test_a_clip_that_nobody_holds_any_more_makes_room() -> None:
    """As those of the trials of a sweep, which nobody could close."""
    model, weights = Net(), []

    def trial(model: nn.Module) -> None:
        optimizer = still(model)
        clip = QKClip(model, optimizer, 0.1)
        step(model, optimizer, batch(0))
        assert clip.step == 1
        for layer in model.layers:  # type: ignore[union-attr]
            assert len(layer._forward_hooks) == len(layer._forward_pre_hooks) == 1
        weights.append(weakref.ref(model.layers[0].q_proj.weight))  # type: ignore[union-attr, index]

    trial(model)
    trial(model)
    del model
    gc.collect()
    assert weights[0]() is None


def test_what_a_clipping_would_refuse_is_refused_before_the_step() -> None:
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    clip = QKClip(model, optimizer)
    step(model, optimizer, batch(0))
    q = model.layers[0].q_proj.weight  # type: ignore[union-attr, index]
    q.requires_grad_(False)
    model(batch(1)).square().mean().backward()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="holds q or k, but the optimizer does not train it"):
        optimizer.step()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    q.requires_grad_(True)
    optimizer.step()
    assert clip.step == 2


def test_parameters_that_were_replaced_are_found() -> None:
    """As Accelerate and FSDP2 do: others in the modules and in the groups."""
    model = Net()
    optimizer = still(model)
    QKClip(model, optimizer, 0.1)
    old = model.layers[0].q_proj.weight  # type: ignore[union-attr]
    new = nn.Parameter(old.detach().clone())  # type: ignore[union-attr, operator]
    model.layers[0].q_proj.weight = new  # type: ignore[union-attr]
    group = optimizer.param_groups[0]
    group["params"] = [new if p is old else p for p in group["params"]]
    kept = new.detach().clone()
    step(model, optimizer, batch(0))
    assert not torch.equal(new, kept)
    assert torch.equal(old, kept)  # type: ignore[arg-type]


def test_biases_may_be_another_optimizers() -> None:
    model = Net()
    matrices = [p for p in model.parameters() if p.ndim == 2]
    optimizer = torch.optim.SGD(matrices, lr=0.0)
    clip = QKClip(model, optimizer, 0.1)
    for _ in range(2):
        step(model, optimizer, batch(0))
    assert max(logits_of(clip)["layers.0"].tolist()) == pytest.approx(0.1)
    clip.close()
    for p in model.parameters():
        p.requires_grad_(p.ndim == 2)
    with pytest.raises(ValueError, match="does not train it"):
        QKClip(model, optimizer)


def test_an_interrupted_forward_pass_measures_nothing_later() -> None:
    model = Net()
    optimizer = still(model)
    clip = QKClip(model, optimizer, 1e6)
    step(model, optimizer, batch(0))
    expected = logits_of(clip)

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    handle = model.layers[1].o_proj.register_forward_pre_hook(interrupt)  # type: ignore[union-attr]
    with pytest.raises(KeyboardInterrupt):
        model(batch(0))
    handle.remove()
    try:
        step(model, optimizer, batch(0))  # its own measurement is of what was interrupted, too
        step(model, optimizer, batch(0))
        for name, most in logits_of(clip).items():
            torch.testing.assert_close(most, expected[name])
    finally:
        while torch._C._len_torch_function_stack():
            torch._C._pop_torch_function_stack()


def test_a_forward_that_raised_leaves_no_watch_behind() -> None:
    model = Net()
    optimizer = still(model)
    clip = QKClip(model, optimizer, 0.1)
    with pytest.raises(RuntimeError):
        model(torch.zeros(2, 3, 5, dtype=torch.float64))
    assert not clip._open
    assert torch._C._len_torch_function_stack() == 0
    step(model, optimizer, batch(0))


# --- a model without a config ---------------------------------------------------------------------


class Bare(nn.Module):
    """Two heads of one tensor, under names that say nothing."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.mix = nn.Linear(16, 48, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        k, v, q = self.mix(x).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def test_heads_are_given_by_hand() -> None:
    model = nn.ModuleDict({"a": Bare()}).double()
    inner: Any = model["a"]
    optimizer = still(model)
    with pytest.raises(ValueError, match=r"heads=\[AttentionHeads"):
        QKClip(model, optimizer)
    rows = [HeadSlice("a.mix.weight", 0, i * 8, i * 8 + 8) for i in range(6)]
    heads = AttentionHeads(
        "a", inner, 2, 2, 8, k=tuple(rows[:2]), v=tuple(rows[2:4]), q=tuple(rows[4:])
    )
    clip = QKClip(model, optimizer, 0.01, heads=[heads])
    before = inner.mix.weight.detach().clone()
    step(inner, optimizer, batch(0))
    ratio = inner.mix.weight.detach() / before
    eta = clip.latest["eta"]["a"]  # type: ignore[index]
    torch.testing.assert_close(ratio[:8], eta[0].sqrt().expand(8, 16))
    torch.testing.assert_close(ratio[40:], eta[1].sqrt().expand(8, 16))
    assert (ratio[16:32] == 1).all()
    step(inner, optimizer, batch(0))
    torch.testing.assert_close(logits_of(clip)["a"], torch.full((2,), 0.01, dtype=torch.float64))
    clip.close()
    wrong = heads.q[0]._replace(stop=100)
    with pytest.raises(ValueError, match="48 entries along dim 0"):
        QKClip(model, optimizer, heads=[copy_with(heads, q=(wrong, heads.q[1]))])
    other = heads.q[0]._replace(param="a.mi.weight")
    with pytest.raises(ValueError, match=r"did you mean 'a\.mix\.weight'"):
        QKClip(model, optimizer, heads=[copy_with(heads, q=(other, heads.q[1]))])


def bare_heads(model: nn.Module) -> AttentionHeads:
    rows = tuple(HeadSlice("a.mix.weight", 0, i * 8, i * 8 + 8) for i in range(6))
    inner: Any = model["a"]  # type: ignore[index]
    return AttentionHeads("a", inner, 2, 2, 8, k=rows[:2], v=rows[2:4], q=rows[4:])


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda h: {"heads": 3}, "heads=3 and kv_heads=2, expected a multiple"),
        (lambda h: {"kv_heads": 0}, "heads=2 and kv_heads=0, expected a multiple"),
        (lambda h: {"q": h.q[:1]}, "has 1 slices of q, expected 2"),
        (lambda h: {"kv_heads": 1}, "has 2 slices of k, expected 1"),
        (lambda h: {"q": (h.q[0], h.q[0])}, "expected rows of its own"),
        (lambda h: {"k": (h.q[0], h.k[1])}, "expected rows of its own"),
        (lambda h: {"q": (h.q[0]._replace(start=-4, stop=0), h.q[1])}, "expected rows of its own"),
        # Counted from the end they are rows of v, which no head has.
        (lambda h: {"q": (h.q[0]._replace(start=-24, stop=-16), h.q[1])}, "expected rows of its"),
        (lambda h: {"q": (h.q[0]._replace(start=32, stop=32), h.q[1])}, "expected rows of its own"),
    ],
)
def test_heads_that_contradict_themselves_are_refused(change: Any, complaint: str) -> None:
    model = nn.ModuleDict({"a": Bare()})
    heads = bare_heads(model)
    with pytest.raises(ValueError, match=complaint):
        QKClip(model, still(model), heads=[dataclasses.replace(heads, **change(heads))])
    with pytest.raises(ValueError, match="describes one attention module twice"):
        QKClip(model, still(model), heads=[heads, heads])
    QKClip(model, still(model), heads=[heads])  # nothing of those is left


def test_clipping_that_has_no_effect_is_told() -> None:
    """A norm that is no module cannot be seen before."""

    class Normed(Bare):
        def forward(self, x: Tensor) -> Tensor:
            k, v, q = self.mix(x).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
            q, k = F.rms_norm(q, (8,)), F.rms_norm(k, (8,))
            return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)

    for kind, is_told in ((Normed, True), (Bare, False)):
        model = nn.ModuleDict({"a": kind().double()})
        clip = QKClip(model, optimizer := still(model), 0.01, heads=[bare_heads(model)])
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            for _ in range(8):
                step(model["a"], optimizer, batch(0))
        about = [str(w.message) for w in told if "as large as before" in str(w.message)]
        assert len(about) == is_told
        clip.close()


def test_norms_in_a_part_of_their_own_and_adapters_are_seen() -> None:
    model = Net()
    model.layers[0].norm = nn.ModuleDict({"query_norm": nn.RMSNorm(8)})
    with pytest.raises(ValueError, match=r"normalizes q or k by norm\.query_norm"):
        QKClip(model, still(model))

    class Adapted(nn.Module):
        def __init__(self, base: nn.Module) -> None:
            super().__init__()
            self.base_layer = base
            self.lora_A = nn.ModuleDict({"default": nn.Linear(16, 2, bias=False)})
            self.lora_B = nn.ModuleDict({"default": nn.Linear(2, 16, bias=False)})

    model = Net()
    model.layers[1].q_proj = Adapted(model.layers[1].q_proj)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"q_proj.*has an adapter \(LoRA\) beside it"):
        QKClip(model, still(model))


def test_passes_within_a_closure_that_are_not_seen_are_told() -> None:
    model = Net()
    clip = QKClip(model, optimizer := still(model), 0.1)
    model.eval()

    def closure() -> Tensor:
        loss: Tensor = model(batch(0)).square().mean()
        loss.backward()
        return loss

    with pytest.warns(UserWarning, match="saw no attention module run"):
        optimizer.step(closure)  # type: ignore[arg-type]
    clip.close()


def test_a_trainers_wrapper_is_taken_off() -> None:
    class Wrapper(torch.optim.Optimizer):  # as Accelerate's, which has no hooks of its own
        def __init__(self, optimizer: torch.optim.Optimizer) -> None:
            self.optimizer = optimizer

        param_groups = property(lambda self: self.optimizer.param_groups)  # type: ignore[assignment]

        def step(self, closure: Any = None) -> Any:
            return self.optimizer.step(closure)

    model = Net()
    wrapper = Wrapper(still(model))
    clip = QKClip(model, wrapper, 0.01)
    step(model, wrapper.optimizer, batch(0))
    assert clip.step == 1
    assert (logits_of(clip)["layers.0"] > 0).all()


def copy_with(heads: AttentionHeads, **changes: Any) -> AttentionHeads:
    from dataclasses import replace

    return replace(heads, **changes)


def test_torchs_own_attention_is_clipped() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(16, 16), nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0)
    ).double()
    optimizer = still(model)
    clip = QKClip(model, optimizer, 0.05)
    for _ in range(2):
        step(model, optimizer, batch(0))
    (most,) = logits_of(clip).values()
    assert most.tolist() == pytest.approx([0.05] * 4)


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"tau": 0}, "tau is the largest logit that is left alone, above 0, got 0"),
        ({"tau": -1.0}, "above 0"),
        ({"tau": math.nan}, "above 0"),
        ({"tau": True}, "above 0"),
        ({"alpha": 1.5}, "alpha is q's share"),
        ({"every": 0}, "whole number of steps"),
        ({"every": 1.5}, "whole number of steps"),
        ({"heads": []}, "found no attention module"),
    ],
)
def test_bad_options(options: dict[str, Any], complaint: str) -> None:
    model = Net()
    with pytest.raises(ValueError, match=complaint):
        QKClip(model, still(model), **options)


def test_bad_models_and_optimizers() -> None:
    model = Net()
    with pytest.raises(TypeError, match=r"torch\.optim\.Optimizer, got Net"):
        QKClip(model, model)  # type: ignore[arg-type]
    mlp = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(ValueError, match="found no attention module in Sequential"):
        QKClip(mlp, still(mlp))
    q_only = torch.optim.SGD(model.layers[0].q_proj.parameters(), lr=0.0)  # type: ignore[union-attr]
    with pytest.raises(ValueError, match=r"layers\.0\.k_proj\.\w+ holds q or k, but the optimizer"):
        QKClip(model, q_only)
    frozen = Net()
    frozen.layers[1].k_proj.weight.requires_grad_(False)  # type: ignore[union-attr]
    for optimizer in (still(frozen), MuonW(frozen)):  # their groups hold it all the same
        with pytest.raises(ValueError, match=r"layers\.1\.k_proj\.weight holds q or k, but"):
            QKClip(frozen, optimizer)
    unknown = Net()
    del unknown.layers[0].num_heads
    with pytest.raises(
        RoutingError, match=r"layers\.0: nothing says how many heads(.|\n)*heads=\["
    ):
        QKClip(unknown, still(unknown))
    model.layers[1].q_proj = model.layers[0].q_proj  # type: ignore[union-attr]
    optimizer = still(model)
    with pytest.raises(ValueError, match="one parameter, which two attention modules"):
        QKClip(model, optimizer)
    model = Net()
    optimizer = still(model)
    QKClip(model, optimizer)
    with pytest.raises(ValueError, match="has a QKClip already"):
        QKClip(model, optimizer)


class OneHead(nn.Module):
    """Attention of one head in three dims: (batch, time, WIDTH)."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads = 1
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            self.register_module(name, nn.Linear(WIDTH, WIDTH).double())

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x) for f in (self.q_proj, self.k_proj, self.v_proj))
        out: Tensor = self.o_proj(F.scaled_dot_product_attention(q, k, v))
        return out


def test_one_head_in_three_dims_has_one_logit_over_all_examples() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH).double(), OneHead(), nn.Linear(WIDTH, 4).double())
    optimizer = still(model)
    clip = QKClip(model, optimizer, tau=0.1)
    x = model[0](batch(0))
    dense = model[1].q_proj(x) @ model[1].k_proj(x).mT / WIDTH**0.5
    step(model, optimizer, batch(0))
    torch.testing.assert_close(logits_of(clip)["1"], dense.amax().detach()[None])


def test_gradients_of_torch_func_are_measured_as_those_of_backward() -> None:
    """A transformation of whole batches is nothing to a clip."""

    def by_func(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
        def loss(params: dict[str, Tensor]) -> Tensor:
            out: Tensor = torch.func.functional_call(model, params, (x,))
            return out.square().mean()

        params = {name: p.detach() for name, p in model.named_parameters()}
        found: dict[str, Tensor] = torch.func.grad(loss)(params)
        return found

    found = []
    for with_func in (True, False):
        model = Net()
        optimizer = MuonW(model, lr=0.02)
        clip = QKClip(model, optimizer, tau=0.01)
        for number in range(3):
            if with_func:
                gradients = by_func(model, batch(number))
                for name, p in model.named_parameters():
                    p.grad = gradients[name]
            else:
                optimizer.zero_grad()
                model(batch(number)).square().mean().backward()
            optimizer.step()
        found.append(logits_of(clip))
    for name, logits in found[0].items():
        torch.testing.assert_close(logits, found[1][name])


def test_qk_norm_needs_no_clip() -> None:
    model = transformers_model("Qwen3", num_key_value_heads=2, head_dim=8)
    with pytest.raises(ValueError, match="normalizes q or k by q_norm"):
        QKClip(model, still(model))


def test_attention_that_is_not_torchs_is_refused_in_the_forward_pass() -> None:
    model = transformers_model("Llama", num_key_value_heads=2, attn_implementation="eager")
    optimizer = still(model)
    QKClip(model, optimizer)
    with pytest.raises(RuntimeError, match='attn_implementation="sdpa"'):
        model(IDS)
    model.set_attn_implementation("sdpa")  # type: ignore[operator]
    step(model, optimizer, IDS)


def test_a_step_without_a_measured_pass_is_refused_before_it() -> None:
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    clip = QKClip(model, optimizer)
    model.eval()
    model(batch(0)).square().mean().backward()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError, match="seen no attention module run since the last step"):
        optimizer.step()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    model.train()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.layers[0](batch(0))
    with pytest.warns(UserWarning, match="has not seen 1 of 2 attention modules"):
        optimizer.step()
    with pytest.warns(UserWarning, match="clips nothing in it"):
        optimizer.step()
    optimizer.step()  # it was told
    assert clip.step == 3


def test_logits_by_hand_are_checked() -> None:
    model = Net()
    clip = QKClip(model, still(model), measure=False)
    assert not clip.measures
    with pytest.raises(ValueError, match=r"did you mean 'layers\.0'"):
        clip.clip({"layer.0": [1.0] * 4})
    with pytest.raises(ValueError, match="logits of 3 heads, expected 4"):
        clip.clip({"layers.0": [1.0] * 3})
    with pytest.raises(ValueError, match="one logit for each head"):
        clip.clip({"layers.0": torch.ones(4, 4)})
    assert clip.step == 0
    clip.clip({"layers.0": [1.0] * 4})
    assert clip.latest is not None
    assert (clip.step, clip.latest["step"]) == (1, 1)
