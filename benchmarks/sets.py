"""The parameter sets that the benchmarks step over, and what their orthogonalization costs.

Hidden matrices only, in the shapes that the named models have. The weights do not come from a
training: the time of a step does not depend on them.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from muonkit import View
from muonkit.newton_schulz.coefficients import KELLER
from muonkit.newton_schulz.forms import FORMS, product_flops

STEPS = 5  # iterations, in every count below
KELLER_STEPS = (KELLER,) * STEPS


class Entry(NamedTuple):
    """One parameter: its stored shape and its view (see `muonkit.View`)."""

    shape: tuple[int, ...]
    view: str = "matrix"


def gpt(layers: int, d: int) -> list[Entry]:
    """Fused QKV, attention output, MLP up and down; every fused matrix as one, as peers take it."""
    return [Entry(s) for s in ((3 * d, d), (d, d), (4 * d, d), (d, 4 * d))] * layers


def llama(layers: int, d: int, kv: int, ffn: int) -> list[Entry]:
    """q, k, v and o with grouped keys and values; gate, up and down."""
    shapes = ((d, d), (kv, d), (kv, d), (d, d), (ffn, d), (ffn, d), (d, ffn))
    return [Entry(s) for s in shapes] * layers


def resnet20() -> list[Entry]:
    """The 18 hidden 3 x 3 convolutions of the CIFAR ResNet-20 (shortcuts without weights)."""
    convs, inputs = [], 16
    for width in (16, 32, 64):
        for _ in range(6):
            convs.append(Entry((width, inputs, 3, 3), "flatten"))
            inputs = width
    return convs


def moe(layers: int, experts: int, d: int, ffn: int) -> list[Entry]:
    """Gate, up and down of every layer, all experts of one in one parameter."""
    shapes = ((experts, ffn, d), (experts, ffn, d), (experts, d, ffn))
    return [Entry(s, "experts") for s in shapes] * layers


SETS: dict[str, list[Entry]] = {
    "gpt2-small": gpt(12, 768),
    "llama": llama(4, 1024, 256, 2752),  # ffn / d = 2.7
    "llama-1b": llama(4, 2048, 512, 8192),  # 4 of its 16 layers
    "vit-tiny": gpt(12, 192),  # timm's vit_tiny_patch16_224 has a GPT's hidden shapes
    "resnet-20": resnet20(),
    "4096": [Entry((4096, 4096))],
    "moe": moe(2, 8, 512, 1408),
    "gpt-12x128": gpt(12, 128),
    "gpt-2x384": gpt(2, 384),
    "one-layer-768": gpt(1, 768),
    "digits": [Entry((128, 64)), Entry((128, 128))],  # the lab's MLP
    "one-32x32": [Entry((32, 32))],
}

# For the tests: every view, and a second of work.
TINY: dict[str, list[Entry]] = {
    "tiny": [
        *gpt(1, 16),
        Entry((8, 4, 3, 3), "flatten"),
        Entry((2, 24, 16), "experts"),
    ]
}


def matrices(entries: Iterable[Entry]) -> list[tuple[int, int]]:
    """(rows, cols) of every matrix of the set."""
    return [
        (block.rows, block.cols)
        for shape, view in entries
        for block in View.parse(view).blocks(shape)
        for _ in range(block.batch)
    ]


def standard_flops(entries: Iterable[Entry]) -> int:
    """FLOPs of the usual loop, all products general: (20 alpha + 10) m^3 for each m x n."""
    total = 0
    for rows, cols in matrices(entries):
        m, n = sorted((rows, cols))
        total += 20 * m * m * n + 10 * m**3
    return total


def cheapest_flops(entries: Iterable[Entry]) -> int:
    """FLOPs of the cheapest form of the same polynomial, symmetric products at half cost.

    For each m x n matrix with m <= n = alpha m the lesser of standard, (15 alpha + 5) m^3, and gram
    with the one restart that float32 needs, (6 alpha + 14) m^3.
    """
    total = 0
    for rows, cols in matrices(entries):
        m, n = sorted((rows, cols))
        restarts = (form(KELLER_STEPS, torch.float32.itemsize) for form in FORMS.values())
        total += min(product_flops(m, n, KELLER_STEPS, r, blocks=math.inf) for r in restarts)
    return total


class Workload:
    """Weights and gradients of one set; every implementation steps on the same memory."""

    def __init__(self, entries: list[Entry], seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.entries = entries
        self.weights = [torch.randn(e.shape, generator=generator) * 0.02 for e in entries]
        self.gradients = [torch.randn(e.shape, generator=generator) for e in entries]
        self._given = [g.clone() for g in self.gradients]

    def parameters(self, views: Collection[str]) -> list[tuple[nn.Parameter, str]]:
        """New parameters with gradients, on the shared memory, each with its view.

        A parameter whose view is not among `views` comes as its matrices: a convolution flattened
        to 2-D, a stack of experts one by one.
        """
        parameters = []
        for entry, weight, gradient in zip(self.entries, self.weights, self.gradients, strict=True):
            if entry.view in views:
                pairs, view = [(weight, gradient)], entry.view
            else:
                pairs, view = _pieces(weight, gradient, entry), "matrix"
            for w, g in pairs:
                parameter = nn.Parameter(w)
                parameter.grad = g
                parameters.append((parameter, view))
        return parameters

    def gradients_changed(self) -> bool:
        """Whether somebody wrote to the gradients since they were last restored."""
        pairs = zip(self.gradients, self._given, strict=True)
        return not all(torch.equal(now, given) for now, given in pairs)

    def restore_gradients(self) -> None:
        torch._foreach_copy_(self.gradients, self._given)


def _pieces(weight: Tensor, gradient: Tensor, entry: Entry) -> list[tuple[Tensor, Tensor]]:
    (block,) = View.parse(entry.view).blocks(entry.shape)
    return list(zip(block.to_matrices(weight), block.to_matrices(gradient), strict=True))
