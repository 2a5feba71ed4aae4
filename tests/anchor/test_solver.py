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

from videoanchor_triton.anchor import admm, fused, memory
from videoanchor_triton.anchor.admm import Admm, Dictionary
from videoanchor_triton.anchor.blocked import solve_block
from videoanchor_triton.anchor.memory import solver_memory_bytes, working_set_memory_bytes
from videoanchor_triton.anchor.problem import Problem, penalty_weights, token_features
from videoanchor_triton.anchor.solver import SolverOptions, self_expression

from .reference import duality_gap, objective, optimal_coefficients, polish, textbook_iterates
from .tokens import DEVICES, planted_subspaces, vit_like

CUDA, MKLDNN = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul  # pyright: ignore[reportAttributeAccessIssue]
TIGHT = {"tol": 1e-8, "max_iter": 100_000}


def random_tokens(n_tokens: int, n_features: int = 9, seed: int = 0) -> torch.Tensor:
    return torch.randn(n_tokens, n_features, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def small_features(n_tokens: int = 30, rank: int = 10, seed: int = 0) -> torch.Tensor:
    return token_features(random_tokens(n_tokens, 3 * rank, seed), rank)


def solve(Y: torch.Tensor, dtype: torch.dtype = torch.float64, **options) -> np.ndarray:
    found = self_expression(Y, SolverOptions(**options), dtype=dtype)
    assert found.converged
    return found.to_dense().cpu().numpy()


def iterate(Y: torch.Tensor, n_iter: int, dtype: torch.dtype = torch.float64, affine: bool = True, **settings) -> Admm:
    """All tokens after n_iter iterations."""
    rho, relaxation, alpha_e, alpha_z = (settings.get(name, value) for name, value in DEFAULTS.items())
    problem = Problem.of(Y, affine=affine, alpha_e=alpha_e, alpha_z=alpha_z)
    dictionary = Dictionary.of(problem.atoms, affine=affine, rho=rho, dtype=dtype)
    own = torch.arange(Y.shape[1], device=Y.device) if settings.get("own", True) else None
    targets = problem.atoms.T.to(dtype)
    admm = Admm(dictionary, targets, own, error_bound=problem.error_bound, relaxation=relaxation)
    for _ in range(n_iter):
        admm.advance()
    return admm


DEFAULTS = {"rho": 20.0, "relaxation": 1.8, "alpha_e": 800.0, "alpha_z": 800.0}


@pytest.mark.parametrize("alpha_e", [800.0, 3.0], ids=["error-zero", "error-active"])
@pytest.mark.parametrize("affine", [True, False], ids=["affine", "linear"])
@pytest.mark.parametrize(("rho", "relaxation"), [(300.0, 1.0), (20.0, 1.8)], ids=["published", "default"])
@pytest.mark.parametrize("n_iter", [1, 7, 60])
def test_iterates_are_those_of_the_textbook(n_iter, rho, relaxation, affine, alpha_e):
    Y = small_features(53, 7)
    weights = penalty_weights(Y, alpha_e, 800.0)
    *_, (_, expected) = textbook_iterates(Y.numpy(), *weights, rho, affine, n_iter, relaxation)
    found = iterate(Y, n_iter, affine=affine, rho=rho, relaxation=relaxation, alpha_e=alpha_e)
    np.testing.assert_allclose(found.coefficients(slice(None)).T, expected, atol=1e-9, rtol=0)


@pytest.mark.parametrize("own", [True, False])
def test_the_triton_pass_is_the_torch_one(own, monkeypatch):
    pytest.importorskip("triton")
    Y = small_features(19, 5)
    expected = iterate(Y, 4, own=own)
    monkeypatch.setattr(admm, "_runs_triton", lambda _: True)
    monkeypatch.setattr(fused, "BLOCK", 16)
    found = iterate(Y, 4, own=own)
    assert found.settings is not None
    torch.testing.assert_close(found.state, expected.state, atol=1e-12, rtol=0)
    torch.testing.assert_close(found.reflected, expected.reflected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("affine", [True, False], ids=["affine", "linear"])
def test_tokens_with_atoms_of_their_own_iterate_as_with_shared_ones(affine):
    Y = small_features(21, 7)
    shared = iterate(Y, 40, affine=affine)
    problem = Problem.of(Y, affine=affine, alpha_e=800.0, alpha_z=800.0)
    order = torch.stack([torch.randperm(21, generator=torch.Generator().manual_seed(j)) for j in range(21)])
    dictionary = Dictionary.of(problem.atoms.T[order].mT, affine=affine, rho=20.0, dtype=torch.float64)
    own = (order == torch.arange(21)[:, None]).nonzero()[:, 1]
    alone = Admm(dictionary, problem.atoms.T, own, error_bound=problem.error_bound, relaxation=1.8)
    for _ in range(40):
        alone.advance()
    expected = shared.coefficients(slice(None)).gather(1, order)
    torch.testing.assert_close(alone.coefficients(slice(None)), expected, atol=1e-9, rtol=0)
    torch.testing.assert_close(alone.gaps(), shared.gaps(), atol=1e-9, rtol=1e-6)
    some = torch.tensor([3, 20, 7])
    alone.keep(some)
    shared.keep(some)
    for admm_ in (alone, shared):
        admm_.advance()
    torch.testing.assert_close(alone.gaps(), shared.gaps(), atol=1e-9, rtol=1e-6)


@pytest.mark.parametrize("alpha_e", [800.0, 3.0], ids=["error-zero", "error-active"])
@pytest.mark.parametrize("affine", [True, False], ids=["affine", "linear"])
@pytest.mark.parametrize("n_iter", [3, 60, 400])
def test_the_gap_bounds_the_distance_from_the_optimum(n_iter, affine, alpha_e):
    Y = small_features()
    weights = penalty_weights(Y, alpha_e, 50.0)
    found = iterate(Y, n_iter, affine=affine, alpha_e=alpha_e, alpha_z=50.0)
    gaps = found.gaps().numpy()
    coefficients = found.coefficients(slice(None)).T.numpy()
    if affine:
        sums = coefficients.sum(0)
        coefficients = coefficients / np.where(sums > 0, sums, 1)
        assert (gaps[sums <= 0] == np.inf).all()
    values = objective(Y.numpy(), coefficients, *weights)
    optimum = objective(Y.numpy(), solve(Y, affine=affine, alpha_e=alpha_e, alpha_z=50.0, tol=1e-2), *weights)
    bounded = np.isfinite(gaps)
    assert bounded.mean() > (0.5 if n_iter > 3 else 0)
    assert (values[bounded] - optimum[bounded] <= gaps[bounded] * values[bounded]).all()
    if n_iter == 400 and alpha_e == 800.0:
        assert np.median(gaps) < 1e-3


@pytest.mark.parametrize("chunk", [53, 530])
def test_chunks_of_rows_change_nothing(chunk, monkeypatch):
    Y = small_features(53, 7)
    whole = self_expression(Y, SolverOptions(), dtype=torch.float64)
    monkeypatch.setattr(memory, "CHUNK_ELEMENTS", chunk)
    parts = self_expression(Y, SolverOptions(), dtype=torch.float64)
    torch.testing.assert_close(parts.to_dense(), whole.to_dense(), atol=1e-9, rtol=0)
    assert parts.n_iter == whole.n_iter


@pytest.mark.parametrize("n_tokens", [53, 64])
def test_blocks_give_what_all_at_once_gives(n_tokens, monkeypatch):
    Y = small_features(n_tokens, 7)
    dense = self_expression(Y, SolverOptions(algorithm="dense"), dtype=torch.float64)
    monkeypatch.setattr(memory, "FEWEST_FOR_PRODUCTS", 10)
    monkeypatch.setattr(memory, "CPU_CACHE_BYTES", 0)
    blocked = self_expression(Y, SolverOptions(algorithm="blocked"), dtype=torch.float64)
    assert (dense.algorithm, blocked.algorithm) == ("dense", "blocked")
    torch.testing.assert_close(blocked.to_dense(), dense.to_dense(), atol=1e-9, rtol=0)
    torch.testing.assert_close(blocked.row_sums(), dense.to_dense().sum(1), atol=1e-9, rtol=0)


def test_the_authors_stopping_rule():
    Y = small_features(40, 8)
    weights = penalty_weights(Y, 800.0, 800.0)
    found = self_expression(Y, SolverOptions(algorithm="authors"))
    assert found.values.dtype == torch.float64
    iterates = list(textbook_iterates(Y.numpy(), *weights, 300.0, True, found.n_iter, 1.0))
    np.testing.assert_allclose(found.to_dense().numpy(), iterates[-1][1], atol=1e-9, rtol=0)
    differences = np.array([np.abs(A - C).sum(1).max() for A, C in iterates])
    assert differences[-1] < 2e-4
    assert (differences[:-1] >= 2e-4).all()
    assert found.residual > 1e-6
    with pytest.warns(ConvergenceWarning, match="stopping rule"):
        self_expression(Y, SolverOptions(algorithm="authors", max_iter=5))


def test_the_reported_gap_is_that_of_the_coefficients_that_are_kept():
    Y = small_features(40, 8)
    problem = Problem.of(Y, affine=True, alpha_e=800.0, alpha_z=800.0)
    dictionary = Dictionary.of(problem.atoms, affine=True, rho=20.0, dtype=torch.float64)
    options = SolverOptions(max_iter=2000)
    found = solve_block(problem, dictionary, problem.atoms.T, torch.arange(40), options, keep=5)
    assert found.values.shape == (40, 5)
    coefficients = torch.zeros(40, 40, dtype=torch.float64).scatter_(1, found.indices, found.values).T.numpy()
    np.testing.assert_allclose(coefficients.sum(0), 1, atol=1e-12)
    weights = penalty_weights(Y, 800.0, 800.0)
    values, optimum = (objective(Y.numpy(), c, *weights) for c in (coefficients, solve(Y, tol=1e-6)))
    distance = (values - optimum) / values
    assert np.median(distance) > 0.01
    np.testing.assert_allclose(found.gap, distance, atol=2e-3)


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
    optimum = solve(Y, tol=1e-5, max_iter=50_000)
    weights = penalty_weights(Y, 800.0, 800.0)
    polished = polish(Y.numpy(), optimum, weights[1])
    certified = np.abs(duality_gap(Y.numpy(), polished, *weights, affine=True)) < 1e-6
    assert certified.mean() > 0.95
    optimum[:, certified] = polished[:, certified]
    for dtype in (torch.float32, torch.float64):
        found = self_expression(Y, SolverOptions(), dtype=dtype)
        assert found.converged
        assert found.residual <= SolverOptions.tol
        assert found.n_iter < 3000
        assert np.asarray(spearmanr(found.to_dense().sum(1), optimum.sum(1)))[0] >= 0.995


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
    # and an error term that acts, as it does for a pair that is not affine, slows the iteration down
    tol = 0.05 if len(tokens) == 2 and not affine else SolverOptions.tol
    found = self_expression(features, SolverOptions(affine=affine, max_iter=20_000, tol=tol), dtype=dtype)
    assert found.converged
    coefficients = found.to_dense()
    assert torch.isfinite(coefficients).all()
    if affine:
        torch.testing.assert_close(coefficients.sum(0), torch.ones(len(tokens), dtype=dtype), atol=1e-5, rtol=0)


@pytest.mark.parametrize("Y", [torch.zeros(0, 7), torch.ones(3, 7), torch.zeros(3, 7), torch.ones(3, 1)], ids=str)
def test_equal_tokens_are_not_expressed(Y):
    found = self_expression(Y, SolverOptions())
    assert (found.n_iter, found.residual, found.converged) == (0, 0.0, True)
    assert found.to_dense().shape == (Y.shape[1], Y.shape[1])
    assert not found.to_dense().any()


@pytest.mark.parametrize("device", DEVICES)
def test_is_bitwise_reproducible(device):
    Y = token_features(vit_like().to(device), 32)
    first, second = (self_expression(Y, SolverOptions()).to_dense() for _ in range(2))
    assert torch.equal(first, second)


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
@pytest.mark.parametrize("algorithm", ["dense", "blocked", "working-set"])
def test_memory_stays_within_what_is_announced(algorithm, dtype, monkeypatch):
    monkeypatch.setattr(memory, "CHUNK_ELEMENTS", 20_000)
    monkeypatch.setattr(memory, "CPU_CACHE_BYTES", 0)
    Y = token_features(vit_like(8, 90), 16)
    bytes_of = working_set_memory_bytes if algorithm == "working-set" else solver_memory_bytes
    announced = bytes_of(720, 16, dtype, 720 if algorithm == "dense" else 128)
    with warnings.catch_warnings(), PeakMemory() as memory_use:
        warnings.simplefilter("ignore", ConvergenceWarning)
        self_expression(Y, SolverOptions(algorithm=algorithm, max_iter=200, tol=0.1), dtype=dtype)
    assert announced / 2 < memory_use.peak <= announced
    square = 720**2 * dtype.itemsize
    if algorithm == "dense":
        assert memory_use.peak > 5 * square
    elif algorithm == "blocked":
        assert memory_use.peak < 5 * square


def test_a_budget_is_kept(monkeypatch):
    monkeypatch.setattr(memory, "CHUNK_ELEMENTS", 5_000)
    Y = token_features(vit_like(4, 70), 16)
    budget = solver_memory_bytes(280, 16, torch.float32, 40)
    with PeakMemory() as memory_use:
        found = self_expression(Y, SolverOptions(algorithm="blocked", memory_budget=budget, tol=0.1))
    assert memory_use.peak <= budget
    unbounded = self_expression(Y, SolverOptions(algorithm="blocked", tol=0.1))
    torch.testing.assert_close(found.to_dense(), unbounded.to_dense(), atol=1e-3, rtol=0)


@pytest.mark.parametrize(
    ("algorithm", "advice"),
    [
        ("dense", "use algorithm='blocked', fewer"),
        ("working-set", "use algorithm='blocked', fewer"),
        ("blocked", "use fewer frames"),
        ("auto", "use fewer frames"),
    ],
)
def test_too_many_tokens_are_refused_before_anything_is_allocated(algorithm, advice, monkeypatch):
    monkeypatch.setattr(memory, "available_memory_bytes", lambda _: 2**27)
    Y = torch.randn(2, 500_000)
    with (
        PeakMemory() as memory_use,
        pytest.raises(MemoryError, match=rf"500000 tokens.* GiB on cpu, and may use 0\.062 GiB: {advice}"),
    ):
        self_expression(Y, SolverOptions(algorithm=algorithm))
    assert memory_use.peak == 0


def test_says_once_which_tokens_did_not_converge():
    Y = token_features(vit_like(), 16)
    with pytest.warns(ConvergenceWarning) as caught:
        found = self_expression(Y, SolverOptions(max_iter=15))
    assert len(caught) == 1
    missed = found.unconverged.tolist()
    assert (found.n_iter, found.converged) == (15, False)
    assert 10 < len(missed) <= 256
    assert found.residual > SolverOptions.tol
    named = ", ".join(map(str, missed[:10]))
    assert f"{len(missed)} of 256 tokens did not converge within max_iter=15" in str(caught[0].message)
    assert str(caught[0].message).endswith(f"raise max_iter or tol. Tokens {named}, ...")


def test_overflow_is_an_error_and_not_a_result():
    with pytest.raises(FloatingPointError, match="float64"):
        self_expression(small_features(), SolverOptions(alpha_z=1e90))
    with pytest.raises(FloatingPointError):
        self_expression(torch.full((3, 4), torch.nan), SolverOptions())


@pytest.mark.parametrize("seconds", [0.0, 0.05, 0.3], ids=str)
def test_reports_progress_four_times_a_second_at_most(seconds, monkeypatch):
    clock = itertools.count()
    monkeypatch.setattr(time, "monotonic", lambda: next(clock) * seconds)
    calls = []
    Y = small_features(200, 5)
    self_expression(Y, SolverOptions(), dtype=torch.float64, progress=lambda *call: calls.append(call))
    assert {(stage, total) for stage, _, total in calls} == {("solve", 200)}
    done = [count for _, count, _ in calls]
    assert done == sorted(done)
    assert done[0] > 0
    if seconds == 0.3:
        assert done[-1] == 200
    assert len(done) <= {0.0: 1, 0.05: next(clock) / 5 + 1, 0.3: 200}[seconds]
