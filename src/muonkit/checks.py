"""Checks of a step, before anything is written: options that were edited to invalid values, and
tensors that do not fit each other.
"""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from muonkit.groups import (
    MOMENTUM,
    STEP,
    check_names,
    keeps_int8,
    name_of,
    state_shapes,
)
from muonkit.options import OPTION_KEYS
from muonkit.stages import kept_state
from muonkit.validate import (
    OF_PARAMETERS,
    refuse_zero_weights,
    validate_options,
    validate_parameters,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

__all__ = ["SeenOptions", "check_gradients"]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# torch's AdamW trains the real and imaginary parts of a complex parameter.
_ADAMW_DTYPES = (*_DTYPES, torch.complex64, torch.complex128)


def _dtypes(group: Mapping[str, Any]) -> tuple[torch.dtype, ...]:
    return _DTYPES if group["algorithm"] == "muon" else _ADAMW_DTYPES


class SeenOptions:
    """The options of every group as they were last seen to make sense."""

    def __init__(self) -> None:
        self._seen: list[_Seen] = []

    def check(self, groups: Sequence[dict[str, Any]]) -> None:
        """Look at the groups whose options have changed; a tensor counts as the object it is.

        Raises:
            ValueError, TypeError, RuntimeError: as the constructor.
        """
        if torch.compiler.is_compiling():
            # A graph is made for options as they are, and looks at them before each step: what is
            # compared here is compared then.
            for group in groups:
                validate_options({**group, **_unread(group)})
            return
        if len(groups) == len(self._seen) and all(map(_Seen.is_of, self._seen, groups)):
            return
        now = [_Seen.of(group) for group in groups]
        for number, (group, (options, _, _)) in enumerate(zip(groups, now, strict=True)):
            before = self._seen[number].options if number < len(self._seen) else None
            if before is None or not _same(before, options):
                try:
                    _validate_again(group, before, options)
                except (ValueError, TypeError, RuntimeError) as error:
                    told = f"{group.get('name', f'group {number}')}: {error}; nothing was changed"
                    raise type(error)(told) from error
        self._seen = now


def _validate_again(
    group: dict[str, Any], before: Mapping[str, Any] | None, now: Mapping[str, Any]
) -> None:
    """Refuse a group whose options make no sense, or not for its parameters. (A scheduler sets an
    lr before each step: the parameters are looked at only where they may have become unfit.)
    """
    validate_options({**group, **_unread(now)})
    if before is None:
        validate_parameters(group)
        return
    changed = {key for key in OF_PARAMETERS if not _same_value(before.get(key), now.get(key))}
    if changed:
        validate_parameters(group)
    if "constraint" in changed:
        refuse_zero_weights(group, together=False)


class _Seen(NamedTuple):
    """A group as it was last seen.

    Attributes:
        options: its options, lists as tuples.
        keys, values: all that it holds, as it holds it; no values where an option is a list, which
            may be edited in place.
    """

    options: dict[str, Any]
    keys: list[str]
    values: list[Any] | None

    @classmethod
    def of(cls, group: Mapping[str, Any]) -> _Seen:
        options = {key: group[key] for key in OPTION_KEYS if key in group}
        fixed = all(map(_is_fixed, options.values()))
        held = {key: _held(value) for key, value in options.items()}
        return cls(held, list(group), list(group.values()) if fixed else None)

    def is_of(self, group: Mapping[str, Any]) -> bool:
        """Whether the group holds the same objects. Numbers, words and tuples do not change."""
        return (
            self.values is not None
            and list(group) == self.keys
            and all(map(operator.is_, group.values(), self.values))
        )


def _is_fixed(value: Any) -> bool:
    if isinstance(value, tuple):
        return all(map(_is_fixed, value))
    return not isinstance(value, list)


def _held(value: Any) -> Any:
    """An option as it stays when somebody edits the list that it is, or one in it."""
    return tuple(map(_held, value)) if isinstance(value, (list, tuple)) else value


def _unread(options: Mapping[str, Any]) -> dict[str, Any]:
    """A number in place of every tensor that cannot be read: a graph would break there, and on
    another device than the CPU it would wait for all that is queued there.
    """
    compiling = torch.compiler.is_compiling()
    return {
        key: 0.0
        for key, value in options.items()
        if isinstance(value, torch.Tensor)
        and (compiling or value.device.type != "cpu")
        and value.numel() == 1  # others are refused unread
    }


def _same(before: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    if before.keys() != now.keys():
        return False
    return all(_same_value(before[key], value) for key, value in now.items())


def _same_value(before: Any, now: Any) -> bool:
    if before is now:
        return True
    return not isinstance(now, torch.Tensor) and type(before) is type(now) and before == now


def check_gradients(
    groups: Sequence[Mapping[str, Any]], state: Mapping[Any, Mapping[str, Any]]
) -> None:
    """Compare every gradient and every tensor of the state with its parameter.

    Raises:
        ValueError: other shapes or devices, a dtype that is not trained, or names that are not as
            many as the parameters.
        RuntimeError: a parameter that was made under `torch.inference_mode()`, outside of it.
    """
    anywhere = torch.compiler.is_compiling() or torch.is_inference_mode_enabled()
    for group in groups:
        check_names(group)
        dtypes = _dtypes(group)
        muon = group["algorithm"] == "muon"
        plain = muon and kept_state(group) == "none" and not keeps_int8(group)
        for p in group["params"]:
            grad = p.grad
            if grad is None:
                continue
            shape = p.shape
            if not (
                grad.shape == shape
                and grad.device == p.device
                and grad.dtype in dtypes
                and p.dtype in dtypes
                and (anywhere or not p.is_inference())
                and _fits(state.get(p, {}), p, shape, None if plain else group)
            ):
                _refuse(name_of(p, group), p, group, state)


def _fits(
    state: Mapping[str, Any], p: Tensor, shape: torch.Size, group: Mapping[str, Any] | None
) -> bool:
    """Whether what there is of the state has its shape; what is missing is made.

    Args:
        group: None where a plain momentum is all that its parameters have.
    """
    if group is None:
        return MOMENTUM not in state or _shape(state[MOMENTUM]) == shape
    for key, wanted in state_shapes(p, group).items():
        # (torch 2.11 cannot compile that two shapes are *not* equal.)
        if key in state and not (
            _shape(state[key]) == wanted and state[key].is_complex() == p.is_complex()
        ):
            return False
    count = state.get(STEP)
    return count.numel() == 1 if isinstance(count, torch.Tensor) else _is_number(count)


def _is_number(count: Any) -> bool:
    return count is None or isinstance(count, (int, float))


def _shape(value: Any) -> tuple[int, ...] | None:
    return value.shape if isinstance(value, torch.Tensor) else None


def _refuse(
    name: str, p: Tensor, group: Mapping[str, Any], state: Mapping[Any, Mapping[str, Any]]
) -> None:
    grad = p.grad
    assert grad is not None
    for what, tensor in ((name, p), (f"the gradient of {name}", grad)):
        if tensor.dtype not in _dtypes(group):
            raise ValueError(
                f"{what} is {tensor.dtype}: only floating-point parameters of at least 16 bits are "
                "trained; set its grad to None, or take it out of its group; nothing was changed"
            )
    if p.is_inference() and not torch.is_inference_mode_enabled():
        raise RuntimeError(
            f"{name} {tuple(p.shape)} was made under torch.inference_mode(), outside of which it "
            "cannot be written to: make the model outside, or step under it too; nothing was "
            "changed"
        )
    if grad.shape != p.shape or grad.device != p.device:
        raise ValueError(
            f"{name} is {tuple(p.shape)} on {p.device}, its gradient {tuple(grad.shape)} on "
            f"{grad.device}: the parameter was changed after its backward pass; set its grad to "
            "None and take the backward pass again; nothing was changed"
        )
    kept, shapes = state.get(p, {}), state_shapes(p, group)
    for key in shapes:
        moment = kept.get(key)
        if isinstance(moment, torch.Tensor) and moment.is_complex() != p.is_complex():
            raise ValueError(
                f"{name} is {p.dtype}, its {key} {moment.dtype}: "
                "optimizer.reset_state([parameter]) begins it anew; nothing was changed"
            )
    for key, shape in {**shapes, STEP: ()}.items():
        if key in kept and (have := _shape(kept[key])) != shape:
            got = f"one of {tuple(have)}" if have is not None else f"{kept[key]!r:.40}"
            raise ValueError(
                f"{name} {tuple(p.shape)} wants a {key} of shape {shape}, its state has {got}: "
                "optimizer.reset_state([parameter]) begins it anew; nothing was changed"
            )
