"""QK-clip (MuonClip): rows of q and k of a head are scaled down when its logits exceed tau.

After a step, with S the largest logit of a head (of the heads that share a key head, GQA) over all
micro-batches and ranks since the last step, η = min(1, tau / S)::

    W_q <- η^alpha W_q        W_k <- η^(1 - alpha) W_k        biases alike

so that every logit of the head is η times what it was. With multi-head latent attention (MLA) a
logit is q_nope · k_nope + q_rope · k_rope, and k_rope is the same for all heads: q_nope and k_nope
are scaled as above, q_rope by η, k_rope not at all. Sources: Kimi K2 (arXiv 2507.20534), section
2.1 and algorithm 1; Megatron-Core's `clip_qk`, which does the same and has alpha.
"""

from __future__ import annotations

import gc
import math
import warnings
import weakref
from numbers import Integral
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from muonkit._shards import unplaced_shard
from muonkit._text import shown, unknown
from muonkit._torch import inner_optimizer
from muonkit.distributed.layout import is_dtensor, local, own_layout
from muonkit.distributed.meshes import group_of, other_ranks
from muonkit.distributed.placement import Axis
from muonkit.groups import is_trained
from muonkit.qk_clip.logits import Watch
from muonkit.qk_clip.rows import Attention, Scaled, attentions_of

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from muonkit.routing.attention import AttentionHeads

__all__ = ["QKClip"]

_BY_HAND = (
    "QKClip(..., measure=False) takes logits that you measured yourself, in clip(max_logits) after "
    "each step"
)


class QKClip:
    """Keeps attention logits below `tau`, by scaling q and k of a head after the step (MuonClip).

    ::

        qk_clip = QKClip(model, optimizer)  # after the model was wrapped, sharded or compiled
        ...                                 # train as ever; qk_clip.latest has the logits

    Logits are measured where the model calls `torch.nn.functional.scaled_dot_product_attention`,
    block by block, without the matrix of all of them: in forward passes in training mode, and over
    all micro-batches of a step. transformers' models call it with `attn_implementation="sdpa"`,
    their default. Steps count from 1; the first and every multiple of `every` measure and clip.

    The result is the same in every layout (DDP, ZeRO-1, FSDP2, HSDP, TP and their combinations):
    maxima are taken over all ranks, and each rank scales those rows of a head that it stores. All
    ranks make it with the same arguments. It works with any optimizer of torch's; its state is left
    as it is.

    Args:
        model: whose attention modules are clipped; DDP's or torch.compile's wrapper will do.
        optimizer: trains q and k; a step of it clips.
        tau: the largest logit that a head may have before it is clipped.
        alpha: q is scaled by η^alpha, k by η^(1 - alpha), between 0 and 1.
        every: steps from one measurement to the next.
        heads: where the heads of each attention module are, for a model whose config does not say.
        measure: False where the logits come by `clip(max_logits)`; nothing is hooked then.
        process_group: the ranks that train the same parameters, where neither DDP, nor DTensors,
            nor the optimizer's own process_group say it; False: no other rank does.

    Attributes:
        step: how many steps were taken; where nothing is hooked, how often `clip` was called.
        latest: of the last measurement, None before: ``{"step": n, "max_logits": {name: one for
            each head}, "eta": {name: one for each group of heads that share a key}}``, tensors on
            the model's device, before the clipping. A NaN among the logits is shown as inf; such
            a head is left alone.

    Raises:
        TypeError: the optimizer is none of torch's.
        ValueError: tau, alpha or every out of range; no attention module is found; q or k is
            normalized by head (QK-norm bounds logits by itself), is not trained by the optimizer,
            has an adapter beside it, or belongs to several attention modules; heads that contradict
            themselves; several ranks, and nothing says which of them train the same parameters.
        RuntimeError: in a forward pass, an attention module that did not call torch's attention; in
            a step, before it: no attention module ran since the last one.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        tau: float = 100.0,
        *,
        alpha: float = 0.5,
        every: int = 1,
        heads: Sequence[AttentionHeads] | None = None,
        measure: bool = True,
        process_group: Any = None,
    ) -> None:
        optimizer = inner_optimizer(optimizer)
        _check(optimizer, tau, alpha, every)
        self.tau, self.alpha, self.every = float(tau), float(alpha), int(every)
        self.step = 0
        self.latest: dict[str, Any] | None = None
        self._optimizer, self._model = optimizer, model
        self._attentions = attentions_of(model, heads, self.alpha)
        self._params = {s: s.parameter() for a in self._attentions for s in a.scaled}
        self._here: dict[Scaled, tuple[Tensor, Tensor, Tensor]] = {}
        self._given = process_group
        self._reduce: list[Any] | None = None  # the process groups, once they are known
        self._settle()
        self._groups()
        self._most: dict[str, Tensor] = {}
        self._ever = self._warned = False
        self._compared = 0  # how many measurements were, each with the one before
        self._open: list[tuple[nn.Module, Any]] = []
        self._hooks: list[Any] = []
        self._of_module = {attention.module: attention for attention in self._attentions}
        if measure:
            self._hook()

    @property
    def measures(self) -> bool:
        """Whether the coming step measures: forward passes until then have to be eager ones."""
        coming = self.step + 1
        return bool(self._hooks) and (coming == 1 or coming % self.every == 0)

    def clip(self, max_logits: Mapping[str, Tensor | Sequence[float]]) -> None:
        """Clip by these logits: the largest of each head since the last step, on this rank.

        Args:
            max_logits: by the name of the attention module in the model; one number for each head,
                or for each head that this rank has under tensor parallelism. What is left out is
                not clipped, unless another rank gives it. All ranks call this.
        """
        by_name = {attention.name: attention for attention in self._attentions}
        most: dict[str, Tensor] = {}
        for name, values in max_logits.items():
            if name not in by_name:
                raise ValueError(unknown("attention module", name, by_name))
            found = torch.as_tensor(values).detach()
            most[name] = self._of_all_heads(by_name[name], found)
        if not self._hooks:
            self.step += 1
        self._clip(most)

    def state_dict(self) -> dict[str, Any]:
        """How many steps were taken, which decides what step measures next."""
        return {"step": self.step}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.step = int(state["step"])

    def close(self) -> None:
        """Leave model and optimizer as they were; as often as one likes."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        self._most = {}
        for module in self._of_module:
            if _watching(module) is self:
                del _WATCHED[module]

    # --- measuring ------------------------------------------------------------------------------

    def _hook(self) -> None:
        if self._taken():
            gc.collect()  # a clip that nobody can reach or close any more, as of another trial
        if taken := self._taken():
            raise ValueError(
                f"{shown(taken[0])} has a QKClip already: close() it, or make one for the whole "
                "model"
            )
        disable: Any = torch.compiler.disable  # a compiled step calls these as they are
        of_passes: list[Any] = []
        for module in self._of_module:
            _WATCHED[module] = weakref.ref(self)
            of_passes += [
                module.register_forward_pre_hook(_before_forward),
                module.register_forward_hook(_after_forward, always_call=True),
            ]
        # Else they would stay when nobody holds this and the optimizer any more.
        weakref.finalize(self, _remove, of_passes).atexit = False
        self._hooks = [
            *of_passes,
            self._optimizer.register_step_pre_hook(disable(self._before_step)),
            self._optimizer.register_step_post_hook(disable(self._after_step)),
        ]

    def _taken(self) -> list[str]:
        """Attention modules that another clip watches."""
        return [a.name for a in self._attentions if _watching(a.module) is not None]

    def _enter(self, attention: Attention) -> None:
        if not self.measures or not attention.module.training:
            return

        def found(most: Tensor) -> None:
            mine = self._of_all_heads(attention, most)
            before = self._most.get(attention.name)
            self._most[attention.name] = mine if before is None else torch.maximum(before, mine)

        watch: Any = Watch(found, attention.heads)
        watch.__enter__()
        self._open.append((attention.module, watch))

    def _leave(self, attention: Attention, ended_well: bool) -> None:
        if not self._open or self._open[-1][0] is not attention.module:
            return
        _, watch = self._open.pop()
        watch.__exit__(None, None, None)
        if ended_well and not watch.calls:
            raise RuntimeError(
                f"QK-clip measures logits in torch's scaled_dot_product_attention, but "
                f"{shown(attention.name)} ({type(attention.module).__name__}) ran without calling "
                'it: load the model with attn_implementation="sdpa", or call '
                'model.set_attn_implementation("sdpa") (flex, flash and eager attention are not '
                f"seen); {_BY_HAND}"
            )

    def _of_all_heads(self, attention: Attention, most: Tensor) -> Tensor:
        """The logits of this rank's heads among all of the module's, -inf for the others'."""
        if most.ndim != 1:
            raise ValueError(
                f"{shown(attention.name)}: expected one logit for each head, got the shape "
                f"{list(most.shape)}"
            )
        if len(most) == attention.heads:
            return most
        mine = self._own_heads(attention, len(most))
        every = most.new_full((attention.heads,), -math.inf)
        every[torch.tensor(mine, device=most.device)] = most
        return every

    def _own_heads(self, attention: Attention, count: int) -> list[int]:
        """Which heads these are: those whose rows of q tensor parallelism left to this rank.

        FSDP's mesh axes come before tensor parallelism's, and its forward pass has gathered what
        they cut.
        """
        scaled, rows = attention.query
        p: Any = self._params[scaled]
        if is_dtensor(p):
            layout = own_layout(scaled.path, p)
            placement, at = layout.param_placement, layout.at
            for first in reversed(range(len(placement.mesh))):
                kept = (Axis(None),) * first + placement.axes[first:]
                runs = placement._replace(axes=kept).runs(tuple(p.shape), at)[scaled.dim]
                mine = [
                    head
                    for head, (start, stop) in enumerate(rows)
                    if any(a <= start and stop <= b for a, b in runs)
                ]
                if len(mine) == count:
                    return mine
        raise ValueError(
            f"{shown(attention.name)} has logits of {count} heads, expected {attention.heads}, or "
            "those that tensor parallelism left to this rank; heads=[...] says where they are"
        )

    # --- clipping -------------------------------------------------------------------------------

    def _before_step(self, optimizer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        for _, watch in self._open:  # of a forward pass that was interrupted
            watch.active = False
        self._open.clear()
        if self.measures:  # what the clipping would refuse after the step, too
            self._settle()
            self._groups()
        closure = args[1] if len(args) > 1 else kwargs.get("closure")  # the optimizer comes first
        if not self.measures or closure is not None:
            return
        if self._ever:
            return
        missing = [a.name for a in self._attentions if a.name not in self._most]
        if len(missing) == len(self._attentions):
            raise RuntimeError(
                "QK-clip has seen no attention module run since the last step: forward passes in "
                "eval mode are not measured, nor is what torch.compile compiled (run the passes "
                "before a measuring step with "
                'torch.compiler.set_stance("force_eager" if qk_clip.measures else "default")), nor '
                f"another model than was given; {_BY_HAND}"
            )
        if missing:
            warnings.warn(
                f"QK-clip has not seen {len(missing)} of {len(self._attentions)} attention modules "
                f"run, {shown(missing[0])} among them: these are not clipped until they do",
                stacklevel=2,
            )
        self._ever = True

    def _after_step(self, *_: Any) -> None:
        measured = self.measures
        if measured and not self._most and not self._warned:
            self._warned = True
            warnings.warn(
                "QK-clip saw no attention module run before this step, and clips nothing in it: "
                "were the passes compiled, or in eval mode? It is not told again",
                stacklevel=2,
            )
        self.step += 1
        most, self._most = self._most, {}
        if measured:
            self._clip(most)

    @torch.no_grad()
    def _clip(self, most: Mapping[str, Tensor]) -> None:
        self._settle()
        flat = self._over_ranks(most)
        before = self.latest
        self.latest = {"step": self.step, "max_logits": {}, "eta": {}}
        of_modules = torch.split(flat, [a.heads for a in self._attentions])
        for attention, logits in zip(self._attentions, of_modules, strict=True):
            shared = logits.view(attention.kv_heads, -1).amax(1)
            over = (shared > self.tau) & shared.isfinite()
            eta = torch.where(over, self.tau / shared, 1.0)
            self.latest["max_logits"][attention.name] = logits
            self.latest["eta"][attention.name] = eta
            factors = torch.cat([eta, eta.new_ones(1)])  # the last one: of what stays as it is
            for scaled in attention.scaled:
                self._scale(scaled, factors)
        if before is not None and self._compared < _COMPARED:
            self._compared += 1
            self._see_effect(before, self.latest)

    def _see_effect(self, before: dict[str, Any], now: dict[str, Any]) -> None:
        """Warn once where logits are as large as in the measurement before, after which their q and
        k were scaled by less than a half. This waits for the device.
        """
        for attention in self._attentions:
            eta = before["eta"][attention.name]
            old, new = (
                each["max_logits"][attention.name].view(attention.kv_heads, -1).amax(1)
                for each in (before, now)
            )
            if ((eta < 0.5) & (new > self.tau) & (new > 0.9 * old)).any().item():
                self._compared = _COMPARED
                warnings.warn(
                    f"the logits of {shown(attention.name)} in step {now['step']} are as large as "
                    f"before its q and k were scaled down in step {before['step']}: either they "
                    "grew back, or something between these and the product gives them their size "
                    "(QK-norm, an adapter), and QK-clip only shrinks the weights; then train this "
                    "module without it (heads=[...] leaves modules out). It is not told again",
                    stacklevel=4,
                )
                return

    def _over_ranks(self, most: Mapping[str, Tensor]) -> Tensor:
        """The largest logits of all heads, of one module after the other, over all ranks."""
        (first, *_), exact = self._params.values(), torch.float32
        if any(p.dtype == torch.float64 for p in self._params.values()):
            exact = torch.float64
        device = local(first).device
        parts = [
            most[a.name].to(device, exact)
            if a.name in most
            else torch.full((a.heads,), -math.inf, dtype=exact, device=device)
            for a in self._attentions
        ]
        # Backends compare NaN in ways of their own.
        flat = torch.cat(parts).nan_to_num(nan=math.inf, posinf=math.inf, neginf=-math.inf)
        for group in self._groups():
            torch.distributed.all_reduce(flat, torch.distributed.ReduceOp.MAX, group=group)
        return flat

    def _scale(self, scaled: Scaled, factors: Tensor) -> None:
        p = self._params[scaled]
        own = local(p)
        if not own.numel():
            return
        kept = self._here.get(scaled)
        if kept is None or kept[0] is not p or kept[1].device != own.device:
            indices = torch.tensor(_rows_here(scaled, p), device=own.device)
            group = torch.tensor(scaled.group, device=own.device)[indices]
            power = torch.tensor(scaled.power, device=own.device, dtype=factors.dtype)[indices]
            kept = self._here[scaled] = p, group, power
        _, group, power = kept
        factor = factors.to(own.device)[group] ** power
        shape = [1] * own.ndim
        shape[scaled.dim] = -1
        own.mul_(factor.view(shape))

    # --- whose parameters, and on which ranks ---------------------------------------------------

    def _settle(self) -> None:
        """Find the parameters: frameworks replace them, and FSDP2 shows others while it gathers.

        Raises:
            ValueError: one that the optimizer does not train, or that no longer has its shape.
        """
        held = [p for group in self._optimizer.param_groups for p in group["params"]]
        trained = {id(p) for p in held if is_trained(p)}  # groups may hold frozen ones
        for scaled, before in self._params.items():
            p = scaled.parameter()
            # Biases may be another optimizer's: torch.optim.Muon takes matrices alone.
            elsewhere = scaled.is_bias and p.requires_grad
            if id(p) not in trained and not (elsewhere and is_dtensor(p) == is_dtensor(before)):
                p = before
            if id(p) not in trained and not elsewhere:
                raise ValueError(
                    f"{shown(scaled.path)} holds q or k, but the optimizer does not train it: "
                    "QK-clip scales both, so it is for models whose q and k are trained (a frozen "
                    "or LoRA layer is not); heads=[...] leaves modules out. Make QKClip after the "
                    "optimizer has its final parameters"
                )
            if (shard := unplaced_shard(p)) is not None:
                raise ValueError(f"{shown(scaled.path)} is {shard}")
            if tuple(p.shape)[scaled.dim] != len(scaled.group):
                raise ValueError(
                    f"{shown(scaled.path)} has the shape {list(p.shape)}, expected "
                    f"{len(scaled.group)} along dim {scaled.dim}, as the heads are described"
                )
            if p is not before:
                self._reduce = None
            self._params[scaled] = p

    def _groups(self) -> list[Any]:
        """Process groups over which maxima are taken, one after the other.

        A mesh has one for each axis: the maximum along all axes is that of the whole mesh.
        """
        if self._reduce is None:
            self._reduce = self._find_groups()
        return self._reduce

    def _find_groups(self) -> list[Any]:
        if self._given is False:
            return []
        found = [] if self._given is None else [group_of(self._given)]
        for p in self._params.values():
            mesh = getattr(p, "device_mesh", None)
            found += [] if mesh is None else [mesh.get_group(axis) for axis in range(mesh.ndim)]
        found.append(getattr(self._model, "process_group", None))  # DDP's
        found.append(getattr(getattr(self._optimizer, "_layouts", None), "group", None))
        if not any(group is not None for group in found) and other_ranks():
            raise ValueError(
                "QK-clip takes the largest logits over all ranks that train the same parameters, "
                "but nothing says which these are: pass the model that DDP or fully_shard "
                "returned, or process_group=torch.distributed.group.WORLD (process_group=False "
                "where no other rank trains these parameters)"
            )
        ranks_of = torch.distributed.get_process_group_ranks if other_ranks() else None
        by_ranks = {
            tuple(ranks_of(group)): group for group in found if group is not None and ranks_of
        }
        return [group for ranks, group in by_ranks.items() if len(ranks) > 1]


def _rows_here(scaled: Scaled, p: Tensor) -> list[int]:
    """Which entries of the scaled dim this rank stores, in its order."""
    if not is_dtensor(p):
        return list(range(len(scaled.group)))
    layout = own_layout(scaled.path, p)
    runs = layout.param_placement.runs(tuple(p.shape), layout.at)[scaled.dim]
    return [row for start, stop in runs for row in range(start, stop)]


def _check(optimizer: Any, tau: Any, alpha: Any, every: Any) -> None:
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(
            f"QKClip follows the steps of a torch.optim.Optimizer, got {type(optimizer).__name__}; "
            "of a wrapper give the optimizer inside"
        )
    if isinstance(tau, bool) or not isinstance(tau, (int, float)) or not 0 < tau < math.inf:
        raise ValueError(f"tau is the largest logit that is left alone, above 0, got {tau!r}")
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not 0 <= alpha <= 1:
        raise ValueError(
            f"alpha is q's share of the scaling, from 0 (k alone) to 1 (q alone), got {alpha!r}"
        )
    if isinstance(every, bool) or not isinstance(every, Integral) or every < 1:
        raise ValueError(f"every is a whole number of steps, at least 1, got {every!r}")


# How many measurements are compared with the one before: each comparison waits for the device.
_COMPARED = 5


# --- the hooks of attention modules ---------------------------------------------------------------
# Module-level functions, so that a model that is copied or pickled does not take the optimizer
# along; the copy's modules are not in the table, and are not measured.

_WATCHED: weakref.WeakKeyDictionary[nn.Module, weakref.ref[QKClip]] = weakref.WeakKeyDictionary()


def _watching(module: nn.Module) -> QKClip | None:
    found = _WATCHED.get(module)
    return None if found is None else found()


def _remove(hooks: Sequence[Any]) -> None:
    for hook in hooks:
        hook.remove()


def _before_forward(module: nn.Module, args: Any) -> None:
    if torch.compiler.is_compiling():
        return
    clip = _watching(module)
    if clip is not None:
        clip._enter(clip._of_module[module])


def _after_forward(module: nn.Module, args: Any, output: Any) -> None:
    if torch.compiler.is_compiling():
        return
    clip = _watching(module)
    if clip is not None:
        clip._leave(clip._of_module[module], ended_well=output is not None)
