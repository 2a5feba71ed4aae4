"""What `self_expression` promises besides the optimum: shapes, errors, memory, and the same answer twice."""

import itertools
import time
import warnings
from typing import Any

import pytest
import torch
from sklearn.exceptions import ConvergenceWarning
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from videoanchor_triton.anchor import interior_point, memory
from videoanchor_triton.anchor.memory import Plan, plan_solver, solver_memory_bytes
from videoanchor_triton.anchor.options import SolverOptions
from videoanchor_triton.anchor.problem import Problem, token_features
from videoanchor_triton.anchor.solver import SelfExpression, self_expression

from .tokens import DEVICES, planted_subspaces, vit_like


def random_features(n_tokens: int = 120, rank: int = 9, seed: int = 0) -> torch.Tensor:
    return torch.randn(rank, n_tokens, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def assert_same(first: SelfExpression, second: SelfExpression) -> None:
    """To the bit."""
    for name in ("indices", "values", "gap"):
        assert torch.equal(getattr(first, name), getattr(second, name))
    assert first.n_iter == second.n_iter


@pytest.mark.parametrize("n_tokens", [2, 3, 24, 120], ids=str)
def test_shapes_and_sums(n_tokens: int) -> None:
    found = self_expression(random_features(n_tokens))
    dense = found.to_dense()
    assert found.indices.shape == found.values.shape
    assert (found.indices.dtype, found.values.dtype, found.gap.dtype) == (torch.int64, torch.float64, torch.float64)
    assert (dense.shape, found.gap.shape, found.n_atoms) == ((n_tokens, n_tokens), (n_tokens,), n_tokens)
    assert 0 <= int(found.indices.min()) <= int(found.indices.max()) < n_tokens
    assert found.residual == float(found.gap.max()) <= found.tol == SolverOptions.tol
    torch.testing.assert_close(found.row_sums(), dense.sum(1), atol=1e-12, rtol=0)
    assert int((dense != 0).sum()) == int((found.values != 0).sum())  # an atom stands once in a row


def test_over_atoms_shapes_and_row_sums_are_those_of_the_atoms() -> None:
    Y = random_features()
    found = self_expression(Y[:, :5].contiguous(), atoms=Y[:, 5:].contiguous())
    assert (found.n_atoms, found.gap.shape, found.to_dense().shape) == (115, (5,), (115, 5))
    torch.testing.assert_close(found.row_sums(), found.to_dense().sum(1), atol=1e-12, rtol=0)
    assert found.row_sums().shape == (115,)
    none = self_expression(Y[:, :0], atoms=Y)
    assert (none.to_dense().shape, none.converged, none.residual, none.n_iter) == ((120, 0), True, 0.0, 0)


def test_over_one_atom() -> None:
    Y = random_features()
    found = self_expression(Y[:, :5].contiguous(), atoms=Y[:, 5:6].contiguous())
    assert found.converged
    assert found.to_dense().tolist() == [[1.0] * 5]


@pytest.mark.parametrize("Y", [torch.zeros(0, 7), torch.ones(3, 7), torch.zeros(3, 7), torch.ones(3, 1)], ids=str)
def test_equal_tokens_are_not_expressed(Y: torch.Tensor) -> None:
    found = self_expression(Y)
    assert (found.n_iter, found.residual, found.converged) == (0, 0.0, True)
    assert found.to_dense().shape == (Y.shape[1], Y.shape[1])
    assert not found.to_dense().any()


def test_no_tokens_give_an_empty_answer() -> None:
    found = self_expression(torch.zeros(3, 0))
    assert (found.to_dense().shape, found.row_sums().shape, found.converged) == ((0, 0), (0,), True)


@pytest.mark.parametrize("noise", [0.0, 0.05], ids=["exact", "noisy"])
def test_coefficients_stay_inside_the_subspace(noise: float) -> None:
    tokens, truth = planted_subspaces(noise=noise)
    found = self_expression(token_features(tokens, 12 if noise else None), SolverOptions(affine=False))
    magnitude = found.to_dense().abs().numpy()
    inside = truth[:, None] == truth[None, :]
    assert magnitude[inside].sum() >= (1 - 1e-3 if noise == 0 else 0.9) * magnitude.sum()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("rank", [6, 32])
def test_a_second_run_is_the_same_to_the_bit(rank: int, device: str) -> None:
    Y = token_features(vit_like().to(device), rank)
    assert_same(self_expression(Y), self_expression(Y))


@pytest.mark.parametrize("rank", [6, 32])
@pytest.mark.parametrize("n_threads", [2, 3])
def test_threads_change_no_bit(n_threads: int, rank: int) -> None:
    Y, before = token_features(vit_like(8, 64), rank), torch.get_num_threads()
    results = []
    try:
        for n in (1, n_threads):
            torch.set_num_threads(n)
            results.append(self_expression(Y))
            assert torch.get_num_threads() == n
    finally:
        torch.set_num_threads(before)
    assert_same(*results)


@pytest.mark.parametrize("exponent", [-40, 40])
def test_the_unit_of_features_changes_no_coefficient(exponent: int) -> None:
    """Powers of four, of which the roots of the weights are exact."""
    Y = random_features()
    first, second = self_expression(Y), self_expression(4.0**exponent * Y)
    torch.testing.assert_close(second.to_dense(), first.to_dense(), atol=1e-12, rtol=0)


@pytest.mark.parametrize("n_tokens", [1024, 2048])
def test_iterations_at_rank_64(n_tokens: int) -> None:
    """All starts counted; the smaller set is the first half of the frames of the larger."""
    Y = token_features(vit_like(32, 64)[:n_tokens], 64)
    weighted = Problem.of(Y, affine=True, alpha_e=800.0, alpha_z=800.0)
    found = interior_point.solve(weighted, None, tol=1e-3, plan=Plan(128, 1))
    assert found.gap.max() <= 1e-3
    assert 1 < found.n_iter.double().mean() <= 7


def test_iterations_of_two_starts_are_added() -> None:
    """Tokens in the hull of others end twice: over changing atoms, and in the solution that is meant."""
    Y = token_features(vit_like(8, 64), 6)
    hull = self_expression(Y).to_dense().abs().sum(0) < 1 + 1e-6
    weighted = Problem.of(Y, affine=True, alpha_e=800.0, alpha_z=800.0)
    n_iter = interior_point.solve(weighted, None, tol=1e-3, plan=Plan(64, 1)).n_iter.double()
    assert 50 < int(hull.sum()) < 500
    assert n_iter[hull].mean() > n_iter[~hull].mean() + 4


@pytest.mark.parametrize(
    ("Y", "atoms", "message"),
    [
        (torch.zeros(3), None, r"Y must be 2-D, \(rank, n_tokens\), got shape \(3,\)"),
        (torch.zeros(3, 4), torch.zeros(2, 4), r"atoms must have shape \(3, n_atoms\), n_atoms >= 1, got \(2, 4\)"),
        (torch.zeros(3, 4), torch.zeros(3, 0), r"atoms must have shape \(3, n_atoms\), n_atoms >= 1, got \(3, 0\)"),
        (torch.zeros(3, 4), torch.zeros(3), r"atoms must have shape \(3, n_atoms\), n_atoms >= 1, got \(3,\)"),
    ],
)
def test_wrong_shapes_are_refused(Y: torch.Tensor, atoms: torch.Tensor | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        self_expression(Y, atoms=atoms)


def test_says_once_which_tokens_did_not_converge() -> None:
    """A tolerance below what float64 resolves."""
    Y = token_features(vit_like(), 16)
    with pytest.warns(ConvergenceWarning) as caught:
        found = self_expression(Y, SolverOptions(tol=1e-17))
    assert len(caught) == 1
    missed = found.unconverged.tolist()
    assert not found.converged
    assert 10 < len(missed) <= 256
    assert 1e-17 < found.residual < 1e-6
    message = str(caught[0].message)
    assert f"{len(missed)} of 256 tokens did not come within tol=1e-17 of their optimum" in message
    assert message.endswith(f"raise tol. Tokens {', '.join(map(str, missed[:10]))}, ...")
    assert caught[0].filename == __file__


def test_what_is_not_finite_is_not_a_result() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            found = self_expression(torch.full((3, 40), torch.nan))
        except FloatingPointError:
            return
    assert len(found.unconverged) == 40
    assert len(caught) == 1


@pytest.mark.parametrize("seconds", [0.0, 0.05, 0.3], ids=str)
def test_reports_progress_four_times_a_second_at_most(seconds: float, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = itertools.count()
    monkeypatch.setattr(time, "monotonic", lambda: next(clock) * seconds)
    calls: list[Any] = []
    self_expression(random_features(200, 5), progress=lambda *call: calls.append(call))
    assert {(stage, total) for stage, _, total in calls} == {("solve", 200)}
    done = [count for _, count, _ in calls]
    assert done == sorted(done)
    if seconds == 0.3:
        assert done[-1] == 200
    assert len(done) <= {0.0: 1, 0.05: next(clock) / 5 + 1, 0.3: 200}[seconds]


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


@pytest.fixture
def one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # the peak is that of this thread
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("tol", [1e-3, 1e-5])
@pytest.mark.parametrize("rank", [6, 16, 48])
def test_memory_stays_within_what_is_announced(rank: int, tol: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "CHUNK_ELEMENTS", 20_000)
    Y = token_features(vit_like(8, 60), rank)
    plan = plan_solver(480, 480, rank, Y.device, None)
    announced = solver_memory_bytes(480, 480, rank, plan.block)
    with PeakMemory() as used:
        self_expression(Y, SolverOptions(tol=tol))
    assert announced / 3 < used.peak <= announced


@pytest.mark.usefixtures("one_thread")
def test_a_budget_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "CHUNK_ELEMENTS", 5_000)
    Y = token_features(vit_like(8, 60), 32)
    budget = solver_memory_bytes(480, 480, 32, 60)
    assert plan_solver(480, 480, 32, Y.device, budget) == Plan(60, 1)
    with PeakMemory() as used:
        found = self_expression(Y, SolverOptions(memory_budget=budget))
    assert found.converged
    assert used.peak <= budget < solver_memory_bytes(480, 480, 32, 480)


@pytest.mark.usefixtures("one_thread")
def test_memory_grows_with_the_number_of_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Twice the tokens take about twice the memory: there is no array over all pairs."""
    monkeypatch.setattr(memory, "CHUNK_ELEMENTS", 20_000)
    monkeypatch.setattr(memory, "LARGEST_BLOCK", 64)
    peaks = []
    for n_tokens in (480, 960):
        Y = token_features(vit_like(8, n_tokens // 8), 6)
        with PeakMemory() as used:
            self_expression(Y, SolverOptions(affine=False, tol=0.1))
        peaks.append(used.peak)
    assert peaks[1] < 2.2 * peaks[0]
    assert peaks[1] < 8 * 960**2


def test_too_many_tokens_are_refused_before_anything_is_allocated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "available_memory_bytes", lambda _: 2**27)
    Y = torch.randn(2, 500_000)
    with (
        PeakMemory() as used,
        pytest.raises(MemoryError, match=r"500000 tokens .* GiB on cpu, and may use 0\.062 GiB: use fewer frames"),
    ):
        self_expression(Y)
    assert used.peak == 0


def test_available_memory_is_known_here() -> None:
    assert (memory.available_memory_bytes(torch.device("cpu")) or 0) > 2**20
