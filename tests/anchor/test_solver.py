import itertools
import time
import warnings

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from sklearn.exceptions import ConvergenceWarning
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from videoanchor_triton.anchor import memory
from videoanchor_triton.anchor.memory import dense_memory_bytes
from videoanchor_triton.anchor.precision import full_precision_products
from videoanchor_triton.anchor.problem import penalty_weights, token_features
from videoanchor_triton.anchor.solver import SolverOptions, self_expression

from .reference import duality_gap, objective, optimal_coefficients, polish, textbook_admm
from .tokens import DEVICES, planted_subspaces, vit_like

CUDA, MKLDNN = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul  # pyright: ignore[reportAttributeAccessIssue]
TIGHT = {"tol": 1e-6, "max_iter": 30_000}


def random_tokens(n_tokens: int, n_features: int = 9, seed: int = 0) -> torch.Tensor:
    return torch.randn(n_tokens, n_features, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def small_features(n_tokens: int = 30, rank: int = 10, seed: int = 0) -> torch.Tensor:
    return token_features(random_tokens(n_tokens, 3 * rank, seed), rank)


def solve(Y: torch.Tensor, dtype: torch.dtype = torch.float64, **options) -> np.ndarray:
    found = self_expression(Y, SolverOptions(**options), dtype=dtype)
    assert found.converged or options.get("tol") == 0
    return found.coef.cpu().numpy()


@pytest.mark.parametrize("alpha_e", [800.0, 3.0], ids=["error-zero", "error-active"])
@pytest.mark.parametrize("affine", [True, False], ids=["affine", "linear"])
@pytest.mark.parametrize(("rho", "relaxation"), [(300.0, 1.0), (20.0, 1.8)], ids=["published", "default"])
@pytest.mark.parametrize("n_iter", [1, 7, 60])
def test_iterates_are_those_of_the_textbook(n_iter, rho, relaxation, affine, alpha_e):
    Y = small_features(53, 7)
    weights = penalty_weights(Y, alpha_e, 800.0)
    expected = textbook_admm(Y.numpy(), *weights, rho, affine, n_iter, relaxation)
    with pytest.warns(ConvergenceWarning):
        found = solve(Y, affine=affine, alpha_e=alpha_e, rho=rho, relaxation=relaxation, tol=0.0, max_iter=n_iter)
    np.testing.assert_allclose(found, expected, atol=1e-9, rtol=0)


def test_blocks_of_rows_change_nothing(monkeypatch):
    Y = small_features(53, 7)
    whole = self_expression(Y, SolverOptions(), dtype=torch.float64)
    monkeypatch.setattr(memory, "CHUNK_ELEMENTS", 530)
    blocks = self_expression(Y, SolverOptions(), dtype=torch.float64)
    torch.testing.assert_close(blocks.coef, whole.coef, atol=1e-10, rtol=0)
    assert blocks.n_iter == whole.n_iter
    assert blocks.residual == pytest.approx(whole.residual, rel=1e-6)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("alpha_e", [800.0, 3.0], ids=["error-zero", "error-active"])
@pytest.mark.parametrize("affine", [True, False], ids=["affine", "linear"])
def test_reaches_the_certified_optimum(affine, alpha_e, device):
    Y = small_features()
    found = solve(Y.to(device), affine=affine, alpha_e=alpha_e, alpha_z=50.0, **TIGHT)
    weights = penalty_weights(Y, alpha_e, 50.0)
    assert np.abs(duality_gap(Y.numpy(), found, *weights, affine)).max() < 1e-4
    assert not found.diagonal().any()
    if affine:
        np.testing.assert_allclose(found.sum(0), 1, atol=1e-6)


@pytest.mark.parametrize("alpha_e", [800.0, 3.0], ids=["error-zero", "error-active"])
@pytest.mark.parametrize("affine", [True, False], ids=["affine", "linear"])
def test_agrees_with_a_generic_solver(affine, alpha_e):
    Y = small_features()
    weights = penalty_weights(Y, alpha_e, 50.0)
    found = solve(Y, affine=affine, alpha_e=alpha_e, alpha_z=50.0, **TIGHT)
    values = objective(Y.numpy(), found, *weights)
    for token in (0, 17, 29):
        coef, value = optimal_coefficients(Y.numpy(), token, *weights, affine)
        assert values[token] == pytest.approx(value, rel=1e-6)
        np.testing.assert_allclose(found[:, token], coef, atol=1e-4)


def test_over_relaxed_and_published_settings_share_the_optimum():
    Y = small_features(seed=3)
    published = solve(Y, alpha_z=10.0, rho=300.0, relaxation=1.0, **TIGHT)
    np.testing.assert_allclose(solve(Y, alpha_z=10.0, **TIGHT), published, atol=1e-4)


@pytest.mark.parametrize(
    "make", [vit_like, lambda: planted_subspaces(12, 20, 4, 96, noise=0.5)[0]], ids=["vit", "noisy"]
)
def test_default_tolerance_orders_tokens_as_the_optimum(make):
    Y = token_features(make(), 32)
    optimum = solve(Y, tol=1e-4, max_iter=20_000)
    weights = penalty_weights(Y, 800.0, 800.0)
    polished = polish(Y.numpy(), optimum, weights[1])
    certified = np.abs(duality_gap(Y.numpy(), polished, *weights, affine=True)) < 1e-6
    assert certified.mean() > 0.95
    optimum[:, certified] = polished[:, certified]
    for dtype in (torch.float32, torch.float64):
        found = self_expression(Y, SolverOptions(), dtype=dtype)
        assert found.converged
        assert found.residual <= SolverOptions.tol
        assert found.n_iter < 2000
        assert np.asarray(spearmanr(found.coef.sum(1), optimum.sum(1)))[0] >= 0.995


@pytest.mark.parametrize("affine", [True, False], ids=["affine", "linear"])
def test_does_not_depend_on_the_order_of_tokens(affine):
    Y = small_features(45)
    order = np.random.default_rng(1).permutation(45)
    found, permuted = (solve(y, affine=affine) for y in (Y, Y[:, order].contiguous()))
    np.testing.assert_allclose(permuted, found[np.ix_(order, order)], atol=1e-9)


@pytest.mark.parametrize("scale", [1e-15, 1e15])
def test_does_not_depend_on_the_scale_of_tokens(scale):
    Y = small_features(45)
    np.testing.assert_allclose(solve(scale * Y, torch.float32), solve(Y, torch.float32), atol=1e-4)


@pytest.mark.parametrize("noise", [0.0, 0.05], ids=["exact", "noisy"])
def test_coefficients_stay_inside_the_subspace(noise):
    tokens, truth = planted_subspaces(noise=noise)
    magnitude = np.abs(solve(token_features(tokens, 12 if noise else None), affine=False))
    inside = truth[:, None] == truth[None, :]
    assert magnitude[inside].sum() >= (1 - 1e-6 if noise == 0 else 0.9) * magnitude.sum()


@pytest.mark.parametrize(
    "tokens",
    [
        torch.eye(6, dtype=torch.float64),
        torch.cat([random_tokens(20), torch.zeros(3, 9, dtype=torch.float64)]),
        random_tokens(10).repeat(3, 1),
        random_tokens(2),
    ],
    ids=["orthogonal", "zero-tokens", "duplicates", "two"],
)
@pytest.mark.parametrize("affine", [True, False], ids=["affine", "linear"])
@pytest.mark.parametrize("rank", [None, 5])
def test_degenerate_tokens_have_a_solution(tokens, affine, rank):
    features = token_features(tokens, rank)
    # a lone pair is so badly conditioned that float32 cannot reach the tolerance
    dtype = torch.float64 if len(tokens) == 2 else torch.float32
    found = self_expression(features, SolverOptions(affine=affine, max_iter=20_000), dtype=dtype)
    assert found.converged
    assert torch.isfinite(found.coef).all()
    if affine:
        torch.testing.assert_close(found.coef.sum(0), torch.ones(len(tokens), dtype=dtype), atol=0.01, rtol=0)


@pytest.mark.parametrize("Y", [torch.zeros(0, 7), torch.ones(3, 7), torch.zeros(3, 7), torch.ones(3, 1)], ids=str)
def test_equal_tokens_are_not_expressed(Y):
    found = self_expression(Y, SolverOptions())
    assert (found.n_iter, found.residual, found.converged) == (0, 0.0, True)
    assert found.coef.shape == (Y.shape[1], Y.shape[1])
    assert not found.coef.any()


@pytest.mark.parametrize("device", DEVICES)
def test_is_bitwise_reproducible(device):
    Y = token_features(vit_like().to(device), 32)
    first, second = (self_expression(Y, SolverOptions()).coef for _ in range(2))
    assert torch.equal(first, second)


class _Precisions(TorchDispatchMode):
    """Collects the precision settings under which float32 products run, and the dtypes of their results."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_):
            self.seen.add((out.dtype, CUDA.fp32_precision, MKLDNN.fp32_precision))
        return out


@pytest.mark.parametrize("setting", ["process-wide", "backend"])
def test_products_are_in_full_precision_whatever_is_set(setting):
    before = torch.get_float32_matmul_precision(), CUDA.fp32_precision, MKLDNN.fp32_precision
    Y = token_features(vit_like(), 16)
    expected = self_expression(Y, SolverOptions()).coef
    try:
        if setting == "process-wide":
            torch.set_float32_matmul_precision("medium")
        else:
            CUDA.fp32_precision, MKLDNN.fp32_precision = "tf32", "bf16"
        changed = CUDA.fp32_precision, MKLDNN.fp32_precision
        with torch.autocast("cpu", torch.bfloat16), _Precisions() as precisions:
            found = self_expression(Y, SolverOptions()).coef
        assert (CUDA.fp32_precision, MKLDNN.fp32_precision) == changed
        assert setting == "backend" or torch.get_float32_matmul_precision() == "medium"
    finally:
        CUDA.fp32_precision, MKLDNN.fp32_precision = "none", "none"
        torch.set_float32_matmul_precision(before[0])
        CUDA.fp32_precision, MKLDNN.fp32_precision = before[1:]
    assert precisions.seen == {(torch.float32, "ieee", "ieee"), (torch.float64, "ieee", "ieee")}
    assert torch.equal(found, expected)


def test_precision_settings_come_back_after_an_error():
    before = torch.get_float32_matmul_precision(), CUDA.fp32_precision
    with pytest.raises(KeyError), full_precision_products(torch.device("cpu")):
        raise KeyError
    assert (torch.get_float32_matmul_precision(), CUDA.fp32_precision) == before


class PeakMemory(TorchDispatchMode):
    """The largest number of bytes alive at a time in tensors made inside the block."""

    def __init__(self) -> None:
        super().__init__()
        self.storages = {}
        self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                storage = torch.multiprocessing.reductions.StorageWeakRef(tensor.untyped_storage())
                self.storages[storage] = tensor.untyped_storage().nbytes()
        self.storages = {storage: size for storage, size in self.storages.items() if not storage.expired()}
        self.peak = max(self.peak, sum(self.storages.values()))
        return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_memory_stays_within_what_is_announced(dtype, monkeypatch):
    monkeypatch.setattr(memory, "CHUNK_ELEMENTS", 20_000)
    Y = token_features(vit_like(8, 90), 16)
    announced = dense_memory_bytes(720, 16, dtype)
    with warnings.catch_warnings(), PeakMemory() as memory_use:
        warnings.simplefilter("ignore", ConvergenceWarning)
        self_expression(Y, SolverOptions(max_iter=20), dtype=dtype)
    square = 720**2 * dtype.itemsize
    assert 2 * square < memory_use.peak <= announced < 4 * square


def test_too_many_tokens_are_refused_before_anything_is_allocated(monkeypatch):
    monkeypatch.setattr(memory, "available_memory_bytes", lambda _: 2**30)
    Y = torch.randn(2, 50_000)
    with (
        PeakMemory() as memory_use,
        pytest.raises(MemoryError, match=r"50000 tokens.*18\.\d GiB.*1\.0 GiB.*fewer frames"),
    ):
        self_expression(Y, SolverOptions())
    assert memory_use.peak == 0


def test_available_memory_is_known_here():
    assert (memory.available_memory_bytes(torch.device("cpu")) or 0) > 2**20


def test_says_once_what_did_not_converge():
    Y = token_features(vit_like(), 16)
    with pytest.warns(
        ConvergenceWarning, match=r"of 256 tokens .* max_iter=15.*residual is \d.*raise max_iter"
    ) as caught:
        found = self_expression(Y, SolverOptions(max_iter=15))
    assert len(caught) == 1
    assert (found.n_iter, found.converged) == (15, False)
    assert 0 < found.n_unconverged <= 256
    assert found.residual > SolverOptions.tol


def test_overflow_is_an_error_and_not_a_result():
    with pytest.raises(FloatingPointError, match="float64"):
        self_expression(small_features(), SolverOptions(alpha_z=1e90))
    with pytest.raises(FloatingPointError):
        self_expression(torch.full((3, 4), torch.nan), SolverOptions())


@pytest.mark.parametrize(
    ("seconds", "reported"), [(0.0, [10]), (0.05, [10, 60, 110]), (0.3, range(10, 120, 10))], ids=str
)
def test_reports_progress_four_times_a_second_at_most(seconds, reported, monkeypatch):
    clock = itertools.count()
    monkeypatch.setattr(time, "monotonic", lambda: next(clock) * seconds)
    calls = []
    with pytest.warns(ConvergenceWarning):
        self_expression(
            small_features(), SolverOptions(tol=0.0, max_iter=110), progress=lambda *call: calls.append(call)
        )
    assert calls == [("solve", done, 110) for done in reported]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rho": 0.0}, "rho must be finite and > 0"),
        ({"rho": float("nan")}, "rho must be finite"),
        ({"relaxation": 2.0}, "relaxation must be finite and > 0 and < 2"),
        ({"max_iter": 0}, "max_iter must be >= 1"),
        ({"tol": -1.0}, "tol must be finite and >= 0"),
        ({"alpha_e": float("inf")}, "alpha_e must be finite"),
        ({"affine": "yes"}, "affine must be one of True, False"),
    ],
    ids=str,
)
def test_options_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        SolverOptions(**options)


def test_arguments_are_checked():
    with pytest.raises(TypeError, match="max_iter must be an integer"):
        SolverOptions(max_iter=1.5)  # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError, match="rho must be a number"):
        SolverOptions(rho="20")  # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError, match="dtype must be"):
        self_expression(torch.ones(2, 3), SolverOptions(), dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"Y must be 2-D.*\(4,\)"):
        self_expression(torch.ones(4), SolverOptions())
