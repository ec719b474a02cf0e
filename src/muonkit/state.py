"""The optimizer's state: made at construction, in logical shapes, and fetched for a step."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from muonkit._torch import whole_tensor
from muonkit.distributed.layout import is_a_part, is_dtensor, like_dtensor, local
from muonkit.distributed.param_layout import scale_placement, stage_placement
from muonkit.gradients import lies_elsewhere
from muonkit.groups import (
    MOMENTUM,
    SCALE,
    STEP,
    VARIANCE,
    keeps_int8,
    momentum_dtype,
    name_of,
    state_shapes,
)
from muonkit.int8 import Scales, block_extents, dequantized, quantize_
from muonkit.stages import kept_state

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from muonkit.distributed.layout import Layouts
    from muonkit.distributed.placement import Placement
    from muonkit.gradients import Work

__all__ = [
    "adopt_state",
    "as_numbers",
    "carried_state",
    "check_parts",
    "check_scales",
    "ensure_state",
]


class _Kept(NamedTuple):
    """One tensor that is kept for a parameter: its dtype, logical shape and placement (None where
    the parameter is this rank's own).
    """

    key: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    placement: Placement | None


def _dtypes(p: Tensor, group: Mapping[str, Any]) -> list[tuple[str, torch.dtype]]:
    """The tensors that are kept for a parameter."""
    if group["algorithm"] == "adamw":
        return [("exp_avg", p.dtype), ("exp_avg_sq", p.dtype)]
    dtypes = [(MOMENTUM, momentum_dtype(group, p))]
    if dtypes[0][1] == torch.int8:
        dtypes.append((SCALE, torch.promote_types(p.dtype, torch.float32)))
    if kept_state(group) != "none":
        dtypes.append((VARIANCE, torch.promote_types(p.dtype, torch.float32)))
    return dtypes


def _dtypes_of(
    state: dict[str, Any], p: Tensor, group: Mapping[str, Any]
) -> list[tuple[str, torch.dtype]]:
    """`_dtypes` for a state from elsewhere, whose momentum may be in int8 where the group's is not,
    in other blocks, or not in int8 where the group's is, and which may have what a stage kept that
    the group has no more.

    In `state` a momentum that is in int8 otherwise than here becomes numbers. Numbers stay what
    they are: `ensure_state` quantizes them, in the layout that they are in by then. What no stage
    keeps here goes, with its count of steps: nothing says how it would lie.
    """
    dtypes = dict(_dtypes(p, group))
    if group["algorithm"] == "muon" and VARIANCE not in dtypes:
        state.pop(VARIANCE, None)
        state.pop(STEP, None)
    if group["algorithm"] == "adamw" or MOMENTUM not in state:
        return list(dtypes.items())
    if state[MOMENTUM].dtype == torch.int8:
        if SCALE in dtypes and tuple(state[SCALE].shape) == state_shapes(p, group)[SCALE]:
            return list(dtypes.items())
        state[MOMENTUM] = as_numbers(state)
    state.pop(SCALE, None)
    if dtypes.pop(SCALE, None) is not None:
        dtypes[MOMENTUM] = state[MOMENTUM].dtype
    return list(dtypes.items())


def _kept(key: str, dtype: torch.dtype, p: Tensor, group: Any, layouts: Layouts) -> _Kept:
    shape, layout = state_shapes(p, group)[key], layouts.get(p)
    if layout is None:
        return _Kept(key, dtype, shape, None)
    if key != SCALE:
        return _Kept(key, dtype, shape, stage_placement(layout, tuple(p.shape), shape))
    try:
        return _Kept(key, dtype, shape, scale_placement(layout, tuple(p.shape), shape))
    except ValueError as error:
        raise ValueError(f"{name_of(p, group)} {tuple(p.shape)}: {error}") from None


def _own_shapes(
    p: Tensor, group: Mapping[str, Any], layouts: Layouts
) -> dict[str, tuple[int, ...]]:
    """The shape of this rank's part of every state tensor of a parameter."""
    shapes = {}
    for key, dtype in _dtypes(p, group):
        _, _, shape, placement = _kept(key, dtype, p, group, layouts)
        shapes[key] = (
            shape if placement is None else tuple(placement.local_shape(shape, layouts[p].at))
        )
    return shapes


def check_scales(groups: Sequence[Mapping[str, Any]], layouts: Layouts) -> None:
    """Refuse a layout that cuts the blocks of a momentum in int8, before any state is made.

    Raises:
        ValueError: there is one; on all ranks, since each looks at all parts.
    """
    for group in groups:
        if group["algorithm"] == "muon" and keeps_int8(group):
            for p in group["params"]:
                _kept(SCALE, torch.float32, p, group, layouts)


def check_parts(work: Work, state: Mapping[Any, Mapping[str, Any]], layouts: Layouts) -> None:
    """Compare what this rank has of every parameter, its gradient and its state, where it may have
    a part of them: before kernels walk these, and before anything is sent. (Of a gradient that is
    yet to be redistributed, torch makes the part.)

    Raises:
        ValueError: they do not lie alike.
    """
    if not layouts:
        return
    for group, params in work:
        for p in params:
            if layouts.get(p) is None:
                continue
            muon = group["algorithm"] == "muon"
            which = (p, kept_state(group), keeps_int8(group)) if muon else (p,)
            if which not in layouts.state_shapes:
                layouts.state_shapes[which] = _own_shapes(p, group, layouts)
            wanted = layouts.state_shapes[which]
            kept = state.get(p, {})
            has = {key: local(kept[key]).shape for key in wanted if key in kept}
            if not lies_elsewhere(p):
                grad: Any = p.grad
                has["gradient"] = local(grad).shape
                wanted = {**wanted, "gradient": tuple(local(p).shape)}
            for what, shape in has.items():
                if shape != wanted[what]:
                    raise ValueError(
                        f"this rank has {tuple(shape)} of the {what} of {name_of(p, group)}, and "
                        f"should have {tuple(wanted[what])}: it does not lie as its parameter. "
                        "Load the state with load_state_dict, or begin it anew with "
                        "optimizer.reset_state([parameter]); nothing was changed"
                    )


def ensure_state(
    state: dict[str, Any], p: Tensor, group: Mapping[str, Any], layouts: Layouts
) -> None:
    """Make what is missing, and follow a parameter that was moved or cast since the last step.

    No copies where all is in place.
    """
    adamw = group["algorithm"] == "adamw"
    device, was_meta = p.device, False
    dtypes = _dtypes(p, group)
    if SCALE in state or dtypes[0][1] == torch.int8:
        _follow_int8(state, p, group, layouts)
    for key, dtype in dtypes:
        have = state.get(key)
        if have is None or (have.is_meta and not p.is_meta):
            was_meta = was_meta or have is not None
            state[key] = _zeros(_kept(key, dtype, p, group, layouts), p, layouts, preserve=adamw)
        elif have.is_complex() != dtype.is_complex:
            continue  # a step refuses it; half of the state would be lost
        elif have.dtype != dtype or have.device != device or _is_frozen(have):
            state[key] = have.to(device, dtype, copy=True)
    if adamw or kept_state(group) != "none":
        count: Any = state.get(STEP)
        count = 0.0 if count is None or was_meta else count
        if adamw and p.is_meta:  # torch's AdamW reads its count in Python, as it does its own
            device = torch.device("cpu")
        kept = isinstance(count, Tensor) and not count.is_meta
        if not kept or count.device != device or count.dtype != torch.float32:
            count = 0.0 if isinstance(count, Tensor) and count.is_meta else count
            # A checkpoint may be of an optimizer that counts its steps in a number or in int64.
            state[STEP] = torch.as_tensor(count, dtype=torch.float32, device=device)
        elif _is_frozen(count):
            state[STEP] = count.clone()


def _follow_int8(
    state: dict[str, Any], p: Tensor, group: Mapping[str, Any], layouts: Layouts
) -> None:
    """Quantize a momentum that is kept in int8 from now on, or make it numbers again."""
    have, quantized = state.get(MOMENTUM), keeps_int8(group)
    if have is None or (have.dtype == torch.int8) == quantized:
        if have is None or not quantized:  # somebody took the momentum out, or put in another
            state.pop(SCALE, None)
        return
    if quantized:
        kept = _zeros(_kept(MOMENTUM, torch.int8, p, group, layouts), p, layouts)
        most = torch.promote_types(p.dtype, torch.float32)
        scale = _zeros(_kept(SCALE, most, p, group, layouts), p, layouts)
        wide = torch.promote_types(have.dtype, torch.float32)
        numbers = torch.stack([local(have).to(p.device, wide)])  # a copy, which is row-major
        scales = Scales.of([local(scale)], block_extents(p.shape, scale.shape))
        quantize_([local(kept)], scales, numbers)
        state[MOMENTUM], state[SCALE] = kept, scale
    else:
        state[MOMENTUM] = as_numbers(state)
        del state[SCALE]


def as_numbers(state: Mapping[str, Any]) -> Tensor:
    """The momentum that a state has in int8, in the dtype of its scales and its own layout."""
    momentum, scale = state[MOMENTUM], state[SCALE]
    scales = Scales.of([local(scale)], block_extents(momentum.shape, scale.shape))
    numbers = dequantized([local(momentum)], scales, scale.dtype)[0]
    return like_dtensor(numbers, momentum) if is_dtensor(momentum) else numbers


def _is_frozen(tensor: Tensor) -> bool:
    """Whether it was made under `torch.inference_mode()`, and this is outside of it: then it may
    not be written to. Inside of a graph there is no such state: the step before made it anew.
    """
    if torch.compiler.is_compiling():
        return False
    return tensor.is_inference() and not torch.is_inference_mode_enabled()


def carried_state(
    before: Mapping[str, Any], p: Tensor, group: Mapping[str, Any], layouts: Layouts
) -> dict[str, Any]:
    """The state of a parameter that replaces another, or whose layout has changed.

    The values stay, in the parameter's present layout. Tensors that have this layout already are
    not copied.
    """
    state = dict(before)
    dtypes = _dtypes_of(state, p, group)
    for key, dtype in dtypes:
        have = state.get(key)
        if have is None:
            continue
        if have.is_meta and not p.is_meta:
            del state[key]
            state.pop(STEP, None)  # which counted a dry run
            continue
        kept = _kept(key, dtype, p, group, layouts)
        if is_dtensor(have) or kept.placement is not None:
            state[key] = _moved(
                have.to(p.device, dtype), _zeros(kept, p, layouts), kept, layouts, p
            )
    return state


def adopt_state(
    state: dict[str, Any],
    saved: Mapping[str, Any],
    p: Tensor,
    group: Mapping[str, Any],
    layouts: Layouts,
) -> None:
    """Repair a state after torch has loaded it: every tensor in its dtype, and in this layout.

    torch casts loaded tensors to the parameter's dtype, and keeps the layout of the saved ones.

    Args:
        saved: the state as it was before torch loaded it.
    """
    wanted = dict(saved)
    dtypes = _dtypes_of(wanted, p, group)
    for key in (SCALE, VARIANCE, STEP):
        if key not in wanted:
            state.pop(key, None)
    for key, dtype in dtypes:
        if key not in wanted:
            continue
        kept = _kept(key, dtype, p, group, layouts)
        loaded = state[kept.key]
        # A hook may have changed it: then it is as the hook wants it.
        given, exact = saved[kept.key], wanted[kept.key]
        sharded = is_dtensor(given) or is_dtensor(loaded)
        other = kept.dtype != loaded.dtype or exact is not given
        if other and (sharded or _same(given.to(loaded), loaded)):
            loaded = exact.to(p.device, kept.dtype, copy=True)
        if is_dtensor(loaded) or kept.placement is not None:
            loaded = _moved(loaded, _zeros(kept, p, layouts), kept, layouts, p)
        state[kept.key] = loaded


def _same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors have the same values; NaN is NaN."""
    return torch.allclose(one, other, rtol=0.0, atol=0.0, equal_nan=True)


def _zeros(kept: _Kept, p: Tensor, layouts: Layouts, preserve: bool = False) -> Tensor:
    if kept.placement is None and kept.shape == tuple(p.shape):
        # AdamW's fused kernel wants its moments in the parameter's own strides; else row-major
        # whatever these are: the state is in logical shape.
        form = torch.preserve_format if preserve else torch.contiguous_format
        return torch.zeros_like(p, dtype=kept.dtype, memory_format=form)
    if kept.placement is None:
        return torch.zeros(kept.shape, dtype=kept.dtype, device=p.device)
    return layouts.new_state(p, kept.dtype, kept.shape, kept.placement)


def _moved(tensor: Tensor, like: Tensor, kept: _Kept, layouts: Layouts, p: Tensor) -> Tensor:
    """A tensor of these values that lies as `like` does."""
    if is_dtensor(tensor) and not is_a_part(tensor):
        tensor = local(tensor)
    if is_dtensor(tensor) and is_dtensor(like) and _spread(tensor) == _spread(like):
        if tensor.device_mesh is like.device_mesh:  # type: ignore[attr-defined]
            return tensor
        # An unpickled mesh has not our process groups.
        local(like).copy_(local(tensor))
        return like
    if is_dtensor(tensor):
        tensor = whole_tensor(tensor)
    if not is_dtensor(like):
        return tensor
    # A DTensor has a layout, and the rank's part is one slice after the other of a whole tensor.
    assert kept.placement is not None
    at, whole = layouts[p].at, tuple(tensor.shape)
    for box in kept.placement.parts(whole, at, tuple((0, n) for n in whole)):
        inside = kept.placement.slices(whole, at, box)
        local(like)[inside].copy_(tensor[tuple(slice(a, b) for a, b in box)])
    return like


def _spread(tensor: Any) -> tuple[Any, Any]:
    return tensor.device_mesh, tensor.placements
