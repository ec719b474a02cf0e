"""Muon: validate, own the state, take the step.

The step reads as the algorithm, in `muonkit.step`. Hyperparameters live in the param groups
only, so schedulers, `add_param_group` and `state_dict` reach all of them.
"""

from __future__ import annotations

from collections import defaultdict
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from muonkit._compile import graph_or_eager, outside_graphs
from muonkit.adamw import adamw_step_
from muonkit.batching import LocalParam, make
from muonkit.checks import SeenOptions, check_gradients
from muonkit.describe import describe_group
from muonkit.distributed.exchange import announce, check_ranks_agree, run_overlapped
from muonkit.distributed.layout import Layouts, local
from muonkit.distributed.rank_dtypes import look_at_others, post
from muonkit.distributed.step_plan import (
    PlannedStep,
    options_to_compare,
    plan_alone,
    plan_key,
    present_gradients,
    products_label,
    refuse_cut_rows,
)
from muonkit.gradients import (
    GradientCheck,
    clip_gradients_,
    forget_scaler,
    judge,
    local_gradient,
    refuse_sparse,
    scaled_by,
    warn_if_idle,
    with_gradients,
)
from muonkit.groups import (
    MOMENTUM,
    SCALE,
    STEP,
    VARIANCE,
    adopt_momentum,
    adopt_other_names,
    complete_group,
    drop_foreign_keys,
    parameter_names,
    refuse_half_named,
    refuse_held,
    separate_lr,
    spell_,
    unused_name,
    warn_of_eps,
)
from muonkit.int8 import MomentumScale, block_extents
from muonkit.newton_schulz.coefficients import DEFAULT_STEPS, KELLER
from muonkit.options import DEFAULTS, OF_ALGORITHM, take_other_names_
from muonkit.period import PERIOD_STEP, count_, has_period, in_blocks
from muonkit.saved import merge_saved, spelled_groups, whole_state
from muonkit.settle import is_settled, known_of, predecessors, trained_of
from muonkit.stages import kept_state, listed
from muonkit.state import adopt_state, carried_state, check_parts, check_scales, ensure_state
from muonkit.step import muon_step
from muonkit.validate import holds_zeros, refuse_zero_weights, validate_defaults, validate_group

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh
    from torch.optim.optimizer import ParamsT

    from muonkit.batching import ObservedBatch
    from muonkit.distributed.plan import StepPlan
    from muonkit.distributed.step_plan import Present
    from muonkit.gradients import Scaled, Work
    from muonkit.newton_schulz.coefficients import Coefficients, Schedule
    from muonkit.scale import Scale
    from muonkit.stages import Constraint, Stage
    from muonkit.step import Observer

__all__ = ["Muon"]

_SCALE = "the gradients' scale"
_SCALES = (
    "scales differ where a GradScaler has seen an overflow on some ranks only: after "
    "scaler.update(), take the smallest, scale = torch.tensor(scaler.get_scale()); "
    "dist.all_reduce(scale, dist.ReduceOp.MIN); scaler.update(scale.item())"
)

# How many planned steps are kept: one for each set of parameters that had gradients lately.
_MOST_PLANS = 8

_PRODUCTS = (
    "ns_dtype='auto' and ns_form='auto' are what is fast on each rank's own hardware: on machines "
    "that differ say which, as ns_dtype='float32'; nothing was changed"
)

# Parameters, gradients and states.
_AdamWEntries: TypeAlias = tuple[list[Tensor], list[Tensor], list[dict[str, Any]]]

_DISAGREE = (
    "all ranks have to build the same model and optimizer, and every parameter has to have a "
    "gradient of one dtype on all of them or on none (where some ranks did not use a layer: add "
    "zero times its output to the loss); nothing was changed"
)


class Muon(Optimizer):
    """Muon for the matrices it is given; a drop-in for `torch.optim.Muon`.

    With momentum M, gradient G and a matrix W of `out` rows and `in` columns (torch.optim.Muon's
    computation; Keller Jordan 2024):

        M <- lerp(M, G, 1 - momentum)
        U  = lerp(G, M, momentum) if nesterov else M
        O  = orthogonalize(U)
        W <- W - lr * weight_decay * W - lr * scale(out, in) * O

    Args:
        params: parameters, named parameters or param groups. A group may hold any of the arguments
            below, and

            - ``view``: how its parameters are matrices, a `muonkit.View` or its spelling; "matrix"
              for 2-D parameters unless given, needed for all others;
            - ``algorithm``: "muon" or "adamw". ``use_muon=True/False`` is accepted too.

            An AdamW group has lr, betas, eps and weight_decay; what it lacks comes from the
            ``adamw_`` arguments.
        lr: learning rate, a float or a one-element tensor (of which each of several groups gets
            its own copy, as schedulers need it). With the scale "original" the spectral norm of an
            update, up to its factor sqrt(max(1, rows/cols)); with "match_rms_adamw" five times its
            RMS (an RMS of 0.2 lr, as AdamW's in long trainings), with "unit_rms" its RMS.
        weight_decay: decoupled decay per unit of (unscaled) lr; a float or a one-element tensor.
        momentum: weight of the past in the running average of gradients.
        nesterov: look ahead by one gradient.
        ns_coefficients: the schedule: a name (`muonkit.newton_schulz.coefficients.SCHEDULES` or
            "svd"), one triple, one triple per step, or a
            `muonkit.newton_schulz.coefficients.Schedule`.
        eps: torch.optim.Muon's lower bound of the norm, kept for its signature. It has no effect:
            a gradient of any scale gives the same update, and zero gives zero.
        ns_steps: number of Newton-Schulz iterations.
        adjust_lr_fn: the scale: "original" (also None), "match_rms_adamw", "spectral", "unit_rms",
            or a function (rows, cols) -> float of one matrix.
        ns_form: how the polynomial is evaluated: "standard", "gram" or "auto", the one of them
            with the fewer FLOPs on each shape (see `muonkit.newton_schulz.forms`).
        ns_dtype: dtype of the matrix products: "auto" (the one of bfloat16 and float32 that the
            hardware multiplies fastest, see `muonkit.orthogonalize`), "float32", "bfloat16",
            "float16" or "float64". `describe()` tells what auto chose, and why.
        momentum_dtype: dtype that the momentum is kept in: "auto" (the parameter's), or one of the
            above. In "bfloat16" it takes half of float32's memory and is off by at most
            2^-8 / (1 - momentum) of its largest magnitude so far (an update is rounded to nearest
            once a step); it is computed, and used in the step, in the gradient's dtype. "int8" (for
            the momentum alone) takes a quarter: it has a scale for each block of at most 128
            neighbours in a row, in the state's "momentum_scale" (`muonkit.int8`; arXiv 2509.23106),
            and is off by at most 1 / (254 (1 - momentum)) of its block's largest magnitude.
        bytes_in_flight: cap on the bytes of the matrices that are computed together, in the
            parameters' dtype; None is 64 MiB on a CPU, 256 MiB elsewhere. A larger parameter is
            computed alone. A step holds these, and for those that are computed at a time (on a CPU
            a few, elsewhere all) up to 3 + 6m/n times their bytes in the dtype of the products, m
            being the shorter side; on a CPU part of it is kept for the next step
            (`muonkit.newton_schulz.scratch`).
        maximize: step along the gradient instead of against it.
        cautious: decay only the entries that the update also shrinks (O * W > 0).
        nonfinite: what a NaN or infinite gradient in the group does: "propagate" (nothing is
            checked; the parameter becomes NaN), "skip" (the whole step of all groups, momentum
            included, does not take place; the attribute `skipped_steps` counts) or "raise"
            (FloatingPointError naming the parameter, before anything is written). The last two
            wait for each device once per step.
        adamw_lr, adamw_betas, adamw_eps, adamw_wd: defaults of AdamW groups. lr and decay are
            Muon's unless given; with another scale than "match_rms_adamw" and "unit_rms" Muon's lr
            means nothing to AdamW, and its own must be given here or in the group.

    One thing has one name here, and another where torch or routing has it (scale and adjust_lr_fn,
    decay and weight_decay): [all of them](options.md#one-thing-several-names) stand in
    docs/api/options.md.

    Keyword Args: Stages around the orthogonalization
        before: the stage, or the stages in a list, that rewrite the momentum before it is
            orthogonalized: "muoneq" or a `muonkit.Stage` (all of them: `muonkit.stages`).
        after: those that rewrite the orthogonalized matrix: "normuon", "adamuon", "muon_plus" or a
            `muonkit.Stage`. One of all these stages may keep a state.
        constraint: what the norms of update and weight are held to: "hyperball", "relative_update",
            "radial_brake" or a `muonkit.Constraint`. With the first two lr is the size of an update
            relative to the weight, and no scale applies; "hyperball" has no weight decay. Weights
            that are sharded have their norms over all shards.
        stage_beta2: weight of the past in what a stage keeps; None is the stage's default.
        variant: another name of `after`; "plain" is none.

    Keyword Args: Less work in a step
        fraction: of each matrix's rows (columns of a tall one), how many a step orthogonalizes and
            applies, in (0, 1]: those of the momentum with the largest magnitudes (Dion2, with
            error feedback: `muonkit.selection`). FLOPs fall by fraction squared. Below 1 `momentum`
            is what a row keeps that was taken, and `nesterov` has no effect; decay is of the whole
            weight, but with `cautious`. Not beside "adamuon".
        selection: "global": the largest of a matrix's rows, the same in every layout; or "local":
            of those that each rank has, for which `fraction` of the bytes are sent, and the result
            depends on the layout.

    Keyword Args: Over several ranks
        process_group: the ranks that have copies of plain tensors (DDP), or of DTensors beside the
            axes of their own mesh (data parallel copies of a tensor parallel model): a process
            group or a 1-D device mesh. They divide the matrices among them, and each is computed
            once. None: every rank computes all of its plain tensors. DTensors carry their own
            layout: for FSDP2, HSDP, TP and experts nothing is to be said.
        zero: 1 shards the state too, AdamW's included (ZeRO-1), over the ranks that would have
            copies of it: every rank keeps some rows of each, as a DTensor.
        exchange_dtype: dtype in which momentum and results travel between ranks: "auto" (what the
            update is computed in: nothing is rounded), "float32" or "bfloat16" (half the bytes of
            float32; every rank still gets the same result; not for "adamuon", which divides every
            entry by its magnitude, rounded ones too).
        replicas: along mesh axes on which a DTensor is replicated (HSDP): "recompute" (each set of
            shards computes all matrices by itself), "split" (every matrix is computed once, and
            sent to all) or "auto", by the cost of FLOPs and bytes
            (`muonkit.distributed.machines.MACHINES`).
        period: P > 1 (MuonBP): in one step of P matrices are orthogonalized whole; in the others
            every rank orthogonalizes what it stores of each matrix as a matrix of its own, with the
            scale of that block. None of it is sent but among copies that divide the work (ZeRO-1,
            `replicas="split"`). The first step is a whole one. A matrix that a rank stores whole is
            trained as ever. The result depends on the layout (`muonkit.period`).
        block_lr_factor: MuonBP's second learning rate, as a factor on lr for blocks that are less
            than a matrix; decay stays lr's.

    Where ranks share parameters, all of them make the same optimizer and take its steps together;
    every step begins with a small collective in which they compare what they are about to do.

    Raises:
        ValueError: an option out of range, a parameter that its view does not fit, one whose
            placement is partial, or that lies on other ranks than the rest; one that is expanded,
            or of a lazy module that did not run; a view or layout that cuts the blocks of a
            momentum in int8.
        TypeError: a parameter of integer dtype.
        RuntimeError: a sparse parameter, or a complex one for Muon (on construction; AdamW trains
            complex ones as torch's does), a sparse gradient (in `step`, before anything is
            written).
    """

    _observer: Observer | None = None  # a Monitor's, in the steps that it samples
    # Since `consolidate_state_dict`, on the rank that has it: the whole state, until it changes.
    _whole: dict[Any, dict[str, Any]] | None = None

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        weight_decay: float | Tensor = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_coefficients: Coefficients | Schedule = KELLER,
        eps: float = 1e-7,
        ns_steps: int = DEFAULT_STEPS,
        adjust_lr_fn: str | Scale | None = None,
        *,
        ns_form: str = "auto",
        ns_dtype: str | torch.dtype = "auto",
        momentum_dtype: str | torch.dtype = "auto",
        bytes_in_flight: int | None = None,
        before: str | Stage | Sequence[str | Stage] = (),
        after: str | Stage | Sequence[str | Stage] = (),
        constraint: str | Constraint | Sequence[str | Constraint] = (),
        stage_beta2: float | None = None,
        fraction: float = 1.0,
        selection: str = "global",
        variant: str | Stage | None = None,
        exchange_dtype: str | torch.dtype = "auto",
        replicas: str = "auto",
        process_group: ProcessGroup | DeviceMesh | None = None,
        zero: int = 0,
        period: int = 1,
        block_lr_factor: float = 1.0,
        maximize: bool = False,
        cautious: bool = False,
        nonfinite: str = "propagate",
        adamw_lr: float | Tensor | None = None,
        adamw_betas: tuple[float, float] = (0.9, 0.95),
        adamw_eps: float = 1e-8,
        adamw_wd: float | None = None,
    ) -> None:
        arguments = locals()
        defaults = {name: arguments[name] for name in DEFAULTS}
        if variant is not None:
            defaults |= {"variant": variant}
            if not listed(after):
                del defaults["after"]
        spell_(defaults)
        if isinstance(params, nn.Module):  # not iterable, or its parts are
            raise TypeError(
                f"Muon takes parameters, and got a module ({type(params).__name__}), which is not "
                "iterable as such: write MuonW(model), which routes it, or give the matrices"
            )
        validate_defaults(defaults)
        warn_of_eps(defaults)
        self.skipped_steps = 0
        layouts = Layouts(process_group, zero)
        super().__init__(params, defaults)
        separate_lr(self.param_groups)
        self._settle_all(layouts, {})
        self._refuse_zero_weights(self.param_groups, "construction")

    def _refuse_zero_weights(self, groups: Sequence[dict[str, Any]], call: str) -> None:
        """`refuse_zero_weights` of groups that all ranks have, once they are seen to be here."""
        if self._layouts.domain is not None:
            holding = sorted({name for group in groups for name in holds_zeros(group)})
            told = [("constraint", ", ".join(holding))]
            check_ranks_agree(self._layouts.domain, told, {"": _DISAGREE}, call=call)
        for group in groups:
            refuse_zero_weights(group)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; see the class for its keys. Nothing is added when it raises."""
        if "_layouts" in self.__dict__:
            self._settle()
            refuse_held(param_group, self.param_groups)
        group = complete_group(param_group, self.defaults)
        refuse_half_named(group, self.param_groups)
        super().add_param_group(group)
        added = self.param_groups.pop()
        drop_foreign_keys(added)
        validate_group(added)
        separate_lr([added], self.param_groups)
        added["name"] = unused_name(added, self.param_groups)
        if added["algorithm"] == "muon":
            others = [group.get(PERIOD_STEP, 0) for group in self.param_groups]
            added.setdefault(PERIOD_STEP, max(others, default=0))
        if "_layouts" in self.__dict__:  # else the constructor does it, for all groups together
            layouts = self._layouts.with_more(trained_of([added]))
            _refuse_unfit([added], layouts)
            self._refuse_zero_weights([added], "add_param_group")
            self._go_by(layouts)
            self._make_state([added])
        self.param_groups.append(added)
        self._known, self._whole = known_of(self.param_groups), None

    def reset_state(self, params: Iterable[Tensor] | None = None) -> None:
        """Begin the state of some parameters anew, with zeros in the shape that they have now: for
        those that were resized, or re-initialised, after the optimizer was made.

        Where ranks share parameters, all of them call it together.

        Args:
            params: of this optimizer; None is all of them.

        Raises:
            ValueError: one of them is none of this optimizer's, or has a shape that its view does
                not fit; nothing is changed.
        """
        own = [p for group in self.param_groups for p in group["params"]]
        chosen = own if params is None else list(params)
        for p in chosen:
            if all(p is not q for q in own):
                raise ValueError(
                    f"reset_state got a tensor {tuple(p.shape)} that no param group holds; it "
                    "takes parameters of this optimizer"
                )
        self._settle(chosen)

    def _settle(self, reset: Sequence[Tensor] = ()) -> None:
        """Layouts and state are those of what the groups hold now, whoever put it there.

        Raises:
            ValueError, TypeError, RuntimeError: it cannot be mapped to what was there before, or is
                not what the constructor takes; nothing is changed.
        """
        adopt_momentum(self.param_groups)
        adopt_other_names(self.param_groups)
        if reset or not is_settled(self.param_groups, self._known):
            self._settle_anew(reset)

    @outside_graphs
    def _settle_anew(self, reset: Sequence[Tensor]) -> None:
        before = predecessors(self.param_groups, self._known, self.state, reset)
        for group in self.param_groups:
            validate_group(group)
            refuse_zero_weights(group, together=False)  # such as were frozen, or on meta
        self._settle_all(self._layouts.anew(), before)

    @torch.no_grad()
    def _settle_all(self, layouts: Layouts, before: Mapping[Tensor, Tensor]) -> None:
        """Find out where the parameters lie, and make their state: on all ranks, at once.

        Args:
            before: for each parameter that goes on with a state, whose that was.
        """
        trained = trained_of(self.param_groups)
        layouts.add(trained)
        _refuse_unfit(self.param_groups, layouts)
        carried = {
            p: carried_state(self.state[before[p]], p, group, layouts)
            for group in trained
            for p in group["params"]
            if before.get(p) in self.state
        }
        self._go_by(layouts)
        self._planned_steps: dict[tuple[Any, ...], PlannedStep] = {}
        self._options = SeenOptions()
        # In one order on all ranks: what gathers a state dict goes by it.
        held = [p for group in self.param_groups for p in group["params"]]
        kept = {p: self.state[before[p]] for p in held if before.get(p) in self.state}
        others = {key: self.state[key] for key in self.state if not isinstance(key, Tensor)}
        self.state = defaultdict(dict, {**others, **kept, **carried})
        self._make_state(trained)
        self._known, self._whole = known_of(self.param_groups), None
        if layouts.domain is None:
            self._told = post(self)

    def _go_by(self, layouts: Layouts) -> None:
        self._layouts = layouts
        # A GradScaler then leaves it to `step` to skip: on all ranks, or on none.
        self._step_supports_amp_scaling = layouts.domain is not None

    @torch.no_grad()
    def _make_state(self, groups: Sequence[dict[str, Any]]) -> None:
        for group in trained_of(groups):
            for p in group["params"]:
                ensure_state(self.state[p], p, group, self._layouts)

    def __getstate__(self) -> dict[str, Any]:
        self._settle()
        if self._layouts.domain is not None:
            raise TypeError(
                "an optimizer whose parameters several ranks share cannot be pickled or copied: "
                "save its state_dict(), with torch.distributed.checkpoint where it is sharded"
            )
        return {**super().__getstate__(), "skipped_steps": self.skipped_steps}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:  # pickled before these existed
            if group["algorithm"] == "muon":
                take_other_names_(group)
                for key in OF_ALGORITHM["muon"]:
                    group.setdefault(key, DEFAULTS[key])
                group.setdefault(PERIOD_STEP, 0)
        if "_layouts" not in self.__dict__:  # load_state_dict of torch comes here too
            self._settle_all(Layouts(), {p: p for p in self.state})

    def state_dict(self) -> dict[str, Any]:
        """torch's: the state of each parameter by its number, and the groups.

        Where the state is sharded (zero=1, FSDP2) each rank's has its own part, as DTensors, which
        no other rank can load: see `consolidate_state_dict`, or save with
        torch.distributed.checkpoint. A stage or scale that was given as an object is saved as its
        name.

        Raises:
            ValueError: the groups hold parameters that cannot be mapped to what they held before.
        """
        self._settle()
        self._make_state(self.param_groups)  # options may ask for more than they did in a step
        if self._whole is None:
            return spelled_groups(super().state_dict())
        parts, self.state = self.state, defaultdict(dict, self._whole)
        try:
            return spelled_groups(super().state_dict())
        finally:
            self.state = parts

    @torch.no_grad()
    def consolidate_state_dict(self, to: int = 0) -> None:
        """Make the whole state known to one rank, as `torch.distributed.optim`'s
        ZeroRedundancyOptimizer does: all ranks call this together.

        Until the next step (or load, or group that is added) `state_dict` of that rank has every
        tensor whole, as a plain tensor on the CPU, and can be loaded on any number of ranks and in
        any layout. That of the other ranks has their own parts, as ever. Where every rank already
        has everything, this call does nothing. Other ranks hold one whole tensor at a time.

        Args:
            to: the rank, counted in the ranks that share this optimizer's parameters.

        Raises:
            ValueError: there is no such rank.
            RuntimeError: on every rank, if they differ in `to` or in what they keep.
        """
        with self._telling("consolidate_state_dict"):
            self._settle()
            self._make_state(self.param_groups)
        self._whole = whole_state(self.param_groups, self.state, self._layouts, to)

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dict of ours, of `torch.optim.Muon` or of one with the same keys.

        Hyperparameters that it lacks keep their value here. Names and structure (algorithm, view)
        are always the model's own: where both sides have the parameters' names, the state goes by
        name, in whatever order groups and parameters were saved; else by position. The name of a
        stage or scale stands for the object of that name in this optimizer's group, else for
        muonkit's own. For the way back: torch's Muon loads ours, and steps as ours does where its
        own arguments say all: `muonkit.convert.from_muonkit` is for the rest.

        Raises:
            ValueError: other groups, names, algorithms or shapes than here, options that the
                constructor refuses (in this layout too), a parameter without state or with a part
                of it, or state that lies on several ranks and is not this rank's part; nothing is
                loaded.
        """
        self._settle()
        merged: dict[str, Any] = {}

        def merge(_: Optimizer, given: dict[str, Any]) -> dict[str, Any]:
            loaded = merge_saved(self.param_groups, given, self.state)
            both = zip(loaded["param_groups"], self.param_groups, strict=True)
            groups = [{**group, "params": own["params"]} for group, own in both]
            _refuse_unfit(groups, self._layouts)
            merged.update(loaded)
            return merged

        # After the user's own hooks: these may give the parameters other names.
        handle = self.register_load_state_dict_pre_hook(merge)
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()
        separate_lr(self.param_groups)  # torch has copied what groups share as one tensor
        self._whole = None
        for group, saved in zip(self.param_groups, merged["param_groups"], strict=True):
            for p, key in zip(group["params"], saved["params"], strict=True):
                before = merged["state"].get(key)
                if before:
                    adopt_state(self.state[p], before, p, group, self._layouts)
        self._make_state(self.param_groups)  # of what has none, and counts of another dtype

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step; returns the closure's loss, if there is one.

        Parameters without a gradient are left alone, decay included. Where ranks share parameters,
        all of them call this together.

        Raises:
            RuntimeError: a sparse gradient; or, on every rank and before anything is sent, ranks
                that disagree: in hyperparameters, shapes, or which parameters have a gradient. Or a
                rank ended while others waited for it. Or `ns_dtype="auto"` is another dtype on
                another rank; where ranks exchange nothing (plain DDP) each looks for that at its
                first step, in the store at which they met.
            FloatingPointError: see `nonfinite`.
        """
        if self._observer is not None:
            return self._observer.call(self._take_step, closure)
        return self._take_step(closure)

    def _take_step(self, closure: Callable[[], Any] | None) -> Any:
        if self._whole is not None:
            self._whole = None
        # Under torch.compile a graph may break here and in `_step_alone`, between two calls, and
        # nowhere below them.
        loss = None if closure is None else _loss_of(closure)
        if self._layouts.domain is None:
            self._step_alone()
        else:
            self._step_together()
        return loss

    @graph_or_eager
    def _work(self) -> Work:
        """The parameters with a gradient, once everything that can be refused was looked at."""
        try:
            self._settle()
            work = with_gradients(self.param_groups)
            refuse_sparse(work)
            self._options.check(self.param_groups)
            check_gradients(self.param_groups, self.state)
            check_parts(work, self.state, self._layouts)
        except Exception as error:
            if self._layouts.domain is not None:
                announce(self._layouts.domain, error)
            raise
        return work

    def _step_alone(self) -> None:
        """A step of parameters that no other rank shares."""
        work = self._work()
        if self._layouts.domain is not None:  # sharded since the last step
            self._step_together()
            return
        look_at_others(self._told)
        warn_if_idle(work)
        if not any(_is_checked(group) for group in self.param_groups) or self._may_step():
            self._begin_graph(work)

    @outside_graphs
    def _may_step(self) -> bool:
        """Whether this rank's gradients let the step take place; waits for them."""
        verdict = judge(with_gradients(self.param_groups))
        return self._takes_place(verdict, verdict.vote)

    def _takes_place(self, verdict: GradientCheck, vote: int) -> bool:
        taken = verdict.may_step(vote)
        if not taken:
            self.skipped_steps += 1
        return taken

    def _begin_graph(self, work: Work) -> None:
        # torch.compile begins a graph only in a function that has tensors in its arguments.
        self._update()

    @graph_or_eager
    def _update(self) -> None:
        """The writes of a step of parameters that no other rank shares."""
        # Looked up again, and not passed in: torch.compile takes a gradient that it first reaches
        # through `self.state`, and not through the groups, for a constant.
        work = with_gradients(self.param_groups)
        # Whatever can be refused is, before the first write.
        planned = [
            (group, make([self._local_param(p, group) for p in params], group))
            for group, params in work
            if group["algorithm"] == "muon"
        ]
        adamw = self._adamw(work)
        self._count_(work)
        for group, entries in adamw:
            adamw_step_(*entries, group)
        for group, batches in planned:
            for batch in batches:
                for _ in muon_step(batch, group, self._observer):
                    pass

    # Planning and exchanging are no part of a graph.
    @outside_graphs
    def _step_together(self) -> None:
        """A step with other ranks: what they share is exchanged."""
        try:
            self._exchange()
        except Exception:
            forget_scaler(self)
            raise

    def _exchange(self) -> None:
        work = self._work()
        if self._layouts.domain is None:  # no longer sharded
            self._step_alone()
            return
        with self._telling("step"):
            present = present_gradients(self.param_groups)
            planned = self._planned_step(present, list(map(in_blocks, self.param_groups)))
            scaled = scaled_by(self)
            verdict = judge(work) if scaled is None else scaled.check()
        vote = self._agree(planned, verdict.vote, scaled)
        warn_if_idle(work)
        if not self._takes_place(verdict, vote):
            return
        if scaled is not None:  # before gradients of partial sums are redistributed: into copies
            scaled.unscale_(work)
        own, shared = self._batches(work, planned)
        adamw = self._adamw(work)
        self._count_(work)
        count_(self.param_groups)
        for group, entries in adamw:
            adamw_step_(*entries, group)
        tasks: list[Iterator[None]] = []
        tasks += [muon_step(batch, group, self._observer) for group, batch in shared]
        tasks += [task for gather in planned.gathers for task in gather.tasks()]
        run_overlapped(tasks, depth=3)
        for group, batch in own:
            for _ in muon_step(batch, group, self._observer):
                pass

    @contextmanager
    def _telling(self, call: str) -> Iterator[None]:
        """Tell the ranks that wait in `call` of an error that only this rank raises in here."""
        try:
            yield
        except Exception as error:
            if self._layouts.domain is not None:
                announce(self._layouts.domain, error, call)
            raise

    def _adamw(self, work: Work) -> list[tuple[dict[str, Any], _AdamWEntries]]:
        """(group, what `adamw_step_` takes) of AdamW's groups."""
        return [
            (group, self._adamw_entries(params, group))
            for group, params in work
            if params and group["algorithm"] == "adamw"
        ]

    def _count_(self, work: Work) -> None:
        """Count the step of the stages that keep a state; AdamW's are counted by torch."""
        for group, params in work:
            muon = params and group["algorithm"] == "muon"
            if muon and kept_state(group) != "none":
                torch._foreach_add_([self.state[p][STEP] for p in params], 1)

    def plan(self, blocks: bool = False) -> StepPlan:
        """Which rank computes what, and sends how much to whom, in a step in which every parameter
        has a gradient in its own dtype.

        Args:
            blocks: of a step between whole ones, of the groups that have a period: such a group
                takes one step like `plan()` and then `period - 1` like `plan(blocks=True)`.

        Returns:
            A `muonkit.distributed.plan.StepPlan`: `traffic()` has FLOPs and bytes of every rank,
            `messages(rank)` what one rank sends to each other. Ranks are counted in their process
            group; there is one where none share this optimizer's parameters.
        """
        self._settle()
        present = present_gradients(self.param_groups, all_of_them=True)
        if self._layouts.domain is None:
            return plan_alone(self._layouts, self.param_groups, present)
        between = [blocks and has_period(group) for group in self.param_groups]
        return self._planned_step(present, between).plan

    def clip_grad_norm_(self, max_norm: float, error_if_nonfinite: bool = False) -> Tensor:
        """Scale the gradients of all parameters, in place, so that their 2-norm is at most
        `max_norm`: `torch.nn.utils.clip_grad_norm_` for every layout, those on several meshes and
        those of `ddp_reduce_scatter_hook` too. All ranks call it together.

        Returns:
            The norm before, over all ranks: a scalar tensor.

        Raises:
            RuntimeError: it is not finite, and `error_if_nonfinite`; or, on every rank, ranks that
                differ in these arguments or in how gradients lie. Nothing is clipped.
        """
        with self._telling("clip_grad_norm_"):
            max_norm = float(max_norm)
            self._settle()
            refuse_sparse(with_gradients(self.param_groups))
        named = [
            (name, p)
            for group in self.param_groups
            for name, p in zip(parameter_names(group), group["params"], strict=True)
        ]
        return clip_gradients_(named, self._layouts, max_norm, error_if_nonfinite)

    def _agree(self, planned: PlannedStep, vote: int, scaled: Scaled | None) -> int:
        """The largest vote of all ranks, once they are seen to be about to do the same."""
        assert self._layouts.domain is not None
        compared = [*options_to_compare(self.param_groups), *planned.compared.items()]
        if scaled is not None:
            compared.insert(0, (_SCALE, repr(scaled.scale)))
        remedies = {products_label(number): _PRODUCTS for number in range(len(self.param_groups))}
        remedies |= {_SCALE: _SCALES, "": _DISAGREE}
        return check_ranks_agree(self._layouts.domain, compared, remedies, vote)

    def _planned_step(self, present: Present, blocks: Sequence[bool] | None = None) -> PlannedStep:
        """Args:
        blocks: for each group, whether its step is one of blocks; None: whole matrices in all.
        """
        blocks = [False] * len(self.param_groups) if blocks is None else blocks
        key = *plan_key(self.param_groups, present), *blocks
        planned = self._planned_steps.pop(key, None)
        if planned is None:
            if len(self._planned_steps) == _MOST_PLANS:
                longest_ago = next(iter(self._planned_steps))
                del self._planned_steps[longest_ago]
            planned = PlannedStep(self._layouts, self.param_groups, present, blocks)
        self._planned_steps[key] = planned
        return planned

    def _batches(
        self, work: Work, planned: PlannedStep
    ) -> tuple[
        list[tuple[dict[str, Any], ObservedBatch]], list[tuple[dict[str, Any], ObservedBatch]]
    ]:
        """(group, batch) of Muon's parameters that are this rank's own, and of those it shares."""
        own: list[tuple[dict[str, Any], ObservedBatch]] = []
        shared: list[tuple[dict[str, Any], ObservedBatch]] = []
        for number, (group, params) in enumerate(work):
            if group["algorithm"] == "adamw":
                continue
            indices = [i for i, p in enumerate(group["params"]) if p.grad is not None]
            entries = {i: self._local_param(p, group) for i, p in zip(indices, params, strict=True)}
            mine = [entries[i] for i in planned.own[number]]
            own += [(group, batch) for batch in make(mine, group)]
            for sharded in planned.sharded_groups[number]:
                shared += [(group, batch) for batch in sharded.batches(entries)]
        return own, shared

    def _local_param(self, p: Tensor, group: dict[str, Any]) -> LocalParam:
        """This rank's part of a parameter that Muon trains."""
        state = self.state[p]
        ensure_state(state, p, group, self._layouts)
        layout = self._layouts.get(p)
        if layout is None and VARIANCE not in state and SCALE not in state:
            return LocalParam(p, local_gradient(p), state[MOMENTUM])  # no DTensor has no layout
        grad, momentum = self._layouts.part(p, local_gradient(p)), local(state[MOMENTUM])
        copies = () if layout is None else layout.param_placement.copies()
        variance = steps = scale = None
        if kept_state(group) != "none":
            variance, steps = local(state[VARIANCE]), state[STEP]
        if SCALE in state:
            scales = state[SCALE]
            scale = MomentumScale(local(scales), block_extents(p.shape, scales.shape))
        return LocalParam(local(p), grad, momentum, variance, steps, copies, scale)

    def _adamw_entries(self, params: Sequence[Tensor], group: dict[str, Any]) -> _AdamWEntries:
        """The parts of AdamW's parameters that this rank updates: values, gradients, states."""
        own, grads, states = [], [], []
        for p in params:
            ensure_state(self.state[p], p, group, self._layouts)
            mine, grad = self._layouts.part(p, local(p)), self._layouts.part(p, local_gradient(p))
            state = {key: local(value) for key, value in self.state[p].items()}
            own.append(mine)
            grads.append(grad)
            states.append(state)
        return own, grads, states

    def describe(self) -> list[dict[str, Any]]:
        """The settings of each kind of matrix, with every "auto" replaced by what it chose.

        In a step of whole matrices in one process, all with a gradient: blocks (`period`) and the
        rows that ranks select by themselves (`selection="local"`) have other shapes.

        Returns:
            One dict per param group and matrix shape: group, algorithm, and for AdamW parameters,
            their number; for Muon view, matrices, rows, cols, computed_as (the shape that small
            ones are padded to), ns_steps, ns_form, restarts (see `muonkit.newton_schulz.forms`),
            blocks (of rows of a symmetric product), gflop (of the products for one matrix),
            ns_dtype, ns_dtype_reason ("given", or what auto's choice is due to), momentum_dtype,
            before, after and constraint (names, or "none"), selected (rows and columns of what is
            orthogonalized of each), period, scale, lr (after the scale).
        """
        # No layouts are needed, and to find some may take all ranks: one alone may ask.
        adopt_momentum(self.param_groups)
        adopt_other_names(self.param_groups)
        return [
            row for n, group in enumerate(self.param_groups) for row in describe_group(n, group)
        ]


def _refuse_unfit(groups: Sequence[dict[str, Any]], layouts: Layouts) -> None:
    """Refuse options that the parameters' layouts cannot have, before anything is made or loaded.

    Raises:
        ValueError: there is one; on all ranks.
    """
    refuse_cut_rows(layouts, groups)
    check_scales(trained_of(groups), layouts)


@outside_graphs
def _loss_of(closure: Callable[[], Any]) -> Any:
    enable_grad: Any = torch.enable_grad  # untyped in torch 2.9
    with enable_grad():
        return closure()


def _is_checked(group: dict[str, Any]) -> bool:
    return bool(group["nonfinite"] != "propagate")
