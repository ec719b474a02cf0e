"""The orthogonalizer's laws (docs/design.md), over every schedule, form and dtype.

float64 is the judge throughout: the exact result is U p(S) V^T with the singular value
decomposition and the polynomials evaluated in float64.
"""

from __future__ import annotations

import itertools
import types
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from muonkit import Muon, _torch, orthogonalize
from muonkit._torch import cpu_capabilities
from muonkit.newton_schulz import orthogonalizer
from muonkit.newton_schulz.coefficients import SCHEDULES, resolve
from muonkit.newton_schulz.forms import FORMS
from muonkit.newton_schulz.orthogonalizer import NS_DTYPES, Choice, choose, resolve_dtype
from tests.helpers import internals

# Every schedule with every form, dtype and shape is 1,900 cases: see tests/helpers/sampling.py.
pytestmark = pytest.mark.sampled

NAMES = [*SCHEDULES, "svd"]
# Relative error (Frobenius) of one orthogonalization against float64 on well-conditioned input.
# fp32: 5 iterations of products with unit round-off 6e-8, amplified by slopes up to 8 per step.
# bf16: unit round-off 2^-8 = .004, fp16: 2^-11 = .0005, same amplification (docs/performance.md
# has .015 and .0019 on a power law).
TOLERANCE = {
    torch.float64: 1e-11,
    torch.float32: 2e-5,
    torch.float16: 2e-2,
    torch.bfloat16: 1.2e-1,
}
# The Gram form's share of it: within a segment rounding errors grow up to the limits in
# muonkit.newton_schulz.forms, which were chosen so that it is at most this many times off as far.
GRAM = {torch.float64: 25, torch.float32: 25, torch.float16: 2, torch.bfloat16: 2}
BALANCED = {name for name in NAMES if resolve(name).balanced}
STRICT = {name for name in NAMES if resolve(name).strict}
IMPLEMENTATIONS = [
    (name, form, dtype)
    for name, form, dtype in itertools.product(NAMES, FORMS, NS_DTYPES.values())
    if not (name in STRICT and dtype.itemsize == 2)  # refused: they diverge
]


def implementation_id(case: tuple[str, str, torch.dtype]) -> str:
    return f"{case[0]}-{case[1]}-{str(case[2]).removeprefix('torch.')}"


every_implementation = pytest.mark.parametrize(
    ("name", "form", "dtype"), IMPLEMENTATIONS, ids=map(implementation_id, IMPLEMENTATIONS)
)


def tolerance(form: str, dtype: torch.dtype) -> float:
    return TOLERANCE[dtype] * (GRAM[dtype] if form == "gram" else 1)


def apply(G: torch.Tensor, name: str, form: str, dtype: torch.dtype) -> torch.Tensor:
    return orthogonalize(G, ns_coefficients=name, ns_form=form, ns_dtype=dtype)


def random_matrix(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def with_spectrum(spectrum: torch.Tensor, cols: int, seed: int = 0) -> torch.Tensor:
    m = len(spectrum)
    U = torch.linalg.qr(random_matrix(m, m, seed=seed, dtype=torch.float64))[0]
    V = torch.linalg.qr(random_matrix(cols, m, seed=seed + 1, dtype=torch.float64))[0]
    return (U * spectrum.double()) @ V.mT


def exact(G: torch.Tensor, name: str, strict_eps: float = 0.0) -> torch.Tensor:
    """U p(S) V^T in float64."""
    iterations = resolve(name)
    U, S, Vh = torch.linalg.svd(G.double(), full_matrices=False)
    if iterations.exact:
        return U @ Vh
    if iterations.balanced:
        U, S, Vh = torch.linalg.svd(balanced(G), full_matrices=False)
        return (U * polynomial(S, name)) @ Vh
    margin = iterations.margin * (1 + (4 * strict_eps if iterations.strict else 0))
    return (U * polynomial(S / (S.norm() * margin), name)) @ Vh


def polynomial(s: torch.Tensor, name: str) -> torch.Tensor:
    for a, b, c in resolve(name).triples:
        s = a * s + b * s**3 + c * s**5
    return s


def balanced(G: torch.Tensor) -> torch.Tensor:
    """AOL in float64, as published: rows of the shorter side over √(Σ_j |XX^T|_ij)."""
    X = G.double() / G.double().norm()
    X = X.mT if G.shape[0] > G.shape[1] else X
    X = X / (X @ X.mT).abs().sum(1, keepdim=True).sqrt()
    return X.mT if G.shape[0] > G.shape[1] else X


def distance(X: torch.Tensor, Y: torch.Tensor) -> float:
    return ((X.double() - Y.double()).norm() / Y.double().norm()).item()


@pytest.mark.sampled(4)  # whole: schedule, form, dtype and shape
@every_implementation
@pytest.mark.parametrize("shape", [(24, 24), (16, 48), (48, 16)])
def test_equals_the_exact_polynomial(
    name: str, form: str, dtype: torch.dtype, shape: tuple[int, int]
) -> None:
    G = random_matrix(*shape, dtype=torch.float64)
    expected = exact(G, name, torch.finfo(dtype).eps)
    limit = tolerance(form, dtype)
    if name == "svd" and dtype.itemsize == 2:
        # The input is rounded to 16 bits; the smallest singular values feel that most.
        limit *= 2
    if name in STRICT:
        # Slopes at the interval's ends are up to 20 times those inside.
        limit *= 20
    assert distance(apply(G, name, form, dtype), expected) < limit


@every_implementation
def test_pitfall_3_the_input_is_untouched(name: str, form: str, dtype: torch.dtype) -> None:
    for given_dtype in (torch.float32, dtype):
        for shape in ((12, 20), (20, 12), (2, 12, 12)):
            G = random_matrix(*shape, dtype=given_dtype)
            before, version = G.clone(), G._version
            apply(G, name, form, dtype)
            assert torch.equal(G, before)
            assert G._version == version


@every_implementation
@pytest.mark.parametrize("shape", [(24, 24), (16, 40)])
def test_transpose_commutes(
    name: str, form: str, dtype: torch.dtype, shape: tuple[int, int]
) -> None:
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    if name in BALANCED and shape[0] == shape[1]:
        shape = (24, 25)  # of a square matrix the rows as given are weighed, not the columns
    G = random_matrix(*shape, dtype=wide)
    one, other = apply(G.mT, name, form, dtype), apply(G, name, form, dtype).mT
    # Not to the bit: a transposed operand is summed in another order.
    assert distance(one, other) < 2 * tolerance(form, dtype)


@every_implementation
@pytest.mark.parametrize("alpha", [1e-30, 1e-12, 1e-3, 1e19, 1e30])
def test_pitfall_2_scale_does_not_matter(
    name: str, form: str, dtype: torch.dtype, alpha: float
) -> None:
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    G = random_matrix(32, 32, dtype=wide)  # alpha * G is rounded to its dtype
    one, other = apply(alpha * G, name, form, dtype), apply(G, name, form, dtype)
    assert distance(one, other) < tolerance(form, dtype)
    assert one.norm() > 0.5 * 32**0.5


@every_implementation
def test_zero_gives_zero(name: str, form: str, dtype: torch.dtype) -> None:
    assert torch.equal(apply(torch.zeros(6, 9), name, form, dtype), torch.zeros(6, 9))
    # ... also beside others in a batch, which it does not disturb.
    G = random_matrix(3, 8, 8)
    G[1] = 0
    O = apply(G, name, form, dtype)
    assert torch.equal(O[1], torch.zeros(8, 8))
    assert torch.equal(O[2], apply(G[2:], name, form, dtype)[0])


@every_implementation
def test_pitfall_5_a_batch_equals_a_loop(name: str, form: str, dtype: torch.dtype) -> None:
    G = random_matrix(2, 3, 10, 14) * torch.tensor([1e-6, 1.0, 1e6])[:, None, None]
    batch = apply(G, name, form, dtype)
    loop = torch.stack([torch.stack([apply(M, name, form, dtype) for M in row]) for row in G])
    assert batch.shape == G.shape
    # Batched products may sum in another order than single ones.
    assert distance(batch, loop) < tolerance(form, dtype)


@every_implementation
def test_singular_values_land_in_the_declared_band(
    name: str, form: str, dtype: torch.dtype
) -> None:
    if dtype.itemsize == 2:
        # Rounding to 16 bits adds singular values of its own size below 4e-3 * norm.
        spectrum, slack = torch.linspace(0.05, 1.0, 24), 0.06
    else:
        spectrum, slack = torch.logspace(-2.4, 0, 24), 1e-4
    assert (spectrum / spectrum.norm()).min() > 1e-3
    O = apply(with_spectrum(spectrum, 40).float(), name, form, dtype)
    values = torch.linalg.svdvals(O.double())
    low, high = (1.0, 1.0) if name == "svd" else SCHEDULES[name].band
    assert low - slack <= values.min()
    assert values.max() <= high + slack


def _degenerate() -> dict[str, torch.Tensor]:
    m, n = 32, 64
    half = torch.cat([torch.ones(m // 2), torch.zeros(m // 2)])
    zero_rows = random_matrix(m, n)
    zero_rows[::2] = 0
    return {
        "ones": torch.ones(m, n),
        "rank 1": random_matrix(m, 1) @ random_matrix(1, n, seed=1),
        "one entry": torch.zeros(m, n).index_put(
            (torch.tensor(3), torch.tensor(5)), torch.tensor(-2.0)
        ),
        "rank m/2": with_spectrum(half, n).float(),
        "power law": with_spectrum(1 / torch.arange(1, m + 1), n).float(),
        "steep": with_spectrum(torch.logspace(0, -12, m), n).float(),
        "zero rows": zero_rows,
        "identity": torch.eye(m),
        "one row": random_matrix(1, n),
        "one column": random_matrix(n, 1),
        "1 x 1": torch.tensor([[-3.0]]),
    }


@every_implementation
@pytest.mark.parametrize("kind", _degenerate())
def test_pitfall_7_nothing_exceeds_one_and_a_half(
    name: str, form: str, dtype: torch.dtype, kind: str
) -> None:
    O = apply(_degenerate()[kind], name, form, dtype)
    assert O.isfinite().all()
    assert torch.linalg.matrix_norm(O.double(), 2) < 1.5


@given(
    shape=st.tuples(st.integers(0, 3), st.integers(1, 9), st.integers(1, 9)),
    exponents=st.lists(st.integers(-44, 38), min_size=1, max_size=5),
    case=st.sampled_from(IMPLEMENTATIONS),
    given_dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]),
    transposed=st.booleans(),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=200)
def test_finite_in_finite_out(
    shape: tuple[int, int, int],
    exponents: list[int],
    case: tuple[str, str, torch.dtype],
    given_dtype: torch.dtype,
    transposed: bool,
    seed: int,
) -> None:
    """Any strides, magnitudes from subnormal to the largest, mixed in one matrix."""
    G = random_matrix(*shape, seed=seed, dtype=torch.float64)
    powers = torch.tensor([10.0**e for e in exponents], dtype=torch.float64)
    G = G * powers[torch.arange(G.numel()) % len(powers)].reshape(G.shape)
    G = G.clamp(-torch.finfo(given_dtype).max, torch.finfo(given_dtype).max).to(given_dtype)
    G = G.mT if transposed else G
    O = apply(G, *case)
    assert O.shape == G.shape
    assert O.dtype == G.dtype
    assert O.isfinite().all()
    if G.numel():
        assert torch.linalg.matrix_norm(O.double(), 2).max() < 1.5


def test_a_schedule_without_safety_factor_is_refused_in_16_bits() -> None:
    G = random_matrix(24, 24)
    assert STRICT == {"polar_express", "cans"}
    for name in STRICT:
        for dtype in ("bfloat16", torch.float16):
            with pytest.raises(ValueError, match=r"no safety factor.*polar_express_1\.05"):
                orthogonalize(G, ns_coefficients=name, ns_dtype=dtype)


@every_implementation
def test_a_nan_stays_in_its_matrix(name: str, form: str, dtype: torch.dtype) -> None:
    G = random_matrix(3, 6, 6)
    G[1, 2, 3] = float("nan")
    O = apply(G, name, form, dtype)
    assert O[1].isnan().any()
    assert O[0].isfinite().all()
    assert O[2].isfinite().all()


LAYOUTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "contiguous": lambda G: G.clone(),
    "transposed": lambda G: G.mT.contiguous().mT,
    "rows apart": lambda G: torch.nn.functional.pad(G, (0, 3))[..., :-3],
    "matrices apart": lambda G: torch.stack((G, G), dim=1)[:, 0],
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_norm_is_the_same_beside_any_others_to_the_bit(
    layout: Callable[[torch.Tensor], torch.Tensor], dtype: torch.dtype
) -> None:
    G = random_matrix(6, 60, 70, dtype=torch.float64)
    G = G / G.abs().amax(dim=(1, 2), keepdim=True)
    limits = torch.finfo(dtype)
    scales = torch.tensor([1, limits.max, limits.tiny * 2, 0, 1e-3, torch.nan]).double()
    G = (G * scales[:, None, None]).to(dtype)
    normalized = [
        internals.normalize(layout(some), looks=True).clone() for some in (G, *G.split(1))
    ]
    for several, alone in zip(normalized[0], normalized[1:], strict=True):
        assert torch.equal(several.nan_to_num(9), alone[0].nan_to_num(9))


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_a_norm_is_as_exact_in_any_layout(
    layout: Callable[[torch.Tensor], torch.Tensor],
) -> None:
    """Sums of sums: each of 1,024 squares is off by some roundings (6e-8), their sum likewise. Of a
    million squares torch's one long sum is off by 1e-5, or 2e-4 where rows lie apart.
    """
    G = layout(random_matrix(2, 1024, 1024))
    for scale, looks in ((1.0, True), (1e30, True), (1e-21, True), (1.0, False)):
        normalized = internals.normalize(G * scale, looks=looks)
        norm = torch.linalg.vector_norm(normalized.double(), dim=(1, 2))
        assert (norm - 1).abs().max() < 1e-6


@pytest.mark.parametrize("name", NAMES)
def test_it_is_traced_whole(name: str) -> None:
    """Outside of an operation that is opaque to torch, nothing asks for a value of the matrix."""
    G = random_matrix(3, 4, 6) * 1e25
    torch._dynamo.reset()  # which counts the compilations of one line
    compiled = torch.compile(
        lambda X: orthogonalize(X, ns_coefficients=name), backend="eager", fullgraph=True
    )
    assert torch.equal(compiled(G), orthogonalize(G, ns_coefficients=name))
    with FakeTensorMode() as mode:
        assert orthogonalize(mode.from_tensor(G), ns_coefficients=name).shape == G.shape


@pytest.mark.parametrize("name", NAMES)
def test_gradients_flow_through(name: str) -> None:
    G = random_matrix(3, 5, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x: orthogonalize(x, ns_coefficients=name, ns_dtype="float64"), (G,)
    )


def test_pitfall_8_svd_is_svd_for_every_shape() -> None:
    for shape in ((7, 7), (5, 11), (11, 5), (2, 5, 11)):
        G = random_matrix(*shape)
        U, _, Vh = torch.linalg.svd(G, full_matrices=False)
        assert distance(orthogonalize(G, ns_coefficients="svd"), U @ Vh) < 1e-5


@pytest.mark.usefixtures("_fresh_hardware_answers")
def test_pitfall_8_svd_is_exact_on_bf16_hardware(monkeypatch: pytest.MonkeyPatch) -> None:
    _pretend(monkeypatch, "amx_bf16")
    G = with_spectrum(1 / torch.arange(1, 33) ** 2, 64)
    for dtype in ("auto", "bfloat16"):
        O = orthogonalize(G.float(), ns_coefficients="svd", ns_dtype=dtype)
        assert distance(O, exact(G, "svd")) < 2e-4  # fp32 rounding over the smallest value, 1e-3


def test_a_strict_schedule_keeps_clear_of_its_edge() -> None:
    """The margin of the input: a rank-1 matrix, whose one singular value is its norm."""
    for name in STRICT:
        for seed in range(20):
            G = random_matrix(16, 1, seed=seed) @ random_matrix(1, 40, seed=seed + 100)
            O = orthogonalize(G, ns_coefficients=name, ns_dtype="float32", ns_steps=5)
            assert torch.linalg.matrix_norm(O.double(), 2) <= SCHEDULES[name].band[1] + 1e-3


@pytest.fixture
def _fresh_hardware_answers() -> Iterator[None]:
    internals.forget_hardware()
    yield
    internals.forget_hardware()


CPUS = {
    "AVX2": ({}, "float32", "no units for bfloat16"),
    "AVX-512": ({"avx512_bf16"}, "float32", "avx512_bf16 but no AMX"),
    "AMX": ({"amx_bf16", "avx512_bf16"}, "bfloat16", "AMX"),
    "Arm": ({"onednn_acl"}, "float32", "no units for bfloat16"),
    "Arm, BFMMLA": ({"arm_bf16", "onednn_acl"}, "bfloat16", "BFMMLA"),
    "Arm, BFMMLA, macOS": ({"arm_bf16"}, "float32", "no Arm Compute Library"),
}


@pytest.mark.usefixtures("_fresh_hardware_answers")
@pytest.mark.parametrize("cpu", CPUS)
def test_auto_is_what_a_cpu_multiplies_fastest(cpu: str, monkeypatch: pytest.MonkeyPatch) -> None:
    features, name, reason = CPUS[cpu]
    _pretend(monkeypatch, *features)
    _holds(torch.device("cpu"), getattr(torch, name))

    def told(rows: int, cols: int, asked: str = "auto") -> Choice:
        return choose("keller", 5, "auto", asked, torch.float32, torch.device("cpu"), rows, cols)

    large, dtype = told(96, 768), getattr(torch, name)
    assert (large.dtype, reason in large.dtype_reason) == (dtype, True), large
    for small in (told(95, 768), told(768, 95)):
        assert (small.dtype, reason in small.dtype_reason) == (
            torch.float32 if cpu == "AMX" else dtype,
            True,
        )
    # Where there are matrix units, cutting costs more than the FLOPs that it saves.
    assert told(2048, 2048, "float32").blocks == 16
    assert told(2048, 2048, "bfloat16").blocks == (1 if dtype == torch.bfloat16 else 16)


@pytest.mark.usefixtures("_fresh_hardware_answers")
def test_what_is_computed_is_what_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """The products of a CPU with AMX, by shape, eager and compiled."""
    _pretend(monkeypatch, "amx_bf16")

    for run in (orthogonalize, torch.compile(orthogonalize, backend="eager", dynamic=True)):
        for rows, cols in ((95, 130), (130, 95), (96, 130), (130, 96)):
            with _Asked() as asked:
                run(torch.randn(2, rows, cols))
            small = min(rows, cols) < 96
            assert asked.dtypes == [torch.float32 if small else torch.bfloat16]


@pytest.mark.usefixtures("_fresh_hardware_answers")
@pytest.mark.parametrize("options", [{}, {"fraction": 0.5}, {"after": "normuon"}], ids=str)
def test_a_matrix_is_not_rounded_by_its_companions(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a CPU with AMX a small one beside a large one is computed as it is alone."""
    _pretend(monkeypatch, "amx_bf16")
    # Small ones that would be padded to the batch of the large ones, and some that would not.
    shapes = ((64, 128), (128, 64), (80, 80), (16, 130), (128, 128), (100, 130), (96, 400))
    gradients = [torch.randn(*shape) for shape in shapes]

    def moved(some: list[Tensor]) -> list[Tensor]:
        params = [nn.Parameter(torch.zeros_like(g)) for g in some]
        for p, g in zip(params, some, strict=True):
            p.grad = g.clone()
        optimizer = Muon(params, lr=1.0, **options)
        with _Asked() as asked:
            optimizer.step()
        told = {row["ns_dtype"] for row in optimizer.describe()}
        assert {str(dtype) for dtype in asked.dtypes} == told
        return [p.detach() for p in params]

    for together, g in zip(moved(gradients), gradients, strict=True):
        (alone,) = moved([g])
        # In one dtype; what it is padded to changes the order of sums only.
        most = 1e-5 if min(g.shape) * options.get("fraction", 1.0) < 96 else 3e-2
        assert (together - alone).norm() <= most * alone.norm()


class _Asked(TorchDispatchMode):
    """The dtypes in which Newton-Schulz is asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: list[torch.dtype] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.muonkit.newton_schulz_.default:
            self.dtypes.append(args[4])
        return func(*args, **(kwargs or {}))


@pytest.mark.usefixtures("_fresh_hardware_answers")
@pytest.mark.parametrize(
    ("capability", "expected"),
    [((9, 0), torch.bfloat16), ((8, 0), torch.bfloat16), ((7, 5), torch.float32)],
)
def test_auto_is_what_a_gpu_multiplies_fastest(
    capability: tuple[int, int], expected: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    _holds(torch.device("cuda"), expected)


def _pretend(monkeypatch: pytest.MonkeyPatch, *features: str) -> None:
    """That this CPU has these, and no others of those that matter."""
    found = {name: name in features for name in cpu_capabilities()}
    internals.cpu_has(monkeypatch, found)


def _holds(where: torch.device, expected: torch.dtype) -> None:
    assert resolve_dtype("auto", torch.float32, where, small=False) == expected
    assert resolve_dtype("auto", torch.bfloat16, where, small=False) == expected
    assert resolve_dtype("auto", torch.float64, where, small=False) == torch.float64
    assert resolve_dtype("auto", torch.float32, where, small=False, strict=True) == torch.float32


def test_the_reason_for_a_dtype_is_told() -> None:
    cpu = torch.device("cpu")

    def told(
        ns_dtype: str, schedule: str = "keller", dtype: torch.dtype = torch.float32
    ) -> tuple[torch.dtype, str]:
        choice = choose(schedule, 5, "auto", ns_dtype, dtype, cpu, 8, 8)
        return choice.dtype, choice.dtype_reason

    assert told("float16") == (torch.float16, "given")
    assert told("auto", dtype=torch.float64) == (torch.float64, "auto: the input's")
    assert told("auto", "polar_express")[1].startswith("auto: the schedule has no safety factor")
    assert told("bfloat16", "svd")[1].startswith("svd:")


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
@pytest.mark.parametrize("young", [True, False])
def test_every_torch_is_asked_for_the_same(
    machine: str, young: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch.cpu.get_capabilities came with 2.11; before, other functions tell what is needed."""
    arm = machine == "aarch64"
    monkeypatch.setattr(_torch, "_MACHINE", machine)
    have = {"bf16": True} if arm else {"amx_bf16": True, "avx512_bf16": True}
    if young:
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: have, raising=False)
    else:
        monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: not arm)
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: not arm)
        packet = types.SimpleNamespace(
            _is_mkldnn_bf16_supported=lambda: True, _is_mkldnn_acl_supported=lambda: False
        )
        monkeypatch.setattr(torch.ops, "mkldnn", packet, raising=False)
    found = cpu_capabilities()
    assert found["onednn_acl"] is False  # of this build
    assert found["amx_bf16"] is not arm
    assert found["avx512_bf16"] is not arm
    assert found["arm_bf16"] is arm


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")
@pytest.mark.parametrize("name", ["ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"])
def test_amx_counts_where_onednn_may_use_it(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without, a product of 256 x 256 in bfloat16 took 85 times as long as in float32."""
    monkeypatch.setattr(_torch, "_MACHINE", "x86_64")
    have = {"amx_bf16": True, "avx512_bf16": True}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: have, raising=False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True, raising=False)
    for each in ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"):
        monkeypatch.delenv(each, raising=False)
    for limit, expected in (
        ("", True),
        ("default", True),
        ("AVX512_CORE_AMX", True),
        ("AVX10_1_512_AMX", True),
        ("AVX2", False),
        ("AVX512_CORE_BF16", False),
    ):
        monkeypatch.setenv(name, limit)
        assert cpu_capabilities()["amx_bf16"] is expected, limit
    monkeypatch.delenv(name)
    mkldnn: Any = torch.backends.mkldnn
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of TF32
        with mkldnn.flags(enabled=False):
            assert not cpu_capabilities()["amx_bf16"]
            assert cpu_capabilities()["amx_held_back"]


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")
@pytest.mark.usefixtures("_fresh_hardware_answers")
def test_auto_follows_onednn_when_it_is_switched(monkeypatch: pytest.MonkeyPatch) -> None:
    """With it off, AMX stands idle and a step of bfloat16 products takes 20 times as long."""
    monkeypatch.setattr(_torch, "_MACHINE", "x86_64")
    have = {"amx_bf16": True, "avx512_bf16": True}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: have, raising=False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True, raising=False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True, raising=False)
    for each in ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"):
        monkeypatch.delenv(each, raising=False)
    mkldnn: Any = torch.backends.mkldnn
    cpu = torch.device("cpu")

    def told() -> tuple[torch.dtype, str]:
        choice = choose("keller", 5, "auto", "auto", torch.float32, cpu, 256, 256)
        return choice.dtype, choice.dtype_reason

    for _ in range(2):
        assert told() == (torch.bfloat16, "auto: this CPU has AMX")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of TF32
            with mkldnn.flags(enabled=False):
                dtype, reason = told()
        assert dtype == torch.float32
        assert reason.startswith("auto: this CPU has AMX, but oneDNN may not use it")


def test_misuse_is_refused() -> None:
    G = random_matrix(4, 4)
    with pytest.raises(ValueError, match=r"shape \(4,\).*AdamW"):
        orthogonalize(G[0])
    for wrong in (
        torch.ones(3, 3, dtype=torch.int64),
        torch.ones(3, 3, dtype=torch.complex64),
        [1],
    ):
        with pytest.raises(TypeError, match="floating-point"):
            orthogonalize(wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="'auto', 'float64'"):
        orthogonalize(G, ns_dtype="float8")
    with pytest.raises(ValueError, match="'auto', 'standard', 'gram'"):
        orthogonalize(G, ns_form="grma")
    with pytest.raises(ValueError, match="polar_express"):
        orthogonalize(G, ns_coefficients="kellr")


def test_gram_in_bf16_keeps_a_out_of_what_it_rounds() -> None:
    ratios = []
    for seed in range(3):
        G = with_spectrum(1 / torch.arange(1.0, 65.0), 256, seed=seed).float()
        far = {
            form: distance(orthogonalize(G, ns_form=form, ns_dtype="bfloat16"), exact(G, "keller"))
            for form in ("standard", "gram")
        }
        ratios.append(far["gram"] / far["standard"])
    # Measured 1.1 to 1.2; with a rounded on the diagonal of P 1.3 to 1.45.
    assert max(ratios) < 1.25, ratios


@pytest.mark.parametrize("name", sorted(STRICT - {"svd"}))
def test_rounding_cannot_push_a_strict_schedules_input_above_one(name: str) -> None:
    for dtype in ("float32", "float64"):
        kind = getattr(torch, dtype)
        choice = choose(name, 5, "auto", dtype, kind, torch.device("cpu"), 8, 8)
        assert choice.margin >= 1 + 3 * torch.finfo(kind).eps


def test_float16_has_its_own_three_more_bits() -> None:
    """Not the error of bfloat16, which its tolerance above would let through."""
    G = torch.randn(64, 96, generator=torch.Generator().manual_seed(0))
    exact = orthogonalize(G.double())
    half, brain = (
        float((orthogonalize(G, ns_dtype=name) - exact).norm()) for name in ("float16", "bfloat16")
    )
    assert half < brain / 4


@every_implementation
@pytest.mark.parametrize("kind", ["rank 1", "one entry", "identity", "one row", "power law"])
def test_the_step_goes_the_way_of_the_momentum(
    name: str, form: str, dtype: torch.dtype, kind: str
) -> None:
    G = _degenerate()[kind]
    O = apply(G, name, form, dtype).double()
    # Of the nuclear norm, which is what the exact factor gets.
    assert (O * G).sum() >= 0.6 * torch.linalg.svdvals(G.double()).sum()


@pytest.mark.parametrize("shape", [(8, 24), (24, 8), (12, 12)])
def test_aol_is_differentiable_and_compiled_as_it_is(shape: tuple[int, int]) -> None:
    G = random_matrix(*shape, dtype=torch.float64).requires_grad_()
    with torch.no_grad():
        plain = orthogonalize(G, ns_coefficients="aol4", ns_dtype="float64")
    O = orthogonalize(G, ns_coefficients="aol4", ns_dtype="float64")
    torch.testing.assert_close(O, plain, rtol=1e-10, atol=1e-12)
    assert torch.autograd.gradcheck(
        lambda X: orthogonalize(X, ns_coefficients="aol4", ns_dtype="float64"), (G,)
    )


@pytest.mark.parametrize(
    ("shape", "power", "aol", "keller"),
    [
        ((128, 512), 0, 0.02, 0.22),
        ((128, 512), 1, 0.17, 0.20),
        ((256, 256), 0, 0.08, 0.21),
        ((256, 256), 1, 0.27, 0.18),
    ],
)
def test_how_far_aol_is_from_the_exact_factor(
    shape: tuple[int, int], power: int, aol: float, keller: float
) -> None:
    """The figures of docs/choosing.md; another random matrix differs in the second digit."""
    m, n = shape
    G = random_matrix(m, n, dtype=torch.float64)
    U, _, Vh = torch.linalg.svd(G, full_matrices=False)
    if power:
        G = (U / torch.arange(1, m + 1, dtype=torch.float64)) @ Vh
    for name, said in (("aol4", aol), ("keller", keller)):
        O = orthogonalize(G, ns_coefficients=name, ns_dtype="float64")
        assert distance(O, U @ Vh) == pytest.approx(said, abs=0.015)


def test_aol_takes_no_product_of_its_own() -> None:
    cpu = torch.device("cpu")
    common = 5, "auto", "float32", torch.float32, cpu, 768, 3072
    four = SCHEDULES["you"].table[1:]
    assert choose("aol4", *common).flops == choose(four, *common).flops
    assert choose("aol4", *common).flops < 0.9 * choose("keller", *common).flops


@pytest.mark.parametrize("name", ["keller", "polar_express_1.05", "aol4"])
@pytest.mark.parametrize("shape", [(1, 32, 32), (3, 5, 30), (2, 18, 12), (4, 1, 7)])
def test_the_loop_of_small_matrices_is_the_general_one_to_the_bit(
    name: str, shape: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    X = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    X /= torch.linalg.matrix_norm(X, keepdim=True)
    triples = resolve(name, 5 if name != "aol4" else 4).triples
    small = orthogonalizer._evaluate(X.clone(), triples, "standard")
    seen = []
    monkeypatch.setattr(orthogonalizer, "_by_iteration", lambda *_: seen.append(True))
    monkeypatch.setattr(orthogonalizer, "is_kept", lambda *_: True)  # as if it were large
    general = orthogonalizer._evaluate(X.clone(), triples, "standard", differentiable=True)
    assert not seen
    assert torch.equal(small, general)
