import sys
import types
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.sparse
import scipy.sparse.linalg
import torch

from videoanchor_triton.anchor import eigenvectors
from videoanchor_triton.anchor.eigenvectors import SparseMatrix, leading_eigenvectors

from .tokens import DEVICES


def random_matrix(n: int, seed: int = 0, device: str = "cpu") -> tuple[SparseMatrix, np.ndarray]:
    """A sparse symmetric matrix with norm below 1, and the same as a dense array."""
    random = np.random.default_rng(seed)
    dense = random.standard_normal((n, n)) * (random.random((n, n)) < 0.05)
    dense = dense + dense.T
    dense /= 1.01 * np.abs(np.linalg.eigvalsh(dense)).max()
    return sparse(dense, device), dense


def sparse(dense: np.ndarray, device: str = "cpu") -> SparseMatrix:
    rows, columns = (torch.from_numpy(x.copy()).to(device) for x in dense.nonzero())
    offsets = torch.searchsorted(rows, torch.arange(len(dense) + 1, device=device))
    return SparseMatrix(rows, columns, offsets, torch.from_numpy(dense).to(device)[rows, columns])


def solve(matrix: SparseMatrix, count: int) -> tuple[np.ndarray, np.ndarray]:
    device = matrix.values.device
    start = torch.from_numpy(np.random.default_rng(1).uniform(-1, 1, matrix.size)).to(device)
    known = torch.zeros(matrix.size, 0, dtype=torch.float64, device=device)
    values, vectors = leading_eigenvectors(matrix, count, known, start)
    assert values.device == vectors.device == device
    return values.cpu().numpy(), vectors.cpu().numpy()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("n", "count"), [(3, 2), (60, 7), (513, 1), (700, 5), (600, 599)], ids=["3", "60", "513", "700", "600-many"]
)
def test_pairs_are_the_leading_ones(n, count, device):
    matrix, dense = random_matrix(n, device=device)
    values, vectors = solve(matrix, count)
    np.testing.assert_allclose(values, np.linalg.eigvalsh(dense)[::-1][:count], atol=1e-9)
    np.testing.assert_allclose(vectors.T @ vectors, np.eye(count), atol=1e-9)
    np.testing.assert_allclose(dense @ vectors, vectors * values, atol=1e-7)
    assert (vectors.max(0) == np.abs(vectors).max(0)).all()


@pytest.mark.parametrize("device", DEVICES)
def test_products_are_the_same_in_both_forms(device):
    matrix, dense = random_matrix(101, device=device)
    x = torch.randn(101, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = matrix.product(x.to(device)).cpu().numpy()
    np.testing.assert_allclose(found, dense @ x.numpy(), atol=1e-12)
    summed = torch.segment_reduce(matrix.values * x.to(device)[matrix.columns], "sum", offsets=matrix.offsets)
    np.testing.assert_allclose(summed.cpu().numpy(), found, atol=1e-12)
    np.testing.assert_array_equal(matrix.dense().cpu().numpy(), dense)


@pytest.mark.parametrize("n", [60, 600])
def test_known_eigenvectors_are_left_out(n):
    _, dense = random_matrix(n)
    pairs = np.linalg.eigh(dense)
    known = pairs.eigenvectors[:, [-1, -3]]
    dense = dense + known @ np.diag(1 - pairs.eigenvalues[[-1, -3]]) @ known.T
    start = torch.from_numpy(np.random.default_rng(1).uniform(-1, 1, n))
    values, vectors = leading_eigenvectors(sparse(dense), 3, torch.from_numpy(known), start)
    np.testing.assert_allclose(values.numpy(), pairs.eigenvalues[[-2, -4, -5]], atol=1e-9)
    np.testing.assert_allclose(known.T @ vectors.numpy(), 0, atol=1e-7)


@pytest.mark.parametrize("n", [60, 600])
def test_known_eigenvectors_are_left_out_where_all_others_are_negative(n):
    known = torch.full((n, 1), n**-0.5, dtype=torch.float64)
    start = torch.from_numpy(np.random.default_rng(1).uniform(-1, 1, n))
    values, vectors = leading_eigenvectors(sparse((np.ones((n, n)) - np.eye(n)) / (n - 1)), 5, known, start)
    np.testing.assert_allclose(values.numpy(), -1 / (n - 1), atol=1e-12)
    np.testing.assert_allclose(vectors.sum(0).numpy(), 0, atol=1e-9)


def test_many_eigenvectors_come_from_the_dense_matrix(monkeypatch):
    monkeypatch.setattr(eigenvectors, "_lanczos", None)
    matrix, dense = random_matrix(600)
    np.testing.assert_allclose(solve(matrix, 150)[0], np.linalg.eigvalsh(dense)[:-151:-1], atol=1e-12)
    with pytest.raises(TypeError, match="not callable"):
        solve(matrix, 149)


@pytest.mark.parametrize("n", [300, 900])
def test_repeated_eigenvalues_are_found_as_often_as_they_are_there(n):
    forward = np.roll(np.eye(n), 1, axis=1)
    values, _ = solve(sparse((forward + forward.T) / 2), 8)
    np.testing.assert_allclose(values, np.sort(np.cos(2 * np.pi * np.arange(n) / n))[::-1][:8], atol=1e-10)


def fake_cupy(monkeypatch, eigsh=scipy.sparse.linalg.eigsh, device_error: Exception | None = None) -> list[object]:
    """NumPy and SciPy under CuPy's names; returns the list of devices that were entered."""
    entered = []

    def device(index: int | None) -> nullcontext:
        entered.append(index)
        if device_error is not None:
            raise device_error
        return nullcontext()

    cupy = types.ModuleType("cupy")
    cupy.__dict__.update(from_dlpack=torch.Tensor.numpy, cuda=SimpleNamespace(Device=device))
    linalg = types.ModuleType("cupyx.scipy.sparse.linalg")
    linalg.__dict__.update(eigsh=eigsh, LinearOperator=scipy.sparse.linalg.LinearOperator)
    cupyx = types.ModuleType("cupyx")
    cupyx.__dict__["scipy"] = SimpleNamespace(sparse=SimpleNamespace(linalg=linalg))
    for module in (cupy, cupyx, linalg):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    for name in ("cupyx.scipy", "cupyx.scipy.sparse"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    eigenvectors._warn_once.cache_clear()
    return entered


def problem(n: int = 600) -> tuple[SparseMatrix, int, torch.Tensor, torch.Tensor]:
    start = torch.from_numpy(np.random.default_rng(1).uniform(-1, 1, n))
    return random_matrix(n)[0], 4, torch.zeros(n, 0, dtype=torch.float64), start


def test_cupy_is_asked_with_the_same_arguments(monkeypatch):
    asked = []

    def eigsh(operator, **options):
        asked.append(options)
        found = scipy.sparse.linalg.eigsh(operator, **options)
        options["v0"][:] = 0  # CuPy writes into it
        return found

    entered = fake_cupy(monkeypatch, eigsh)
    arguments = problem()
    before = arguments[-1].clone()
    values, vectors = eigenvectors._cuda_lanczos(*arguments)
    expected = eigenvectors._lanczos(*arguments, np, scipy.sparse.linalg)
    assert torch.equal(values, expected[0])
    assert torch.equal(vectors, expected[1])
    assert torch.equal(arguments[-1], before)
    assert entered == [None]
    assert [(options["k"], options["which"], options["tol"]) for options in asked] == [(4, "LA", 1e-12)]


def nan_eigsh(operator, k, **_options):
    return np.full(k, np.nan), np.full((operator.shape[0], k), np.nan)


def poor_eigsh(operator, k, **options):
    values, vectors = scipy.sparse.linalg.eigsh(operator, k=k, **options)
    return values, vectors + 1e-6


@pytest.mark.parametrize(
    ("fake", "message"),
    [
        (None, r"CuPy is not installed \(extras cu12, cu13\): SciPy iterates on the CPU"),
        ({"device_error": RuntimeError("CUDADriverError")}, r"CuPy failed \(CUDADriverError\): SciPy"),
        ({"device_error": MemoryError("full")}, r"CuPy failed \(full\): SciPy"),
        ({"eigsh": nan_eigsh}, "CuPy's eigenvectors have a residual of nan: SciPy"),
        ({"eigsh": poor_eigsh}, r"CuPy's eigenvectors have a residual of [0-9.]+e-0\d: SciPy"),
    ],
    ids=["missing", "driver", "memory", "nan", "not-converged"],
)
def test_cuda_without_a_working_cupy_iterates_in_scipy_and_says_so_once(fake, message, monkeypatch):
    fake_cupy(monkeypatch, **(fake or {}))
    if fake is None:
        monkeypatch.setitem(sys.modules, "cupy", None)
    arguments = problem()
    with pytest.warns(UserWarning, match=message) as caught:
        found = [eigenvectors._cuda_lanczos(*arguments) for _ in range(2)]
    assert len(caught) == 1
    expected = eigenvectors._lanczos(*arguments, np, scipy.sparse.linalg)
    assert all(torch.equal(one, other) for pair in found for one, other in zip(pair, expected, strict=True))


def test_an_iteration_that_does_not_converge_is_an_error():
    def eigsh(operator, **options):
        return scipy.sparse.linalg.eigsh(operator, maxiter=1, **options)

    arguments = problem()
    linalg = SimpleNamespace(eigsh=eigsh, LinearOperator=scipy.sparse.linalg.LinearOperator)
    with pytest.raises(scipy.sparse.linalg.ArpackNoConvergence, match="No convergence"):
        eigenvectors._lanczos(*arguments, np, linalg)
