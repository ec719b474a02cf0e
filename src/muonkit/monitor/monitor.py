"""The instrument: what the optimizer does while it trains, read and never written to."""

from __future__ import annotations

import sys
import weakref
from contextlib import suppress
from numbers import Integral
from typing import TYPE_CHECKING, Any

import torch

from muonkit._text import shown, unknown
from muonkit._torch import inner_optimizer
from muonkit.groups import parameter_names
from muonkit.monitor.records import (
    FIELDS,
    TrafficRecords,
    chosen,
    groups_of,
    header_of,
    matrices_records,
    parameters_records,
    structure,
)
from muonkit.monitor.sample import KINDS, Sampler, global_rank, matrices_of
from muonkit.monitor.sinks import FORMAT, JsonLines, OpenSinks, copied, deliver, sinks_of
from muonkit.monitor.spectra import LEVELS
from muonkit.optim import Muon
from muonkit.period import in_blocks

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import TracebackType

    from muonkit.monitor.sinks import Sink

__all__ = ["FORMAT", "Monitor"]

# What a recording may grow to unless the caller says otherwise: an instrument fills no disk.
MOST_BYTES = 2**30


class Monitor:
    """Samples what a `Muon` or `MuonW` does: norms, spectra, learning rates, traffic.

    ::

        monitor = Monitor(optimizer, every=100, to="run.jsonl")
        ...                            # train; monitor.latest is the last sample
        monitor.close()

    Steps are counted from 1, by calls of `optimizer.step()`. Sampled are the first and every
    multiple of `every`. Between samples nothing is computed and no device is waited for; a sample
    waits for each device. Parameters, gradients, state and random numbers are left as they are, bit
    for bit. In a sampled step of a matrix W of m rows and n columns, with G its gradient, M the
    momentum after the step, O the orthogonalized matrix as the step applies it (after the stages),
    η = lr * scale(m, n) and λ the decay::

        gradient_norm, momentum_norm    ||G||_F, ||M||_F
        weight_norm                     ||W||_F before the step
        update_norm                     ||ηO||_F: what the step adds, without the decay, and before
                                        a constraint corrects the weight's norm
        update_rms                      ||ηO||_F / √(mn)
        update_to_weight                ||ηO||_F / ||W||_F
        decay_norm                      lr λ ||W||_F (of the decayed entries, where cautious; 0
                                        with a constraint that has no decay, "hyperball")
        decay_share                     decay_norm / (decay_norm + update_norm)
        orthogonality_error             ||OO^T - I||_F / √min(m, n), of the short side, before the
                                        stages `after`: √(mean of (σ² - 1)²)
        lr                              η
        nonfinite                       entries of G, M, O and W that are NaN or infinite
        spectra                         of M, of O (the update without η) and of W: see below
        owners                          the ranks that computed it

    A spectrum has the singular values' min and max; entropy, H / log min(m, n) with
    H = -Σ p log p and p = σ/Σσ; effective_rank exp(H) (Roy & Vetterli 2007); stable_rank
    ||A||_F² / ||A||_2²; and 17 quantiles of them, equally spaced from the smallest to the largest
    (`muonkit.monitor.spectra`). It is None where the matrix is zero or not finite, and so is
    any number that is not.

    For AdamW's parameters M is exp_avg and the update lr m̂ / (√v̂ + ε); there are no spectra. A
    group's norms are those of all its matrices or parameters as one vector.

    On several ranks that share parameters all of them make a monitor with the same arguments and
    take the same steps; each ends with the same sample, whose numbers are one process's to the
    rounding of the dtype. Whole matrices are measured by the ranks that compute them: a sampled
    step has three more exchanges to the owners, and one of the results. With `period` a sample
    waits for the next step of whole matrices; where a step raises, its sample is taken in the next.

    Matrices and parameters are those in the optimizer's groups at each sample, whatever was added,
    taken out or replaced since the last one; a file then gets a new header.

    Args:
        optimizer: a `Muon` or `MuonW` with at least one matrix; of a trainer's wrapper (as
            Accelerate's, Fabric's and Lightning's) it is the one inside.
        every: steps from sample to sample.
        to: where samples go: a path that ends in .jsonl, a callable that takes the sample (a dict
            of its own, which it may change), or a list of these. A recording that is there is
            appended to, another file refused. One that raises is warned of and gets no more.
        spectra: the tensors whose singular values are taken, of "gradient", "momentum", "update"
            and "weight"; () for none, which makes a sample several times cheaper.
        start: steps that were taken before, in a run that goes on.
        writes: whether this process gives samples to `to`; None: the first of the ranks that share
            parameters does, and rank 0 where none are shared.
        fields: what of each record is kept, of the names above, `"spectra.stable_rank"` and its
            like for one measure of all spectra (`"spectra"`: all measures), and "ranks"; None:
            everything, in a file up to 550 bytes a matrix and 400 for each of its spectra.
        max_bytes: what a file may grow to (1 GiB); a last line says that it ended there, and a
            warning. None: whatever there is room for.

    Attributes:
        step: how many steps were taken.
        latest: the last sample, None before the first: ``{"kind": "sample", "step": n, "skipped":
            whether the step was left out (`nonfinite="skip"`; then the rest is empty), "groups":
            [...], "matrices": [...], "parameters": [...], "ranks": [...]}``.
        header: what stays the same: the format, versions, every, and names, shapes, views and
            groups of all matrices and parameters. It is the first line of a file.

    Raises:
        TypeError: the optimizer is none of muonkit's; a sink that is neither path nor callable.
        ValueError: no matrix, every below 1, an optimizer that has a monitor, unknown spectra or
            fields, a path that is not *.jsonl, that is no recording but has something in it, or
            that another monitor writes to, in this process or another.
        FileNotFoundError: the path's folder is missing.
        RuntimeError: in a step to be sampled, before it: a parameter on the meta device.
    """

    def __init__(
        self,
        optimizer: Muon,
        every: int = 100,
        to: Sink | Sequence[Sink] | None = None,
        *,
        spectra: Sequence[str] = ("momentum", "update", "weight"),
        start: int = 0,
        writes: bool | None = None,
        fields: Sequence[str] | None = None,
        max_bytes: int | None = MOST_BYTES,
    ) -> None:
        optimizer = inner_optimizer(optimizer)
        # They are gone through twice, here and in the check.
        spectra = spectra if isinstance(spectra, str) else tuple(spectra)
        fields = fields if fields is None or isinstance(fields, str) else tuple(fields)
        _check(optimizer, every, spectra, start, fields, max_bytes)
        self.every, self.step = int(every), int(start)
        self.latest: dict[str, Any] | None = None
        self._fields = None if fields is None else frozenset(fields)
        drawn = fields is None or any(field.startswith("spectra") for field in fields)
        self._optimizer, self._spectra = optimizer, tuple(spectra) if drawn else ()
        self._rank = global_rank()
        domain = optimizer._layouts.domain
        first = self._rank == 0 if domain is None else domain.position == 0
        self._sinks = sinks_of(to, first if writes is None else writes, max_bytes)
        self._open_sinks = OpenSinks(self._sinks)
        self._sampler: Sampler | None = None
        self._skipped, self._due = 0, False
        self._traffic = TrafficRecords(optimizer)
        try:
            self._know()
        except Exception:
            self._open_sinks.close()  # another monitor may have the file
            raise
        disable: Any = torch.compiler.disable  # a compiled step calls these as they are
        self._hooks = [
            optimizer.register_step_pre_hook(disable(self._before_step)),
            optimizer.register_step_post_hook(disable(self._after_step)),
        ]
        _MONITORED.add(optimizer)

    def close(self) -> None:
        """Leave the optimizer as it was, and close the files; as often as one likes.

        A sink that cannot be closed is warned of.
        """
        if not self._hooks:
            return  # the optimizer may have another monitor by now
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        self._listen(None)
        _MONITORED.discard(self._optimizer)
        self._sinks = []
        self._open_sinks.close()

    def __enter__(self) -> Monitor:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    # --- the hooks ------------------------------------------------------------------------------

    def _before_step(self, *_: Any) -> None:
        self.step += 1
        self._listen(None)  # the last step may have raised: then its sample is still due
        self._due = self._due or self.step == 1 or self.step % self.every == 0
        if self._due:
            _refuse_meta(self._optimizer)
            # Whatever is refused here is refused by the step too, which tells the other ranks.
            with suppress(Exception):
                self._optimizer._settle()  # parameters that were replaced since the last step
            shared = self._optimizer._layouts.domain is not None
            if shared and any(map(in_blocks, self._optimizer.param_groups)):
                return  # no matrix is whole in this step
            sampler = Sampler(self._optimizer, self._spectra)
            self._skipped = self._optimizer.skipped_steps
            with torch.no_grad():
                sampler.begin()
            self._listen(sampler)

    def _after_step(self, *_: Any) -> None:
        sampler = self._sampler
        self._listen(None)
        if sampler is None:
            return
        self._due = False
        skipped = self._optimizer.skipped_steps != self._skipped
        with torch.no_grad():
            sample = self._sample(sampler, skipped)
        if self._known != structure(self._optimizer):
            self._know()
        self.latest = copied(sample)
        deliver(self._sinks, sample)

    def _listen(self, sampler: Sampler | None) -> None:
        """Take the optimizer's observer slot, or leave it."""
        self._sampler = self._optimizer._observer = sampler

    def _sample(self, sampler: Sampler, skipped: bool) -> dict[str, Any]:
        matrices, parameters, ranks = [], [], []
        if not skipped:
            sampler.end()
            measured = sampler.gather()
            matrices = matrices_records(self._optimizer, measured)
            parameters = parameters_records(self._optimizer, measured)
            ranks = self._traffic.records(self._rank)
        sample = {
            "kind": "sample",
            "step": self.step,
            "skipped": skipped,
            "groups": groups_of(self._optimizer, matrices, parameters),
            "matrices": matrices,
            "parameters": parameters,
            "ranks": ranks,
        }
        return sample if self._fields is None else chosen(sample, self._fields)

    def _know(self) -> None:
        """Read what the optimizer has, again where that is something else, and write the header."""
        self._known = structure(self._optimizer)
        self.header = {
            "kind": "header",
            "format": FORMAT,
            "muonkit": sys.modules["muonkit"].__version__,
            "torch": str(torch.__version__),
            "every": self.every,
            "levels": LEVELS,
            **header_of(self._optimizer),
        }
        deliver([sink for sink in self._sinks if isinstance(sink, JsonLines)], self.header)


def _check(
    optimizer: Any, every: Any, spectra: Any, start: Any, fields: Any, max_bytes: Any
) -> None:
    if not isinstance(optimizer, Muon):
        raise TypeError(
            f"Monitor reads muonkit's Muon and MuonW, got {type(optimizer).__name__}; of a wrapper "
            "give the optimizer inside"
        )
    if not any(
        group["algorithm"] == "muon" and any(matrices_of(group, p) for p in group["params"])
        for group in optimizer.param_groups
    ):
        raise ValueError(
            "the optimizer has no matrix that Muon trains, so there is nothing to monitor: "
            "print(muonkit.route(model)) says why AdamW has them all"
        )
    if optimizer in _MONITORED:
        raise ValueError(
            "the optimizer has a monitor already: close() it, or give that one several sinks, "
            "to=[...]"
        )
    numbers = [("every", every, 1, "steps"), ("start", start, 0, "steps")]
    if max_bytes is not None:
        numbers.append(("max_bytes", max_bytes, 1, "bytes, or None"))
    for name, value, least, unit in numbers:
        if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
            raise ValueError(f"{name} is a whole number of {unit}, at least {least}, got {value!r}")
    _check_names("spectra", spectra, KINDS, "() for none")
    if fields is not None:
        _check_names("fields", fields, FIELDS, "None for all")


def _check_names(what: str, given: Any, known: Sequence[str], otherwise: str) -> None:
    if isinstance(given, str):
        listed = ", ".join(map(repr, known))
        raise ValueError(f"{what} is a list of {listed}, or {otherwise}, got {given!r}")
    for name in given:
        if name not in known:
            raise ValueError(unknown(f"name in {what}", name, known, f", or {what} is {otherwise}"))


def _refuse_meta(optimizer: Muon) -> None:
    for group in optimizer.param_groups:
        for name, p in zip(parameter_names(group), group["params"], strict=True):
            if p.is_meta and p.grad is not None:
                raise RuntimeError(
                    f"the monitor was to measure this step, but {shown(name)} is on the meta "
                    "device, where there are no numbers: close() the monitor for a dry run, or "
                    "give the model memory first, model.to_empty(device=...)"
                )


# Optimizers that have a monitor.
_MONITORED: weakref.WeakSet[Muon] = weakref.WeakSet()
