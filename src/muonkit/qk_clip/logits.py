"""The largest attention logit of every head, measured block by block where attention is called."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from muonkit._torch import is_part_of_vmap
from muonkit.distributed.layout import is_dtensor, local
from muonkit.newton_schulz.dtypes import without_autocast

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

__all__ = ["Watch", "max_logits"]

# Logits of one block: 16 MiB of float32 on a CPU; elsewhere 64 MiB of bfloat16, for a small block
# would wait for the launch of the next.
BLOCK_ON_CPU, BLOCK = 2**22, 2**25
# Rows of one block, at least, before the batch is cut: thin products are slow.
ROWS = 64
# An additive mask of this or less hides a position: exp(-1e4) is 0 in every dtype. Masks in use
# have -inf, the dtype's smallest number, -1e9 or (BERT's) -1e4; biases such as ALiBi's are above.
HIDDEN = -1e4


@torch.no_grad()
def max_logits(
    query: Tensor,
    key: Tensor,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    block: int | None = None,
) -> Tensor:
    """The largest logit scale · q·k of each head over the batch and all positions that are seen.

    The arguments are those of `torch.nn.functional.scaled_dot_product_attention`. Query heads
    that share a key head (GQA) have a maximum each. A position counts where the mask shows it; what
    an additive mask adds besides (ALiBi, relative positions) does not, for it is no product of q
    and k. A rank that has some of the heads or of the batch in a DTensor measures these.

    Args:
        query: (..., heads, L, width).
        key: (..., key heads, S, width); `heads` is a multiple of `key heads`.
        attn_mask: True, or more than -1e4, where a position is seen; broadcasts to
            (..., heads, L, S).
        is_causal: row i sees the columns up to i.
        scale: 1/√width where it is None.
        block: how many logits are held at a time, at least one row of each head; None: as many
            as suit the device, 16 MiB on a CPU, 64 to 128 elsewhere.

    Returns:
        (heads,), in float64 for float64 and in float32 else; -inf where nothing is seen, NaN where
        a logit is. On CPUs, and of float16, products are float32; on other devices in the dtype of
        the query, and the maximum is rounded as that is.

    Raises:
        ValueError: heads that are no multiple of key heads; nested tensors; those of torch.vmap;
            DTensors cut along the sequence (context parallelism).
    """
    query, key, attn_mask, offset = _plain(query, key, attn_mask, is_causal)
    with without_autocast(query.device):  # float16 has no logit above 65,504
        return _max_logits(query, key, attn_mask, offset, scale, block)


def _max_logits(
    query: Tensor,
    key: Tensor,
    attn_mask: Tensor | None,
    offset: int | None,
    scale: float | None,
    block: int | None,
) -> Tensor:
    """`max_logits` of plain tensors; `offset` is how many more columns than its number a row sees,
    None for all.
    """
    width, cols = query.shape[-1], key.shape[-2]
    heads, kv_heads = query.shape[-3], key.shape[-3]
    if kv_heads == 0 or heads % kv_heads:
        raise ValueError(f"{heads} query heads are no multiple of {kv_heads} key heads")
    exact = torch.float64 if query.dtype == torch.float64 else torch.float32
    wide = torch.promote_types(query.dtype, key.dtype)  # autocast takes two dtypes too
    wide = exact if query.device.type == "cpu" or wide == torch.float16 else wide
    query, key = query.to(wide), key.to(wide)
    broadcast: Any = torch.broadcast_shapes  # untyped
    batch = broadcast(query.shape[:-3], key.shape[:-3])
    q = query.expand(*batch, *query.shape[-3:]).reshape(-1, *query.shape[-3:])
    k = key.expand(*batch, *key.shape[-3:]).reshape(-1, *key.shape[-3:]).contiguous()
    mask = None if attn_mask is None else _seen(attn_mask, batch)
    rows = q.shape[-2]
    most = query.new_full((heads,), -math.inf, dtype=exact)
    if 0 in (*batch, rows, cols):
        return most
    if block is None:
        block = BLOCK_ON_CPU if query.device.type == "cpu" else BLOCK
    examples = max(1, block // (heads * cols * min(rows, ROWS)))
    for b in range(0, q.shape[0], examples):
        some = min(examples, q.shape[0] - b)
        height = max(1, block // (some * heads * cols))
        for i in range(0, rows, height):
            j = min(i + height, rows)
            seen = cols if offset is None else min(cols, j + offset)
            if seen <= 0:
                continue
            # The heads of a group, one below the other, against the keys that they share.
            rows_of_groups = q[b : b + some, :, i:j].reshape(some, kv_heads, -1, width)
            logits = rows_of_groups @ k[b : b + some, :, :seen].mT
            logits = logits.view(some, heads, j - i, seen)
            if mask is not None:
                part = mask if mask.shape[0] == 1 else mask[b : b + some]
                part = part if part.shape[-2] == 1 else part[..., i:j, :]
                part = part if part.shape[-1] == 1 else part[..., :seen]
                logits += torch.zeros_like(part, dtype=q.dtype).masked_fill_(~part, -math.inf)
            if offset is not None and i + offset + 1 < seen:
                # Only the columns that the block's first row does not see are hidden from any.
                start = max(0, i + offset + 1)
                hidden = q.new_full((j - i, seen - start), -math.inf)
                logits[..., start:] += hidden.triu_(i + offset + 1 - start)
            most = torch.maximum(most, logits.flatten(2).amax(-1).amax(0).to(exact))
    return most * (width**-0.5 if scale is None else scale)


def _plain(
    query: Any, key: Any, attn_mask: Any, is_causal: bool
) -> tuple[Tensor, Tensor, Tensor | None, int | None]:
    """Plain tensors, and how many more columns than its number a row sees; None: all."""
    if query.is_nested or key.is_nested:
        raise ValueError(
            "QK-clip does not measure nested tensors: pass padded ones with a mask, or measure the "
            "logits yourself, QKClip(..., measure=False) and clip(max_logits)"
        )
    if is_part_of_vmap(query) or is_part_of_vmap(key):
        raise ValueError(
            "QK-clip does not measure attention below torch.vmap: call it on whole batches, or "
            "measure the logits yourself, QKClip(..., measure=False) and clip(max_logits)"
        )
    for tensor in (query, key):
        if is_dtensor(tensor) and any(
            placement.is_shard() and placement.dim % tensor.ndim >= tensor.ndim - 2
            for placement in tensor.placements
        ):
            raise ValueError(
                f"QK-clip does not measure a DTensor with placements {tensor.placements}: no rank "
                "has all keys of a query. Measure the logits yourself, QKClip(..., measure=False) "
                "and clip(max_logits)"
            )
    offset = 0 if is_causal else None
    if attn_mask is not None and type(attn_mask) is not torch.Tensor and not is_dtensor(attn_mask):
        from torch.nn.attention.bias import CausalBias, CausalVariant

        if isinstance(attn_mask, CausalBias):
            aligned = attn_mask.variant == CausalVariant.UPPER_LEFT
            offset = 0 if aligned else attn_mask.seq_len_kv - attn_mask.seq_len_q
            attn_mask = None
    mask = None if attn_mask is None else local(attn_mask).detach()
    return local(query).detach(), local(key).detach(), mask, offset


def _seen(mask: Tensor, batch: torch.Size) -> Tensor:
    """The mask as True where a position is seen, in four dims as the blocks have."""
    seen = mask if mask.dtype == torch.bool else mask > HIDDEN
    seen = seen[(None,) * max(0, 4 - seen.ndim)]
    if len(batch) < 2:
        return seen
    return seen.expand(*batch, *seen.shape[-3:]).reshape(-1, *seen.shape[-3:])


class Watch(TorchFunctionMode):
    """While it is entered, gives `found` the largest logits of every call of torch's attention,
    `scaled_dot_product_attention` or what nn.MultiheadAttention is made of.

    Attributes:
        calls: how many there were.
        active: False for one that an interrupted forward pass left entered: it only passes on.
    """

    def __init__(self, found: Callable[[Tensor], None], heads: int | None = None) -> None:
        """`heads` are those of the module; of a module with one, queries of three dims are
        (batch, L, width), and of two (L, width).
        """
        super().__init__()
        self._found, self._single = found, heads == 1
        self.calls = 0
        self.active = True

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        measure = _MEASURES.get(func) if self.active else None
        if measure is not None:
            self.calls += 1
            single = self._single and measure is _of_call
            most = _of_one_head(*args, **kwargs) if single else measure(*args, **kwargs)
            self._found(most)
        return func(*args, **kwargs)


def _of_call(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """`max_logits` with the arguments of torch's attention."""
    return max_logits(query, key, attn_mask, is_causal, scale=scale)


def _of_one_head(query: Tensor, key: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """`_of_call` of a module with one head, whose queries may have no dim for heads."""
    pair = query, key
    if query.ndim == 2:
        pair = query[None], key[None]
    most = _of_call(*pair, *args, **kwargs)
    return most.amax(0, keepdim=True) if query.ndim == 3 else most


@torch.no_grad()
def _of_multihead(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    embed_dim: int,
    heads: int,
    in_proj_weight: Tensor | None,
    in_proj_bias: Tensor | None,
    bias_k: Tensor | None,
    *_: Any,
    key_padding_mask: Tensor | None = None,
    attn_mask: Tensor | None = None,
    use_separate_proj_weight: bool = False,
    q_proj_weight: Tensor | None = None,
    k_proj_weight: Tensor | None = None,
    **__: Any,
) -> Tensor:
    """The largest logits of `F.multi_head_attention_forward`: what it calls is not seen from
    outside, so q and k are projected here once more. Its masks are True where nothing is seen.
    """
    if bias_k is not None:
        raise ValueError(
            "QK-clip does not know bias_k of nn.MultiheadAttention(add_bias_kv=True): measure the "
            "logits yourself, QKClip(..., measure=False) and clip(max_logits)"
        )
    if not use_separate_proj_weight:
        assert in_proj_weight is not None
        q_proj_weight, k_proj_weight, _v = in_proj_weight.chunk(3)
    assert q_proj_weight is not None
    assert k_proj_weight is not None
    biases = (None,) * 3 if in_proj_bias is None else in_proj_bias.chunk(3)
    projected = []
    for x, weight, bias in zip((query, key), (q_proj_weight, k_proj_weight), biases, strict=False):
        x = x[:, None] if x.ndim == 2 else x  # (length, batch, width)
        of_heads = F.linear(x, weight, bias).view(*x.shape[:2], heads, -1)
        projected.append(of_heads.permute(1, 2, 0, 3))
    q, k = projected
    seen = q.new_ones((), dtype=torch.bool)
    if attn_mask is not None:
        hides = attn_mask if attn_mask.dtype == torch.bool else attn_mask <= HIDDEN
        hides = hides.view(-1, heads, *hides.shape[1:]) if hides.ndim == 3 else hides
        seen = seen & ~hides
    if key_padding_mask is not None:
        pad = key_padding_mask
        hides = pad if pad.dtype == torch.bool else pad <= HIDDEN
        seen = seen & ~hides.reshape(-1, 1, 1, hides.shape[-1])
    return max_logits(q, k, seen if seen.ndim else None)


_MEASURES: dict[Any, Callable[..., Tensor]] = {
    F.scaled_dot_product_attention: _of_call,
    F.multi_head_attention_forward: _of_multihead,
}
