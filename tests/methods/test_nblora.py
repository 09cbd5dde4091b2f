"""NB-LoRA's bounds under every parameter, what lies within them, and the rounding they survive."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rankwise.errors import ArgumentError
from rankwise.methods.nblora import NbLora
from rankwise.methods.stack import Size
from rankwise.update import Factors

Tensors = dict[str, Tensor]
VECTOR = [0.7, 0.05, 0.2, 0.0]
FORMS = ("joint", "svd")
BOUNDS: dict[str, dict[str, Any]] = {
    "spectral": {},
    "frobenius": {"norm": "frobenius"},
    "nuclear": {"norm": "nuclear"},
    "schatten 3.5": {"norm": 3.5},
    "even nuclear": {"norm": "nuclear", "learn_split": False},
    "vector": {"singular_value_bounds": VECTOR},
}
EVERY_FORM = pytest.mark.parametrize("form", FORMS)
EVERY_BOUND = pytest.mark.parametrize("fields", BOUNDS.values(), ids=list(BOUNDS))
EXPONENTS = {"spectral": math.inf, "frobenius": 2.0, "nuclear": 1.0}


def made(form: str, **fields: Any) -> NbLora:
    method = NbLora(**{"r": 4, "parameterization": form, "bound": 0.3, "bound_relative_to_weight": False} | fields)
    method.check()
    return method


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def started(method: NbLora, size: Size, *, zero: bool = True, weight: Tensor | None = None) -> Tensors:
    """A layer's tensors as the adapter holds them after the start."""
    base = torch.ones(size.out, size.into) if weight is None else weight
    tensors = {name: torch.zeros(slot.shape) for name, slot in method.slots(size).items()}
    found = method.start(size, lambda: base, zero=zero)
    assert found.keys() <= tensors.keys()
    assert all(found[name].shape == t.shape for name, t in tensors.items() if name in found)
    return tensors | found


def dense(factors: Factors) -> Tensor:
    """The update of the factors as given, multiplied in float64."""
    return Factors(*(t.detach().double() for t in factors)).delta()


def excess(method: NbLora, t: Tensors) -> float:
    """How far the update is above its bounds, as a share of them: at most rounding for a right update."""
    delta = dense(method.factors(t, 1.0))
    assert delta.isfinite().all()
    sigma = torch.linalg.svdvals(delta)[..., : method.r]
    if method.singular_value_bounds is not None:
        allowed = torch.tensor(sorted(method.singular_value_bounds, reverse=True)).double()[: sigma.shape[-1]]
        tiny = 1e-12 * allowed.max()  # what a bound of 0 leaves: rounding of the decomposition
        return float(((sigma - tiny) / (allowed + 1e-300)).where(sigma > tiny, 0).max()) - 1
    p = EXPONENTS[method.norm] if isinstance(method.norm, str) else method.norm
    return float((torch.linalg.vector_norm(sigma, p, dim=-1) / t["delta"].double().squeeze(-1)).max()) - 1


# --- the bound ------------------------------------------------------------------------------------------------------


def hostile(shape: tuple[int, ...], kind: str, seed: int) -> Tensor:
    """A free matrix of one kind; `shape` has the rank first."""
    G = random(*shape, seed=seed)
    match kind:
        case "collinear":
            return G[:1].expand(shape).clone()
        case "nearly collinear":
            return G[:1] + 1e-3 * G
        case "low rank":
            return random(shape[0], len(G[:2]), seed=seed + 1) @ G[:2]
        case "zero":
            return torch.zeros(shape, dtype=torch.float64)
        case "graded":
            return G * torch.logspace(-4, 4, shape[0], dtype=torch.float64)[:, None]
        case _:
            return G


KINDS = ("random", "collinear", "nearly collinear", "low rank", "zero", "graded")


def parameters(method: NbLora, size: Size, kinds: tuple[str, str], scales: tuple[float, float], seed: int) -> Tensors:
    """Hostile free matrices, and v and z of the first one's scale."""
    t = started(method, size)
    matrices = [name for name in t if name.endswith("_free")]
    for i, (name, kind, scale) in enumerate(zip(matrices, kinds, scales, strict=True)):
        upright = name in ("U_free", "V_free")
        shape = t[name].T.shape if upright else t[name].shape
        value = (scale * hostile(tuple(shape), kind, seed + i)).float()
        t[name] = value.T.contiguous() if upright else value
    for name in t.keys() & {"v", "z"}:
        t[name] = (scales[0] * random(size.r, seed=seed + 7)).float()
    return t


@EVERY_BOUND
@EVERY_FORM
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_hostile_parameters_stay_within_the_bound(form: str, fields: dict[str, Any], dtype: torch.dtype) -> None:
    method, reached = made(form, **fields), 0.0
    for size in (Size(30, 20, 4), Size(4, 9, 4)):
        layers = [
            parameters(method, size, kinds, (scale, scale), seed=3)
            for kinds in itertools.product(KINDS, KINDS)
            for scale in (1e-6, 1e-3, 1.0, 1e2, 1e4, 1e6)
        ]
        t = {name: torch.stack([layer[name] for layer in layers]) for name in layers[0]}
        t = {name: x.to(dtype) if name.endswith("_free") else x for name, x in t.items()}
        above = excess(method, t)
        assert above <= 1e-6
        reached = max(reached, 1 + above)
    if fields != BOUNDS["even nuclear"]:  # whose bound only a full-rank update of equal singular values reaches
        assert reached > 0.5


@settings(max_examples=150, deadline=None)
@given(
    form=st.sampled_from(FORMS),
    bound=st.sampled_from(list(BOUNDS)),
    out=st.integers(1, 12),
    into=st.integers(1, 12),
    kinds=st.tuples(st.sampled_from(KINDS), st.sampled_from(KINDS)),
    exponents=st.tuples(st.integers(-6, 6), st.integers(-6, 6)),
    low=st.booleans(),
    seed=st.integers(0, 10**6),
)
def test_every_shape_and_scale_stays_within_the_bound(
    form: str,
    bound: str,
    out: int,
    into: int,
    kinds: tuple[str, str],
    exponents: tuple[int, int],
    low: bool,
    seed: int,
) -> None:
    """Clamped ranks, square and thin layers, free matrices of different sizes."""
    method = made(form, **BOUNDS[bound])
    size = Size(out, into, min(4, out, into))
    t = parameters(method, size, kinds, (10.0 ** exponents[0], 10.0 ** exponents[1]), seed)
    if low:
        t = {name: x.bfloat16() if name.endswith("_free") else x for name, x in t.items()}
    assert excess(method, t) <= 1e-6


@EVERY_FORM
def test_a_learnt_split_bounds_each_singular_value_in_any_order(form: str) -> None:
    method = made(form, norm="nuclear")
    for seed in range(40):
        t = parameters(method, Size(9, 7, 4), ("random", "random"), (1.0, 1.0), seed)
        bounds = (t["delta"] * t["z"].abs() / t["z"].abs().sum()).double()
        sigma = torch.linalg.svdvals(dense(method.factors(t, 1.0)))[:4]
        assert (sigma <= bounds.sort(descending=True).values * (1 + 1e-6)).all()


@EVERY_FORM
@pytest.mark.parametrize("fields", [BOUNDS["spectral"], BOUNDS["nuclear"]], ids=["spectral", "nuclear"])
def test_thousands_of_large_random_steps_stay_within_the_bound(form: str, fields: dict[str, Any]) -> None:
    """SGD of random losses at rates that no one would use, on four layers at once: 4,800 steps."""
    generator = torch.Generator().manual_seed(5)
    method, size = made(form, **fields), Size(11, 8, 4)
    t = {name: torch.stack([x] * 4) for name, x in started(method, size, zero=False).items()}
    trained = [name for name, slot in method.slots(size).items() if slot.trained]
    leaves = [t[name].requires_grad_() for name in trained]
    optimizer = torch.optim.SGD(leaves, lr=1.0)
    first = dense(method.factors(t, 1.0))
    for step in range(1200):
        noise = torch.randn(4, 11, 8, generator=generator)
        optimizer.param_groups[0]["lr"] = 10.0 ** (4 * math.sin(step / 50))
        optimizer.zero_grad()
        (method.factors(t, 1.0).delta() * noise).sum().backward()
        optimizer.step()
        if step % 40 == 39:
            assert excess(method, t) <= 1e-6
    assert all(leaf.isfinite().all() for leaf in leaves)
    assert max(float(leaf.detach().abs().max()) for leaf in leaves) > 20
    assert (dense(method.factors(t, 1.0)) - first).norm() > 0.1 * first.norm()


# --- rounding -------------------------------------------------------------------------------------------------------


@EVERY_FORM
def test_bfloat16_factors_alone_would_exceed_the_bound(form: str) -> None:
    """What the division by λ is for: the factors themselves, rounded, are longer than orthonormal."""
    method, size = made(form, r=3, bound=1.0), Size(7, 6, 3)
    whole, broken = 2.0 if form == "joint" else 1.0, 0
    for seed in range(30):
        t = reaching(method, size, random(7, 6, seed=seed), torch.ones(3, dtype=torch.float64))
        t = {name: x.bfloat16() if name.endswith("_free") else x for name, x in t.items()}
        B, s, A = method.factors(t, 1.0)
        assert B.dtype == A.dtype == torch.bfloat16
        assert s.dtype == torch.float32
        broken += bool(torch.linalg.matrix_norm(dense(Factors(B, whole * s.sign(), A)), 2) > 1 + 1e-3)
        assert torch.linalg.matrix_norm(dense(Factors(B, s, A)), 2) <= 1 + 1e-6
        grams = [A.double() @ A.double().T, B.double().T @ B.double()]
        if form == "joint":
            divisor = 1 + (grams[0] + grams[1] - torch.eye(3)).norm()
        else:
            divisor = ((1 + (grams[0] - torch.eye(3)).norm()) * (1 + (grams[1] - torch.eye(3)).norm())).sqrt()
        torch.testing.assert_close(s.abs().double(), (whole / divisor).expand(3), rtol=1e-6, atol=0)
        assert divisor < 1.03
    assert broken > 5


@EVERY_FORM
def test_float32_costs_less_than_a_millionth_of_the_bound(form: str) -> None:
    method, size = made(form, r=3, bound=1.0), Size(40, 30, 3)
    t = reaching(method, size, random(40, 30), torch.ones(3, dtype=torch.float64))
    t = {name: x.float() for name, x in t.items()}
    assert -1e-6 < excess(method, t) <= 1e-6


@EVERY_FORM
@EVERY_BOUND
def test_autocast_compilation_and_stacks_change_nothing(form: str, fields: dict[str, Any]) -> None:
    method, size = made(form, **fields), Size(30, 20, 4)
    layers = [started(method, size, zero=False) for _ in range(3)]
    alone = [method.factors(t, 1.0) for t in layers]
    with torch.autocast("cpu", torch.bfloat16):
        for t, expected in zip(layers, alone, strict=True):
            assert all(torch.equal(x, y) for x, y in zip(method.factors(t, 1.0), expected, strict=True))
    stacked = method.factors({name: torch.stack([t[name] for t in layers]) for name in layers[0]}, 1.0)
    for i, expected in enumerate(alone):
        assert all(torch.equal(x[i], y) for x, y in zip(stacked, expected, strict=True))
    torch._dynamo.reset()
    compiled: Any = torch.compile(method.factors, backend="eager", fullgraph=True)
    assert all(torch.equal(x, y) for x, y in zip(compiled(layers[0], 1.0), alone[0], strict=True))


# --- completeness ---------------------------------------------------------------------------------------------------


def inverse_cayley(Q: Tensor) -> tuple[Tensor, Tensor]:
    """Column signs d and G with cayley(G) = Q·diag(d): the signs keep Q off the set that the transform misses."""
    r = Q.shape[1]
    eye = torch.eye(r, dtype=Q.dtype)
    choices = [torch.tensor(signs, dtype=Q.dtype) for signs in itertools.product((1.0, -1.0), repeat=r)]
    d = max(choices, key=lambda signs: float(torch.linalg.svdvals(eye + Q[:r] * signs)[-1]))
    inverse = torch.linalg.inv((Q[:r] * d + eye) / 2)
    Z = inverse - eye
    return d, torch.cat([(Z - Z.T) / 4, -(Q[r:] * d) @ inverse / 2])


def reaching(method: NbLora, size: Size, target: Tensor, sigma: Tensor, z: Tensor | None = None) -> Tensors:
    """Float64 parameters whose update has the singular values `sigma` and the singular vectors of `target`."""
    into, r = size.into, size.r
    U, _, Vh = torch.linalg.svd(target, full_matrices=False)
    U, V = U[:, :r], Vh[:r].T
    t = {name: x.double() for name, x in started(method, size).items()}
    if method.singular_value_bounds is not None:
        s = t["delta"]
    elif "z" in t and z is not None:
        t["z"], p = z, EXPONENTS[method.norm] if isinstance(method.norm, str) else method.norm
        s = t["delta"] * z / torch.linalg.vector_norm(z, p)
    else:
        s = t["delta"].expand(r)
    share = torch.where(s > 0, sigma / s.clamp_min(1e-300), 0).clamp_max(1)
    if method.parameterization == "joint":
        angle = share.asin() / 2
        _, G = inverse_cayley(torch.cat([V * angle.cos(), U * angle.sin()]))
        return t | {"A_free": G[:into].T, "B_free": G[into:].T}
    (d_U, U_free), (d_V, V_free) = inverse_cayley(U), inverse_cayley(V)
    return t | {"U_free": U_free, "V_free": V_free, "v": (share * d_U * d_V).asin()}


SPECTRA = {
    "inside": [0.2, 0.15, 0.02],
    "on the boundary": [0.3, 0.3, 0.3],
    "repeated": [0.1, 0.1, 0.1],
    "rank 1": [0.3, 0.0, 0.0],
    "zero": [0.0, 0.0, 0.0],
}


@EVERY_FORM
@pytest.mark.parametrize("spectrum", SPECTRA.values(), ids=list(SPECTRA))
@pytest.mark.parametrize("shape", [(9, 7), (5, 12), (3, 3), (3, 4), (20, 3)])
def test_every_target_in_the_spectral_ball_is_reached(form: str, spectrum: list[float], shape: tuple[int, int]) -> None:
    method, size, sigma = made(form, r=3), Size(*shape, 3), torch.tensor(spectrum).double()
    for seed in range(4):
        target = random(*shape, seed=seed)
        U, _, Vh = torch.linalg.svd(target, full_matrices=False)
        wanted = (U[:, :3] * sigma) @ Vh[:3]
        found = method.factors(reaching(method, size, target, sigma), 1.0)
        assert found.s.dtype == torch.float64
        torch.testing.assert_close(found.delta(), wanted, rtol=0, atol=1e-10)


@EVERY_FORM
@pytest.mark.parametrize("norm", ["frobenius", "nuclear", 1.7, 4.0])
@pytest.mark.parametrize("whole", [1.0, 0.6])
def test_every_target_in_a_schatten_ball_is_reached(form: str, norm: str | float, whole: float) -> None:
    """Also one whose singular values are very uneven, or 0, at the full norm: there z must be that of the target."""
    method, size = made(form, r=3, norm=norm), Size(8, 6, 3)
    p = EXPONENTS[norm] if isinstance(norm, str) else norm
    for sigma in (torch.rand(3), torch.tensor([1.0, 1e-4, 1e-8]), torch.tensor([1.0, 0.0, 0.0]), torch.ones(3)):
        sigma = whole * 0.3 * sigma.double() / torch.linalg.vector_norm(sigma.double(), p)
        t = reaching(method, size, random(8, 6), sigma, z=sigma)
        t["delta"] = torch.tensor([0.3]).double()
        U, _, Vh = torch.linalg.svd(random(8, 6), full_matrices=False)
        torch.testing.assert_close(method.factors(t, 1.0).delta(), (U[:, :3] * sigma) @ Vh[:3], rtol=0, atol=1e-10)


@EVERY_FORM
def test_every_target_under_a_vector_of_bounds_is_reached(form: str) -> None:
    method, size = made(form, singular_value_bounds=VECTOR), Size(8, 6, 4)
    assert started(method, size)["delta"].tolist() == pytest.approx([0.7, 0.2, 0.05, 0.0])
    for share in (1.0, 0.5):
        sigma = share * torch.tensor(sorted(VECTOR, reverse=True)).double()
        U, _, Vh = torch.linalg.svd(random(8, 6), full_matrices=False)
        found = method.factors(reaching(method, size, random(8, 6), sigma), 1.0).delta()
        torch.testing.assert_close(found, (U[:, :4] * sigma) @ Vh[:4], rtol=0, atol=1e-10)


def test_counterexample_an_even_split_reaches_only_part_of_the_ball() -> None:
    """ΔW of rank 1 and nuclear norm δ: an even split allows δ/r of it."""
    even = made("joint", norm="nuclear", learn_split=False)
    assert (even.factors(started(even, Size(8, 6, 4), zero=False), 1.0).s / 2).tolist() == pytest.approx([0.3 / 4] * 4)
    t = parameters(even, Size(8, 6, 4), ("random", "random"), (1.0, 1.0), 0)
    assert torch.linalg.matrix_norm(dense(even.factors(t, 1.0)), 2) <= 0.3 / 4 * (1 + 1e-6)


@EVERY_FORM
@pytest.mark.parametrize("norm", ["spectral", "nuclear"])
def test_training_from_the_start_reaches_a_target(form: str, norm: str) -> None:
    torch.manual_seed(4)
    method, size = made(form, r=3, norm=norm, bound=1.0), Size(7, 6, 3)
    sigma = torch.tensor([0.4, 0.2, 0.1]).double()
    U, _, Vh = torch.linalg.svd(random(7, 6), full_matrices=False)
    target = (U[:, :3] * sigma) @ Vh[:3]
    t = {name: x.double() for name, x in started(method, size).items()}
    leaves = [t[name].requires_grad_() for name, slot in method.slots(size).items() if slot.trained]
    optimizer = torch.optim.LBFGS(leaves, max_iter=300, history_size=30, line_search_fn="strong_wolfe")
    optimizer.param_groups[0] |= {"tolerance_grad": 1e-12, "tolerance_change": 0}

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = (method.factors(t, 1.0).delta() - target).square().sum()
        value.backward()
        return value

    optimizer.step(loss)  # type: ignore[arg-type]
    assert loss() < 1e-9 * target.square().sum()


# --- gradients ------------------------------------------------------------------------------------------------------


@EVERY_BOUND
@EVERY_FORM
def test_gradients_are_those_of_finite_differences(form: str, fields: dict[str, Any]) -> None:
    torch.manual_seed(1)
    method, size = made(form, **fields), Size(6, 5, 4)
    t = {name: x.double() for name, x in started(method, size, zero=False).items()}
    names = [name for name, slot in method.slots(size).items() if slot.trained]

    def delta(*leaves: Tensor) -> Tensor:
        return method.factors(t | dict(zip(names, leaves, strict=True)), 1.0).delta()

    assert torch.autograd.gradcheck(delta, [t[name].requires_grad_() for name in names], atol=1e-6)


@EVERY_FORM
def test_float32_gradients_are_those_of_the_equations_in_float64(form: str) -> None:
    torch.manual_seed(1)
    method, size, C = made(form, norm="nuclear"), Size(12, 9, 4), random(12, 9)
    single = started(method, size, zero=False)
    double = {name: x.double() for name, x in single.items()}
    names = [name for name, slot in method.slots(size).items() if slot.trained]
    for t in (single, double):
        for name in names:
            t[name].requires_grad_()
    (method.factors(single, 1.0).delta() * C.float()).sum().backward()
    (written_out(method, double) * C).sum().backward()
    for name in names:
        found, expected = single[name].grad, double[name].grad
        assert found is not None
        assert expected is not None
        torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


def written_out(method: NbLora, t: Tensors) -> Tensor:
    """ΔW from the paper's equations, for one layer and the nuclear norm."""

    def transform(G: Tensor) -> Tensor:
        X, Y, eye = G[: G.shape[1]], G[G.shape[1] :], torch.eye(G.shape[1], dtype=G.dtype)
        Z = X - X.T + Y.T @ Y
        inverse = torch.linalg.inv(eye + Z)
        return torch.cat([(eye - Z) @ inverse, -2 * Y @ inverse])

    s = t["delta"] * t["z"].abs() / t["z"].abs().sum()
    if method.parameterization == "svd":
        return transform(t["U_free"]) @ torch.diag(s * t["v"].sin()) @ transform(t["V_free"]).T
    Q = transform(torch.cat([t["A_free"].T, t["B_free"].T]))
    into = t["A_free"].shape[1]
    torch.testing.assert_close(Q.T @ Q, torch.eye(4, dtype=Q.dtype))
    return 2 * Q[into:] @ torch.diag(s) @ Q[:into].T


@EVERY_FORM
def test_the_update_is_the_equations(form: str) -> None:
    method = made(form, norm="nuclear")
    t = {name: x.double() for name, x in started(method, Size(12, 9, 4), zero=False).items()}
    torch.testing.assert_close(method.factors(t, 1.0).delta(), written_out(method, t), rtol=1e-10, atol=1e-12)
    assert torch.equal(method.factors(t, 1.0).delta(), method.factors(t, 7.0).delta())  # no lora_alpha / r


# --- start, slots ---------------------------------------------------------------------------------------------------


@EVERY_BOUND
@EVERY_FORM
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_start_is_exactly_zero_and_can_move(form: str, fields: dict[str, Any], dtype: torch.dtype) -> None:
    method, size = made(form, **fields), Size(6, 9, 4)
    t = {name: x.to(dtype) if name.endswith("_free") else x for name, x in started(method, size).items()}
    first = "B_free" if form == "joint" else "v"
    t[first].requires_grad_()
    factors = method.factors(t, 1.0)
    assert (factors.delta() == 0).all()
    (factors.delta() * random(6, 9).to(dtype)).sum().backward()
    gradient = t[first].grad
    assert gradient is not None
    alive = [0, 1, 2] if method.singular_value_bounds else [0, 1, 2, 3]  # the last bound of VECTOR is 0
    assert (gradient.reshape(4, -1)[alive].abs().amax(1) > 0).all()


@EVERY_BOUND
@EVERY_FORM
def test_the_random_start_uses_much_of_the_bound(form: str, fields: dict[str, Any]) -> None:
    method = made(form, **fields)
    t = started(method, Size(30, 20, 4), zero=False)
    factors = method.factors(t, 1.0)
    # the norm of the learnt split's whole budget; each direction uses a good part of its own
    assert torch.linalg.matrix_norm(dense(factors)) > 0.3 * float((factors.s / 2).norm())
    assert excess(method, t) <= 1e-6


def test_free_matrices_start_with_the_papers_variance() -> None:
    torch.manual_seed(0)
    t = started(made("joint"), Size(100, 400, 4))
    assert float(t["A_free"].std()) == pytest.approx(400**-0.5, rel=0.1)
    assert (t["B_free"] == 0).all()
    t = started(made("svd"), Size(100, 400, 4))
    assert float(t["U_free"].std()) == pytest.approx(0.1, rel=0.15)
    assert float(t["V_free"].std()) == pytest.approx(0.05, rel=0.1)
    assert (t["v"] == 0).all()


@pytest.mark.parametrize(
    ("form", "fields", "names"),
    [
        ("joint", {}, {"A_free", "B_free", "delta"}),
        ("joint", {"norm": "nuclear"}, {"A_free", "B_free", "z", "delta"}),
        ("joint", {"norm": 2.5, "learn_split": False}, {"A_free", "B_free", "delta"}),
        ("svd", {"norm": "frobenius"}, {"U_free", "V_free", "v", "z", "delta"}),
        ("svd", {"norm": "nuclear", "singular_value_bounds": VECTOR}, {"U_free", "V_free", "v", "delta"}),
    ],
)
def test_only_what_is_used_is_held_and_angles_and_splits_are_exact(
    form: str, fields: dict[str, Any], names: set[str]
) -> None:
    slots = made(form, **fields).slots(Size(6, 9, 4))
    assert slots.keys() == names
    assert {name for name, slot in slots.items() if slot.exact} == names & {"v", "z", "delta"}
    assert {name for name, slot in slots.items() if not slot.trained} == {"delta"}


@EVERY_FORM
def test_all_ranks_are_kept(form: str) -> None:
    method = made(form)
    t = started(method, Size(6, 9, 4))
    assert method.kept(t).tolist() == [True] * 4
    assert method.kept({name: torch.stack([x, x]) for name, x in t.items()}).shape == (2, 4)


# --- the bound of a layer -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["spectral", "frobenius", "nuclear", 1.4, 3.0])
def test_a_relative_bound_is_a_fraction_of_the_same_norm_of_the_weight(norm: str | float) -> None:
    method = made("joint", norm=norm, bound=0.25, bound_relative_to_weight=True)
    assert method.starts_from_weight
    W = random(14, 10).float()
    sigma = torch.linalg.svdvals(W.double())
    p = EXPONENTS[norm] if isinstance(norm, str) else norm
    expected = 0.25 * float(torch.linalg.vector_norm(sigma, p))
    t = started(method, Size(14, 10, 4), weight=W)
    assert t["delta"].shape == (1,)
    assert float(t["delta"]) == pytest.approx(expected, rel=1e-6)
    assert excess(method, parameters(method, Size(14, 10, 4), ("random", "random"), (1.0, 1.0), 0)) <= 1e-6


@pytest.mark.parametrize("fields", [{}, {"singular_value_bounds": VECTOR, "bound_relative_to_weight": True}])
def test_an_absolute_bound_does_not_read_the_weight(fields: dict[str, Any]) -> None:
    method = made("joint", **fields)
    assert not method.starts_from_weight

    def weight() -> Tensor:
        raise AssertionError

    t = method.start(Size(6, 9, 4), weight)
    assert t["delta"].tolist() == pytest.approx(sorted(VECTOR, reverse=True) if fields else [0.3])
    assert made("joint", bound=1).start(Size(6, 9, 4), weight)["delta"].dtype == torch.float32


def test_a_clamped_layer_has_the_largest_of_the_bounds() -> None:
    method = made("svd", singular_value_bounds=VECTOR)
    assert started(method, Size(2, 9, 2))["delta"].tolist() == pytest.approx([0.7, 0.2])
    with pytest.raises(ArgumentError, match="`rank_pattern` must not exceed the 4 singular_value_bounds; found 5"):
        method.slots(Size(9, 9, 5))


def test_a_zero_weight_with_a_relative_bound_is_said() -> None:
    method = made("joint", bound_relative_to_weight=True)
    with pytest.warns(UserWarning, match="that module cannot change"):
        t = started(method, Size(6, 9, 4), zero=False, weight=torch.zeros(6, 9))
    assert (method.factors(t, 1.0).delta() == 0).all()


# --- settings -------------------------------------------------------------------------------------------------------


def test_defaults() -> None:
    method = NbLora()
    method.check()
    assert (method.bound, method.norm, method.bound_relative_to_weight, method.parameterization) == (
        0.1,
        "spectral",
        True,
        "joint",
    )
    assert not method.scaled
    assert method.starts_from_weight


def test_a_tuple_of_bounds_becomes_a_list_as_json_has_it() -> None:
    method = NbLora(r=2, singular_value_bounds=(1.0, 0.5))  # type: ignore[arg-type]
    method.check()
    assert method.singular_value_bounds == [1.0, 0.5]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"bound": 0.0}, r"`bound` must be a number ≥ 1e-30; found 0\.0"),
        ({"bound": math.inf}, r"`bound` must be a number ≥ 1e-30; found inf"),
        ({"bound": "0.1"}, r"`bound` must be a number ≥ 1e-30; found '0\.1'"),
        ({"norm": "schatten"}, r"`norm` must be one of spectral, frobenius, nuclear; found 'schatten'"),
        ({"norm": 0.5}, r"`norm` must be a number ≥ 1; found 0\.5"),
        ({"norm": math.inf}, r"`norm` must be a number ≥ 1; found inf"),
        ({"norm": None}, r"`norm` must be a number ≥ 1; found None"),
        ({"bound_relative_to_weight": 1}, r"`bound_relative_to_weight` must be True or False; found 1"),
        ({"learn_split": "yes"}, r"`learn_split` must be True or False; found 'yes'"),
        ({"parameterization": "qr"}, r"`parameterization` must be one of joint, svd; found 'qr'"),
        ({"singular_value_bounds": [1.0]}, r"`singular_value_bounds` must be a list of r = 8 numbers; found \[1\.0\]"),
        ({"singular_value_bounds": 1.0}, r"`singular_value_bounds` must be a list of r = 8 numbers; found 1\.0"),
        ({"singular_value_bounds": [1.0] * 9}, r"`singular_value_bounds` must be a list of r = 8 numbers"),
        ({"singular_value_bounds": [1.0] * 7 + [-1]}, r"`singular_value_bounds\[7\]` must be a number ≥ 0; found -1"),
        ({"singular_value_bounds": [math.nan] + [1.0] * 7}, r"`singular_value_bounds\[0\]` must be a number ≥ 0"),
        ({"singular_value_bounds": [0.0] * 8}, r"`singular_value_bounds` must hold a number above 0"),
        ({"r": 0}, r"`r` must be a whole number ≥ 1; found 0"),
    ],
)
def test_rules_that_are_broken_are_named(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        NbLora(**fields).check()
