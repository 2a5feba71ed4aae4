"""Leading eigenvectors of a positive semidefinite matrix: LAPACK, ARPACK, or Chebyshev filters on a CUDA device."""

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import scipy.linalg
import scipy.sparse.linalg
import torch
from torch import Tensor

# Up to this size, or this many times the eigenvectors, the matrix is decomposed as a dense one: as fast, and exact.
DENSE_SIZE = 512
DENSE_RATIO = 8
# ARPACK meets a repeated eigenvalue once, and its other eigenvectors only through roundoff, late: a larger tolerance
# misses them.
ARPACK_TOLERANCE = 1e-12
# Of Chebyshev filters: |A v - lambda v| <= RESIDUAL lambda, or roundoff of the largest lambda; vectors in a block
# beyond those that are asked for; how much more a filter may make of the leading vector than of the block's last, so
# that the block stays of full rank; a filter's degree; and filters before it is given up.
RESIDUAL = 1e-10
GUARD = 16
AMPLIFICATION = 1e8
MAX_DEGREE = 64
MAX_FILTERS = 300
ROW_SUMS = """
    double sum = 0;
    for (long long e = offsets[i / width]; e < offsets[i / width + 1]; ++e)
        sum += values[e] * x[columns[e] * width + i % width];
    y = sum;
"""


@dataclass(frozen=True)
class SparseMatrix:
    """A square matrix in CSR form: row rows[e] and column columns[e] hold values[e]; row i starts at offsets[i].

    Its products do not depend on the order in which threads run, on CUDA as well, where cuSPARSE promises no such
    thing: there a kernel by CuPy sums each row, or torch where CuPy is not installed.
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
        entries = self.values.numpy(), self.columns.int().numpy(), self.offsets.int().numpy()
        return scipy.sparse.csr_array(entries, shape=(self.size, self.size))

    def product(self, x: Tensor) -> Tensor:
        """The matrix times (size, b) x, float64."""
        if x.device.type == "cpu":  # many times faster there than segment_reduce; and a vector, than a block of one
            block = x.numpy()
            return torch.from_numpy(self._on_cpu @ (block[:, 0] if block.shape[1] == 1 else block)).view(x.shape)
        kernel = _cupy_kernel(x.device.index)
        if kernel is None:
            return torch.segment_reduce(
                self.values[:, None] * x[self.columns], "sum", offsets=self.offsets, unsafe=True
            )
        import cupy  # pyright: ignore[reportMissingImports]

        y, stream = torch.empty(x.shape, dtype=x.dtype, device=x.device), torch.cuda.current_stream(x.device)
        with cupy.cuda.Device(x.device.index), cupy.cuda.ExternalStream(stream.cuda_stream, x.device.index):
            values, columns, offsets, x, out = (
                cupy.from_dlpack(part) for part in (self.values, self.columns, self.offsets, x.contiguous(), y)
            )
            kernel(values, columns, offsets, x, y.shape[1], out)
        return y

    def dense(self) -> Tensor:
        dense = torch.zeros(self.size, self.size, dtype=self.values.dtype, device=self.values.device)
        dense[self.rows, self.columns] = self.values
        return dense


@cache
def _cupy_kernel(device: int) -> Any:
    """The product of a sparse matrix and a block, a thread an entry of the result, which has been tried on the device;
    None without CuPy, and where it fails, which a warning says once."""
    try:
        import cupy  # pyright: ignore[reportMissingImports]

        arguments = "raw float64 values, raw int64 columns, raw int64 offsets, raw float64 x, int64 width"
        kernel = cupy.ElementwiseKernel(arguments, "float64 y", ROW_SUMS, "videoanchor_row_sums")
        with cupy.cuda.Device(device):
            one = cupy.ones(1)
            kernel(one, cupy.zeros(1, dtype="int64"), cupy.arange(2, dtype="int64"), one, 1, cupy.ones(1))
    except ImportError:
        return None
    except Exception as error:  # CUDA, compiler and memory errors have no common base in CuPy
        warnings.warn(
            f"CuPy failed ({error}), torch multiplies by the affinity: install CuPy for this CUDA", stacklevel=2
        )
        return None
    return kernel


def leading_eigenvectors(
    product: Callable[[Tensor], Tensor], dense: Callable[[], Tensor], size: int, count: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """The largest eigenvalues of a symmetric positive semidefinite matrix, and their eigenvectors.

    Small matrices, and those of which many eigenvectors are wanted, are decomposed by LAPACK. Of large ones ARPACK
    finds them on the CPU, and `chebyshev_filtered` on a CUDA device. Nothing is drawn at random.

    Args:
        product: the matrix times a block (size, b), float64 on `device`.
        dense: makes the matrix as a dense one, which may be overwritten.
        size: N.
        count: 1 <= count <= N.
        device: where it is computed.

    Returns:
        (count,) eigenvalues, largest first, and (N, count) orthonormal eigenvectors; float64.

    Raises:
        scipy.sparse.linalg.ArpackNoConvergence, RuntimeError: the iteration did not converge.
    """
    draw, is_small = torch.Generator().manual_seed(0), size <= max(DENSE_SIZE, DENSE_RATIO * count)
    if device.type != "cpu" and not is_small:
        start = torch.randn(size, count + GUARD, dtype=torch.float64, generator=draw)
        return chebyshev_filtered(product, start.to(device), count)
    if device.type != "cpu":
        values, vectors = torch.linalg.eigh(dense())
    elif is_small:
        last = (size - count, size - 1)
        values, vectors = scipy.linalg.eigh(dense().numpy(), subset_by_index=last, overwrite_a=True)
        if len(values) < count:  # which LAPACK does where many eigenvalues are equal
            values, vectors = scipy.linalg.eigh(dense().numpy(), driver="evd")
    else:
        operator = scipy.sparse.linalg.LinearOperator(
            (size, size),
            matvec=lambda x: product(torch.from_numpy(x).view(-1, 1)).numpy()[:, 0],  # pyright: ignore[reportCallIssue]
            dtype="float64",  # pyright: ignore[reportCallIssue]
        )
        first = torch.rand(size, dtype=torch.float64, generator=draw).numpy()
        values, vectors = scipy.sparse.linalg.eigsh(operator, count, which="LA", v0=first, tol=ARPACK_TOLERANCE)  # pyright: ignore[reportArgumentType]
    values, vectors = torch.as_tensor(values), torch.as_tensor(vectors)
    return values[-count:].flip(0), vectors[:, -count:].flip(1)


def chebyshev_filtered(product: Callable[[Tensor], Tensor], start: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Block power iteration with Chebyshev polynomials (Zhou, Saad, Tiago and Chelikowsky, 2006).

    A polynomial of the matrix that is within 1 from 0 to the block's least Ritz value, and grows fastest beyond, takes
    the place of the power; between two of them the block is made orthonormal and turned to its Ritz vectors.

    Args:
        product: see `leading_eigenvectors`.
        start: (N, b) float64 on the device, b > count.
        count: eigenvectors to find.

    Returns:
        (count,) and (N, count), see `leading_eigenvectors`.

    Raises:
        RuntimeError: not within MAX_FILTERS.
    """
    roundoff = 4 * len(start) ** 0.5 * torch.finfo(start.dtype).eps
    block = start
    for _ in range(MAX_FILTERS):
        block = torch.linalg.qr(block).Q
        image = product(block)
        values, turn = torch.linalg.eigh(block.T @ image)
        values, turn = values.flip(0), turn.flip(1)
        block, image = block @ turn, image @ turn
        residual = (image - block * values).norm(dim=0)[:count]
        missed = (residual > torch.maximum(RESIDUAL * values[:count], roundoff * values[0])).any()
        top, least, missed = torch.stack([values[0], values[-1], missed.double()]).tolist()
        if not missed:
            return values[:count], block[:, :count]
        half = max(least / 2, torch.finfo(start.dtype).eps * top)
        growth = math.acosh(max(top / half - 1, 1 + 1e-9))  # of the leading vector's part, for each degree
        degree = min(MAX_DEGREE, max(1, int(math.log(2 * AMPLIFICATION) / growth)))
        before, block = block, image / half - block
        for _ in range(degree - 1):
            before, block = block, product(block).div_(half / 2).sub_(block, alpha=2).sub_(before)
    raise RuntimeError(f"{count} eigenvectors were not found in {MAX_FILTERS} filters: move the tokens to the CPU")
