import sys
import types
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.sparse.linalg
import torch

from videoanchor_triton.anchor import eigenvectors
from videoanchor_triton.anchor.eigenvectors import SparseMatrix, chebyshev_filtered, leading_eigenvectors

from .tokens import DEVICES

CPU = torch.device("cpu")


def random_matrix(n: int, seed: int = 0) -> np.ndarray:
    """A sparse symmetric positive semidefinite matrix with norm 1, as a dense array."""
    random = np.random.default_rng(seed)
    dense = random.standard_normal((n, n)) * (random.random((n, n)) < 0.05)
    dense = dense @ dense.T
    return dense / np.linalg.norm(dense, 2)


def sparse(dense: np.ndarray, device: str = "cpu") -> SparseMatrix:
    rows, columns = (torch.from_numpy(x.copy()).to(device) for x in dense.nonzero())
    offsets = torch.searchsorted(rows, torch.arange(len(dense) + 1, device=device))
    return SparseMatrix(rows, columns, offsets, torch.from_numpy(dense).to(device)[rows, columns])


def solve(dense: np.ndarray, count: int, method: str = "default", device: str = "cpu") -> tuple[np.ndarray, np.ndarray]:
    matrix = sparse(dense, device)
    if method == "chebyshev":
        start = torch.randn(len(dense), count + 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        values, vectors = chebyshev_filtered(matrix.product, start.to(device), count)
    else:
        values, vectors = leading_eigenvectors(matrix.product, matrix.dense, matrix.size, count, matrix.values.device)
    assert values.device == vectors.device == matrix.values.device
    return values.cpu().numpy(), vectors.cpu().numpy()


METHODS = pytest.mark.parametrize("method", ["default", "chebyshev"])


@METHODS
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("n", "count"), [(60, 7), (513, 1), (700, 5), (600, 80)], ids=["60", "513", "700", "600-many"])
def test_pairs_are_the_leading_ones(n, count, method, device):
    dense = random_matrix(n)
    values, vectors = solve(dense, count, method, device)
    assert (values.shape, vectors.shape) == ((count,), (n, count))
    np.testing.assert_allclose(values, np.linalg.eigvalsh(dense)[::-1][:count], atol=1e-9)
    np.testing.assert_allclose(vectors.T @ vectors, np.eye(count), atol=1e-9)
    np.testing.assert_allclose(dense @ vectors, vectors * values, atol=2e-10)


@pytest.mark.parametrize(("n", "count"), [(3, 2), (3, 3), (600, 599)], ids=str)
def test_nearly_all_pairs(n, count):
    dense = random_matrix(n)
    values, vectors = solve(dense, count)
    np.testing.assert_allclose(values, np.linalg.eigvalsh(dense)[::-1][:count], atol=1e-12)
    np.testing.assert_allclose(dense @ vectors, vectors * values, atol=1e-12)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("width", [1, 5])
def test_products_are_the_same_in_both_forms(width, device):
    dense = random_matrix(101) - 0.1 * np.eye(101)
    matrix = sparse(dense, device)
    x = torch.randn(101, width, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    np.testing.assert_allclose(matrix.product(x.to(device)).cpu().numpy(), dense @ x.numpy(), atol=1e-12)
    np.testing.assert_array_equal(matrix.dense().cpu().numpy(), dense)


def test_many_eigenvectors_come_from_the_dense_matrix(monkeypatch):
    monkeypatch.setattr(scipy.sparse.linalg, "eigsh", None)
    dense = random_matrix(600)
    np.testing.assert_allclose(solve(dense, 75)[0], np.linalg.eigvalsh(dense)[:-76:-1], atol=1e-12)
    with pytest.raises(TypeError, match="not callable"):
        solve(dense, 74)


@METHODS
@pytest.mark.parametrize("n", [300, 900])
def test_repeated_eigenvalues_are_found_as_often_as_they_are_there(n, method):
    """Of a ring they come in pairs, close to each other."""
    forward = np.roll(np.eye(n), 1, axis=1)
    values, vectors = solve(np.eye(n) / 2 + (forward + forward.T) / 4, 8, method)
    np.testing.assert_allclose(values, np.sort(0.5 + np.cos(2 * np.pi * np.arange(n) / n) / 2)[::-1][:8], atol=1e-10)
    np.testing.assert_allclose(vectors.T @ vectors, np.eye(8), atol=1e-9)


@pytest.mark.parametrize(
    ("rank", "method"), [(0, "chebyshev"), (3, "chebyshev"), (11, "chebyshev"), (3, "default"), (11, "default")]
)
def test_fewer_eigenvectors_than_asked_for(rank, method):
    """Where the others are of eigenvalue 0, any basis serves. ARPACK takes no matrix of zeros."""
    part = np.random.default_rng(0).standard_normal((600, rank))
    dense = part @ part.T
    values, vectors = solve(dense, 8, method)
    np.testing.assert_allclose(values, np.linalg.eigvalsh(dense)[:-9:-1], atol=1e-10)
    np.testing.assert_allclose(vectors.T @ vectors, np.eye(8), atol=1e-9)


@METHODS
def test_eigenvalues_of_very_unequal_size(method):
    """A token of massive norm: the small eigenvalues are as exact as roundoff of the largest lets them be."""
    dense = random_matrix(600)
    dense[3] *= 1e5
    dense[:, 3] *= 1e5
    values, vectors = solve(dense, 12, method)
    np.testing.assert_allclose(values, np.linalg.eigvalsh(dense)[:-13:-1], rtol=1e-6)
    assert np.abs(dense @ vectors - vectors * values).max() < 1e-12 * values[0]


@METHODS
def test_nothing_is_drawn_at_random(method):
    dense = random_matrix(600)
    for one, other in zip(solve(dense, 6, method), solve(dense, 6, method), strict=True):
        np.testing.assert_array_equal(one, other)


def test_filters_take_few_products():
    """52 here; a power iteration takes thousands."""
    matrix, products = torch.from_numpy(random_matrix(700)), []

    def product(x):
        products.append(x.shape[1])
        return matrix @ x

    start = torch.randn(700, 21, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    chebyshev_filtered(product, start, 5)
    assert set(products) == {21}
    assert len(products) <= 60


def test_filters_that_do_not_converge_are_an_error(monkeypatch):
    monkeypatch.setattr(eigenvectors, "MAX_FILTERS", 3)
    with pytest.raises(RuntimeError, match="6 eigenvectors were not found in 3 filters: move the tokens to the CPU"):
        solve(random_matrix(600), 6, "chebyshev")


def test_lanczos_that_does_not_converge_is_an_error(monkeypatch):
    eigsh = scipy.sparse.linalg.eigsh
    monkeypatch.setattr(scipy.sparse.linalg, "eigsh", lambda *args, **options: eigsh(*args, maxiter=1, **options))
    with pytest.raises(scipy.sparse.linalg.ArpackNoConvergence, match="No convergence"):
        solve(random_matrix(600), 6)


def broken_cupy(monkeypatch, error: Exception) -> None:
    """A CuPy whose kernels cannot be compiled."""

    def kernel(*_arguments: object) -> None:
        raise error

    cupy = types.ModuleType("cupy")
    cupy.__dict__.update(
        ElementwiseKernel=lambda *_: kernel,
        cuda=SimpleNamespace(Device=lambda _index: nullcontext()),
        **{name: (lambda *_args, **_options: None) for name in ("ones", "zeros", "arange")},
    )
    monkeypatch.setitem(sys.modules, "cupy", cupy)


@pytest.fixture
def untried():
    eigenvectors._cupy_kernel.cache_clear()
    yield
    eigenvectors._cupy_kernel.cache_clear()


@pytest.mark.usefixtures("untried")
def test_without_cupy_nothing_is_said(monkeypatch, recwarn):
    monkeypatch.setitem(sys.modules, "cupy", None)
    assert eigenvectors._cupy_kernel(0) is None
    assert not recwarn


@pytest.mark.usefixtures("untried")
def test_a_cupy_that_fails_is_left_out_and_says_so_once(monkeypatch):
    broken_cupy(monkeypatch, RuntimeError("NVRTC_ERROR_COMPILATION"))
    with pytest.warns(UserWarning, match=r"CuPy failed \(NVRTC_ERROR_COMPILATION\), torch multiplies") as caught:
        assert [eigenvectors._cupy_kernel(0) for _ in range(2)] == [None, None]
    assert len(caught) == 1
