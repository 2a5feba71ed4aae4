"""Leading eigenvectors of a sparse symmetric matrix: dense, SciPy's ARPACK, or CuPy's Lanczos on a CUDA device."""

import warnings
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import numpy as np
import scipy.sparse.linalg
import torch
from torch import Tensor

# Up to this many tokens, or this many tokens for each eigenvector, the matrix is decomposed as a dense one: as fast,
# and exact where eigenvalues repeat.
DENSE_TOKENS = 512
DENSE_RATIO = 4
# Of the eigensolvers, whose eigenvalues are in [0, 2]. Lanczos meets a repeated eigenvalue once, and its other
# eigenvectors only through roundoff, late: a larger tolerance misses them.
TOLERANCE = 1e-12
# Bound on |A v - lambda v| for the unit vectors v that CuPy returns.
RESIDUAL = 1e-8


@dataclass(frozen=True)
class SparseMatrix:
    """A square matrix in CSR form: row rows[e] and column columns[e] hold values[e]; row i starts at offsets[i].

    Its products do not depend on the order in which threads run, on CUDA as well, where cuSPARSE promises no such
    thing.
    """

    rows: Tensor
    columns: Tensor
    offsets: Tensor
    values: Tensor

    @property
    def size(self) -> int:
        return len(self.offsets) - 1

    @cached_property
    def _on_cpu(self) -> scipy.sparse.csr_array:
        entries = self.values.numpy(), self.columns.numpy(), self.offsets.numpy()
        return scipy.sparse.csr_array(entries, shape=(self.size, self.size))

    def product(self, x: Tensor) -> Tensor:
        """The matrix times (size,) x, float64."""
        if x.device.type == "cpu":  # many times faster there than segment_reduce
            return torch.from_numpy(self._on_cpu @ x.numpy())
        return torch.segment_reduce(self.values * x[self.columns], "sum", offsets=self.offsets, unsafe=True)

    def dense(self) -> Tensor:
        dense = torch.zeros(self.size, self.size, dtype=self.values.dtype, device=self.values.device)
        dense[self.rows, self.columns] = self.values
        return dense


def leading_eigenvectors(matrix: SparseMatrix, count: int, known: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
    """The algebraically largest eigenvalues of a symmetric matrix, and their eigenvectors, apart from known ones.

    Small matrices are decomposed as dense ones. Large ones are solved by Lanczos iteration: `scipy.sparse.linalg` on
    the CPU and `cupyx.scipy.sparse.linalg` on a CUDA device. On CUDA without CuPy, or where CuPy fails, SciPy iterates
    on the CPU with products made on the device, so that only vectors cross the bus; a warning says so once.

    Args:
        matrix: (N, N) symmetric, float64, eigenvalues in [-1, 1].
        count: 1 <= count <= N - p.
        known: (N, p) orthonormal eigenvectors of eigenvalue 1.
        start: (N,) float64, the first vector of the iteration.

    Returns:
        (count,) eigenvalues, largest first, and (N, count) orthonormal eigenvectors, orthogonal to `known`, each with
        its entry of largest magnitude positive; float64.

    Raises:
        scipy.sparse.linalg.ArpackNoConvergence: the iteration did not converge.
    """
    if matrix.size <= max(DENSE_TOKENS, DENSE_RATIO * count):
        identity = torch.eye(matrix.size, dtype=start.dtype, device=start.device)
        values, vectors = torch.linalg.eigh(matrix.dense() + identity - 2 * (known @ known.T))
    elif start.device.type == "cuda":
        values, vectors = _cuda_lanczos(matrix, count, known, start)
    else:
        values, vectors = _lanczos(matrix, count, known, start, np, scipy.sparse.linalg)
    order = values.argsort(descending=True, stable=True)[:count]
    values, vectors = values[order] - 1, vectors[:, order]
    largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
    return values, vectors * largest.sign()


def _shifted(matrix: SparseMatrix, known: Tensor, x: Tensor) -> Tensor:
    """A x + x - 2 K K'x: all eigenvalues are >= 0, so that the known ones, now 0, cannot come out on top."""
    return matrix.product(x) + x - 2 * (known @ (known.T @ x))


def _cuda_lanczos(matrix: SparseMatrix, count: int, known: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
    try:
        import cupy  # pyright: ignore[reportMissingImports]
        import cupyx.scipy.sparse.linalg  # pyright: ignore[reportMissingImports]

        with cupy.cuda.Device(start.device.index):
            values, vectors = _lanczos(matrix, count, known, start, cupy, cupyx.scipy.sparse.linalg)
        # CuPy gives up without a word, and divides by zero when the Krylov space is exhausted.
        pairs = zip(values, vectors.T, strict=True)
        residual = torch.stack([(_shifted(matrix, known, v) - value * v).norm() for value, v in pairs]).amax()
        if residual <= RESIDUAL:
            return values, vectors
        reason = f"CuPy's eigenvectors have a residual of {float(residual):.2g}"
    except ImportError:
        reason = "CuPy is not installed (extras cu12, cu13)"
    except Exception as error:  # CUDA, compiler and memory errors have no common base in CuPy
        reason = f"CuPy failed ({error})"
    _warn_once(f"{reason}: SciPy iterates on the CPU for the eigenvectors")
    return _lanczos(matrix, count, known, start, np, scipy.sparse.linalg)


def _lanczos(
    matrix: SparseMatrix, count: int, known: Tensor, start: Tensor, xp: Any, linalg: Any
) -> tuple[Tensor, Tensor]:
    """The same calls for NumPy with SciPy and for CuPy; arrays change hands by DLPack, without a copy on one device."""

    def to_array(x: Tensor) -> Any:
        return xp.from_dlpack(x.cpu() if xp is np else x)

    def to_tensor(x: Any) -> Tensor:
        return torch.from_dlpack(x).to(start.device)

    operator = linalg.LinearOperator(
        (matrix.size, matrix.size),
        matvec=lambda x: to_array(_shifted(matrix, known, to_tensor(x))),
        dtype=np.dtype(np.float64),
    )
    first = to_array(start.clone())  # CuPy writes into it
    values, vectors = linalg.eigsh(operator, k=count, which="LA", v0=first, tol=TOLERANCE)
    return to_tensor(values), to_tensor(vectors)


@cache
def _warn_once(message: str) -> None:
    warnings.warn(message, stacklevel=2)
