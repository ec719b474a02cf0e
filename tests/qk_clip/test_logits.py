"""The largest logits, block by block, are those of the whole matrix of logits."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention.bias import causal_lower_right, causal_upper_left

from muonkit.qk_clip import max_logits
from muonkit.qk_clip.logits import Watch

WIDTH = 8


def dense(
    q: Tensor, k: Tensor, mask: Tensor | None, is_causal: bool, scale: float | None = None
) -> Tensor:
    """By the documented definition of torch's attention, with all logits at once."""
    k = k.repeat_interleave(q.shape[-3] // k.shape[-3], -3)
    logits = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    seen = torch.ones(logits.shape[-2:], dtype=torch.bool)
    if is_causal:
        seen = seen.tril()
    if mask is not None:
        seen = seen & (mask if mask.dtype == torch.bool else mask > -1e4)
    logits = logits.masked_fill(~seen, -math.inf)
    return logits.movedim(-3, 0).flatten(1).amax(1)


def draw(batch: tuple[int, ...], heads: tuple[int, int], lengths: tuple[int, int]) -> list[Tensor]:
    torch.manual_seed(0)
    return [
        torch.randn(*batch, h, n, WIDTH, dtype=torch.float64)
        for h, n in zip(heads, lengths, strict=True)
    ]


MASKS = {
    "none": lambda batch, rows, cols: None,
    "bool": lambda batch, rows, cols: torch.rand(*batch, 1, rows, cols) > 0.5,
    "columns": lambda batch, rows, cols: torch.rand(*batch, 1, 1, cols) > 0.3,
    "minus infinity": lambda batch, rows, cols: torch.where(
        torch.rand(rows, cols) > 0.5, 0.0, -math.inf
    ),
    "smallest number": lambda batch, rows, cols: torch.where(
        torch.rand(rows, cols) > 0.5, -3.0, torch.full((), torch.finfo(torch.float32).min)
    ),
}


@pytest.mark.sampled
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("lengths", [(7, 7), (5, 9), (9, 5), (1, 6)])
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (4, 1)])
def test_blocks_equal_the_whole(
    heads: tuple[int, int], lengths: tuple[int, int], mask: str, is_causal: bool
) -> None:
    for batch in ((), (3,), (2, 2)):
        q, k = draw(batch, heads, lengths)
        hidden = MASKS[mask](batch, *lengths)
        expected = dense(q, k, hidden, is_causal)
        for block in (1, 40, 200, 2**22):
            found = max_logits(q, k, hidden, is_causal, block=block)
            torch.testing.assert_close(found, expected)


def test_the_scale_is_the_calls_own() -> None:
    q, k = draw((3,), (4, 4), (7, 7))
    torch.testing.assert_close(max_logits(q, k, scale=2.5), dense(q, k, None, False, 2.5))


def test_causal_masks_of_torch_keep_their_corner() -> None:
    q, k = draw((3,), (4, 4), (5, 9))
    lower = torch.ones(5, 9, dtype=torch.bool).tril(4)
    for block in (1, 40, 2**22):
        found = max_logits(q, k, causal_lower_right(5, 9), block=block)
        torch.testing.assert_close(found, dense(q, k, lower, False))
        found = max_logits(q, k, causal_upper_left(5, 9), block=block)
        torch.testing.assert_close(found, dense(q, k, None, True))


def test_a_bias_that_hides_nothing_is_not_counted() -> None:
    q, k = draw((3,), (4, 4), (7, 7))
    bias = 50 * torch.randn(4, 7, 7, dtype=torch.float64)
    torch.testing.assert_close(max_logits(q, k, bias), dense(q, k, None, False))


def test_float16_logits_above_its_range_are_measured() -> None:
    q = torch.full((1, 1, 2, 64), 200.0, dtype=torch.float16)
    assert max_logits(q, q, scale=1.0).item() == pytest.approx(64 * 200.0**2)
    with torch.autocast("cpu", torch.float16):
        assert max_logits(q, q, scale=1.0).item() == pytest.approx(64 * 200.0**2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_products_on_a_cpu_are_float32(dtype: torch.dtype) -> None:
    q, k = (t.to(dtype) for t in draw((3,), (4, 4), (7, 7)))
    found = max_logits(q, k)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, dense(q.float(), k.float(), None, False))


def test_nothing_seen_is_minus_infinity_and_nan_stays() -> None:
    q, k = draw((3,), (4, 4), (7, 7))
    hidden = torch.zeros(7, 7, dtype=torch.bool)
    assert (max_logits(q, k, hidden) == -math.inf).all()
    assert (max_logits(q[:0], k[:0]) == -math.inf).all()
    q[0, 2, 3] = math.nan
    assert max_logits(q, k).isnan().tolist() == [False, False, True, False]


def test_no_gradient_flows_and_no_matrix_of_all_logits_is_made() -> None:
    q = torch.randn(1, 2, 2048, WIDTH, requires_grad=True)
    sizes = []

    class Sizes(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            found = func(*args, **(kwargs or {}))
            sizes.append(found.numel() if isinstance(found, Tensor) else 0)
            return found

    with Sizes():
        found = max_logits(q, q, is_causal=True, block=2**16)
    assert not found.requires_grad
    assert max(sizes) <= 2**16 < 2 * 2048**2


def test_refusals() -> None:
    q, k = draw((3,), (4, 3), (7, 7))
    with pytest.raises(ValueError, match="4 query heads are no multiple of 3 key heads"):
        max_logits(q, k)
    nested = torch.nested.nested_tensor([q[0], q[1]], layout=torch.jagged)
    with pytest.raises(ValueError, match="nested tensors"):
        max_logits(nested, nested)
    q = q[:, None]
    both: list[tuple[Any, Any]] = [(0, 0), (None, 0), (0, None)]
    for dims in both:
        given = [q if dim == 0 else q[0] for dim in dims]
        with pytest.raises(ValueError, match=r"below torch\.vmap: call it on whole batches"):
            torch.vmap(max_logits, in_dims=dims)(*given)
    per_example = torch.vmap(torch.func.grad(lambda one: max_logits(one, one).sum() + one.sum()))
    with pytest.raises(ValueError, match=r"below torch\.vmap"):
        per_example(q)


def test_queries_of_three_dims_are_examples_where_there_is_one_head() -> None:
    q, k = draw((3,), (1, 1), (7, 7))
    for heads, expected in ((1, max_logits(q, k)), (3, max_logits(q[:, 0], k[:, 0]))):
        found: list[Tensor] = []
        with Watch(found.append, heads):
            F.scaled_dot_product_attention(query=q[:, 0], key=k[:, 0], value=k[:, 0])
            F.scaled_dot_product_attention(q, k, k)
        assert torch.equal(found[0], expected)
        assert found[1].shape == (1,)
    # Without examples too, as a module that takes one sequence calls it.
    with Watch(found.append, 1):
        F.scaled_dot_product_attention(q[0, 0], k[0, 0], k[0, 0])
    assert torch.equal(found[-1], max_logits(q[0], k[0]))
    attention = torch.nn.MultiheadAttention(WIDTH, 1, dtype=q.dtype)
    with Watch(found.append, 1):
        attention(q[:, 0], k[:, 0], k[:, 0])
    assert found[-1].shape == (1,)


def test_a_watch_sees_every_call_and_changes_nothing() -> None:
    q, k = draw((3,), (4, 2), (7, 7))
    found: list[Tensor] = []
    options = {"is_causal": True, "enable_gqa": True, "scale": 0.5}
    alone = F.scaled_dot_product_attention(q, k, k, **options)
    with Watch(found.append) as watch:
        watched = F.scaled_dot_product_attention(q, k, k, **options)
        torch.nn.functional.scaled_dot_product_attention(k, k, k, None, 0.0, False)
    assert torch.equal(watched, alone)
    assert watch.calls == 2
    torch.testing.assert_close(found[0], dense(q, k, None, True, 0.5))
    torch.testing.assert_close(found[1], dense(k, k, None, False))


@pytest.mark.sampled
@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
def test_torchs_own_attention_is_measured(
    apart: bool, batch_first: bool, need_weights: bool
) -> None:
    torch.manual_seed(0)
    widths = {"kdim": 12, "vdim": 10} if apart else {}
    module = nn.MultiheadAttention(16, 4, batch_first=batch_first, **widths).double()
    with torch.no_grad():
        module.in_proj_bias.normal_()
    query = torch.randn(3, 7, 16, dtype=torch.float64)
    key = torch.randn(3, 9, 12 if apart else 16, dtype=torch.float64)
    value = torch.randn(3, 9, 10 if apart else 16, dtype=torch.float64)
    padding = torch.arange(9) >= torch.tensor([9, 6, 4])[:, None]
    hidden = torch.rand(7, 9) > 0.7
    args = [query, key, value] if batch_first else [t.transpose(0, 1) for t in (query, key, value)]
    found: list[Tensor] = []
    with Watch(found.append):
        module(*args, key_padding_mask=padding, attn_mask=hidden, need_weights=need_weights)
    weights = (
        (module.q_proj_weight, module.k_proj_weight) if apart else module.in_proj_weight.chunk(3)
    )
    biases = module.in_proj_bias.chunk(3)
    q, k = (
        F.linear(x, w, b).unflatten(-1, (4, 4)).transpose(1, 2)
        for x, w, b in zip((query, key), weights, biases, strict=False)
    )
    seen = ~(hidden | padding[:, None, None])
    (most,) = found
    torch.testing.assert_close(most, dense(q, k, seen, False))
