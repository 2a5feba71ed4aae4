import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA

from videoanchor_triton.anchor import eigenvectors, memory, problem
from videoanchor_triton.anchor.eigenvectors import chebyshev_filtered
from videoanchor_triton.anchor.problem import (
    Problem,
    as_tokens,
    computing_precision,
    fit_features,
    penalty_weights,
    token_features,
)

from .reference import textbook_weights
from .tokens import DEVICES, vit_like


@pytest.mark.parametrize("shape", [(50, 7), (50, 50), (33, 120)], ids=str)
@pytest.mark.parametrize("rank", [1, 5])
@pytest.mark.parametrize("block", [8, 1024], ids="block{}".format)
@pytest.mark.parametrize("device", DEVICES)
def test_pca_agrees_with_scikit_learn(shape, rank, block, device, monkeypatch):
    monkeypatch.setattr(problem, "PCA_BLOCK", block)
    monkeypatch.setattr(problem, "PCA_PANEL", block // 2)
    tokens = torch.randn(shape, generator=torch.Generator().manual_seed(0)) + 5
    features = fit_features(tokens.to(device), rank)
    found = features.values.cpu().numpy() * features.scale
    expected = PCA(rank, svd_solver="full").fit_transform(tokens.double().numpy()).T
    largest = np.take_along_axis(expected, np.abs(expected).argmax(1)[:, None], 1)
    np.testing.assert_allclose(found, expected * np.sign(largest), atol=1e-9)
    assert (found.max(1) >= -found.min(1)).all()


def test_features_do_not_depend_on_a_rotation_of_the_tokens():
    tokens = vit_like(4, 20).double()
    rotation = torch.linalg.qr(torch.randn(128, 128, generator=torch.Generator().manual_seed(0)).double()).Q
    turned, plain = (fit_features(x, 16) for x in (tokens @ rotation, tokens))
    torch.testing.assert_close(turned.values * turned.scale, plain.values * plain.scale, atol=1e-9, rtol=0)


@pytest.mark.parametrize(
    ("tokens", "rank"),
    [
        (torch.randn(5, 20), 4),
        (torch.randn(20, 3), 3),
        (torch.randn(20, 2) @ torch.randn(2, 30) + 1, 2),
        (torch.ones(9, 30) * 0.1, 0),
        (torch.zeros(9, 3), 0),
        (torch.randn(1, 30), 0),
        (1e6 + torch.randn(30, 1) @ torch.ones(1, 4), 1),
    ],
    ids=["tokens-1", "features", "numerical", "constant", "zero", "one-token", "large-mean"],
)
def test_rank_is_clipped_to_what_the_tokens_have(tokens, rank):
    assert token_features(tokens.double(), 16).shape == (rank, len(tokens))


def test_no_rank_means_the_tokens_themselves():
    tokens = vit_like(2, 10)
    features = fit_features(tokens, None)
    assert torch.equal(features.values * features.scale, tokens.double().T)
    assert 1 <= features.values.abs().max() < 2


@pytest.mark.parametrize("chunk", [50, 1 << 20], ids="chunk{}".format)
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("rank", [6, 30])
def test_weights_follow_their_definition(rank, chunk, device, monkeypatch):
    monkeypatch.setattr(memory, "CHUNK_ELEMENTS", chunk)
    Y = token_features(torch.randn(33, 40, generator=torch.Generator().manual_seed(0)), rank)
    found = penalty_weights(Y.to(device), 800.0, 700.0)
    assert found == pytest.approx(textbook_weights(Y.numpy(), 800.0, 700.0), rel=1e-12)


@pytest.mark.parametrize(
    ("Y", "mu_e", "mu_z"),
    [
        (torch.tensor([[1.0, 2.0, 0.0], [1.0, 0.0, 0.0]]), 2.0, 2.0),
        (torch.tensor([[1.0, 2.0, 1e-17], [1.0, 0.0, 0.0]]), 2.0, 2.0),
        (torch.eye(3) * 3, 3.0, 9.0),
        (torch.tensor([[0.0, 4.0, 0.0]]), 4.0, 16.0),
        (torch.zeros(2, 3), 1.0, 1.0),
        (torch.zeros(0, 3), 1.0, 1.0),
    ],
    ids=["zero-token", "roundoff-token", "orthogonal", "one-nonzero", "all-zero", "rank-0"],
)
def test_weights_stay_finite(Y, mu_e, mu_z):
    assert penalty_weights(Y.double(), 800.0, 400.0) == pytest.approx((800 / mu_e, 400 / mu_z))


@pytest.mark.parametrize("shape", [(60, 9), (40, 300), (900, 700), (1100, 1100)], ids=str)
@pytest.mark.parametrize("rank", [1, 6, None])
def test_other_tokens_are_transformed_as_the_fitted_ones(shape, rank, monkeypatch):
    monkeypatch.setattr(memory, "CHUNK_ELEMENTS", 1000)
    tokens = 3 + torch.randn(shape, generator=torch.Generator().manual_seed(0))
    features = fit_features(tokens, rank)
    torch.testing.assert_close(features.transform(tokens), features.values, atol=1e-12, rtol=0)
    if rank is not None:
        assert features.axes is not None
        identity = torch.eye(rank, dtype=torch.float64)
        torch.testing.assert_close(features.axes.T @ features.axes, identity, atol=1e-12, rtol=0)
        centred = tokens.double() / features.scale - features.mean
        assert centred.mean(0).abs().max() < 1e-12
        torch.testing.assert_close(features.transform(tokens + features.axes.T[0] * features.scale)[0],
                                   features.values[0] + 1, atol=1e-4, rtol=0)  # fmt: skip
    assert features.transform(tokens[:0]).shape == (len(features.values), 0)


@pytest.mark.parametrize("shape", [(700, 600), (600, 700)], ids=str)
def test_an_iterative_solver_finds_the_axes_of_large_problems(shape, monkeypatch):
    """ARPACK on the CPU and Chebyshev filters on CUDA, where LAPACK would decompose the whole matrix."""
    tokens = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * torch.arange(1, shape[1] + 1) ** -0.5
    found = fit_features(tokens, 12)
    monkeypatch.setattr(eigenvectors, "DENSE_SIZE", 10_000)
    exact = fit_features(tokens, 12)
    assert not torch.equal(found.values, exact.values)
    torch.testing.assert_close(found.values, exact.values, atol=1e-9, rtol=0)
    start = torch.randn(600, 28, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def filtered(product, _dense, _size, count, _device):
        return chebyshev_filtered(product, start, count)

    monkeypatch.setattr(problem, "leading_eigenvectors", filtered)
    torch.testing.assert_close(fit_features(tokens, 12).values, exact.values, atol=1e-9, rtol=0)


@pytest.mark.parametrize("iterative", [False, True])
@pytest.mark.parametrize("tokens", [torch.ones(30, 40) / 3, torch.zeros(30, 40)], ids=["equal", "zero"])
def test_equal_tokens_have_no_axes(tokens, iterative, monkeypatch):
    monkeypatch.setattr(eigenvectors, "DENSE_SIZE", 0 if iterative else 512)
    monkeypatch.setattr(eigenvectors, "DENSE_RATIO", 0 if iterative else 8)
    features = fit_features(tokens, 8)
    assert features.axes is not None
    assert (features.values.shape, features.axes.shape) == ((0, 30), (40, 0))
    assert features.transform(tokens[:3]).shape == (0, 3)


SCALES = [
    (torch.float64, 1e160),
    (torch.float64, 1e-170),
    (torch.float64, 1e300),
    (torch.float64, 1e-310),
    (torch.float32, 1e-42),
    (torch.float32, 1e38),
    (torch.bfloat16, 1e30),
]


@pytest.mark.parametrize(("dtype", "size"), SCALES, ids=str)
@pytest.mark.parametrize("rank", [5, None])
def test_the_scale_of_the_tokens_does_not_matter(dtype, size, rank):
    """Problems of tokens in the range where squares overflow or vanish are those of the same tokens near 1."""
    tokens = (torch.randn(30, 12, generator=torch.Generator().manual_seed(0)).double() * size / 4).to(dtype)
    near_one = tokens.double() / 2.0 ** np.floor(np.log2(size))
    features, plain = fit_features(tokens, rank), fit_features(near_one, rank)
    assert torch.equal(features.values, plain.values)
    weights = {"affine": True, "alpha_e": 800.0, "alpha_z": 800.0}
    problems = [Problem.of(Y, **weights) for Y in (features.values, tokens.T, plain.values, near_one.T)]
    for found, same in zip(problems[:2], problems[2:], strict=True):
        assert torch.equal(found.atoms, same.atoms)
        assert found.error_bound == same.error_bound
        assert torch.isfinite(found.atoms).all()
    assert problems[0].unit == problems[2].unit
    assert (problems[0].unit * features.values == problems[0].atoms).all()


def test_scaling_by_a_power_of_two_loses_no_bit():
    tokens = torch.randn(30, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for size in (1.0, 2.0**-1060, 2.0**1000):
        x = tokens * size
        scale = problem.power_of_two(x)
        assert 1 <= (x / scale).abs().max() < 2
        assert torch.equal(x / scale * scale, x)
    assert problem.power_of_two(torch.tensor([5e-324], dtype=torch.float64)) == 5e-324
    assert problem.power_of_two(torch.tensor([-1.7e308, 3.0], dtype=torch.float64)) == 2.0**1023
    assert problem.power_of_two(torch.zeros(3)) == problem.power_of_two(torch.zeros(0)) == 1.0


@pytest.mark.parametrize("size", [1e4, 1e8])
def test_weights_beside_one_huge_token_are_the_published_ones(size):
    Y = fit_features(torch.randn(40, 9, generator=torch.Generator().manual_seed(0)), None).values
    Y[:, 7] *= size
    Y[:, 3] -= Y[:, 7] * (Y[:, 7] @ Y[:, 3]) / Y[:, 7].square().sum()  # the one that says what mu_z is
    found = penalty_weights(Y, 800.0, 700.0)
    assert found == pytest.approx(textbook_weights(Y.numpy(), 800.0, 700.0), rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_precision_of_the_tokens(dtype):
    tokens = torch.randn(3, 4).to(dtype).requires_grad_()
    found = as_tokens(tokens)
    assert (found.dtype, found.requires_grad) == (dtype, False)
    assert found.data_ptr() == tokens.data_ptr()
    assert computing_precision(found) == (torch.float64 if dtype == torch.float64 else torch.float32)


@pytest.mark.parametrize("shape", [(40, 7), (7, 40)], ids=str)
@pytest.mark.parametrize("rank", [3, None])
def test_features_of_half_precision_are_those_of_the_same_numbers(rank, shape, monkeypatch):
    monkeypatch.setattr(problem, "PCA_BLOCK", 16)
    tokens = torch.randn(shape, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert torch.equal(token_features(tokens, rank), token_features(tokens.double(), rank))


PEAK = """
import re, sys, torch
from pathlib import Path
from videoanchor_triton.anchor.problem import as_tokens, features_memory_bytes, token_features
torch.set_num_threads(1)
token_features(torch.randn(600, 200), 8)  # what libraries allocate once
n_tokens, n_features = int(sys.argv[1]), int(sys.argv[2])
tokens = torch.empty(n_tokens, n_features, dtype=torch.bfloat16)
for block in tokens.split(1024):
    block.normal_()
status, reset = Path("/proc/self/status"), Path("/proc/self/clear_refs")
reset.write_text("5")  # the peak is the present again
before = int(re.search(r"VmHWM:\\s+(\\d+)", status.read_text())[1])
token_features(as_tokens(tokens), 32)
used = (int(re.search(r"VmHWM:\\s+(\\d+)", status.read_text())[1]) - before) * 1024
print(used, features_memory_bytes(n_tokens, n_features, 32), tokens.nbytes)
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="only Linux says what a process held at most")
def test_memory_of_the_features():
    """Seen from outside, since torch's own temporaries are not tensors: a cast of all tokens would be four times
    theirs."""
    environment = {**os.environ, "PYTHONPATH": str(Path(problem.__file__).parents[2])}
    command = [sys.executable, "-c", PEAK, "65536", "512"]
    used = announced = of_tokens = 0
    for _ in range(3):  # what else runs on the machine can only add, huge pages among it
        out = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        used, announced, of_tokens = map(int, out.stdout.split())
        if used <= announced + 2**23:
            break
    assert used <= announced + 2**23, "the allocator rounds up"
    assert announced < 1.5 * of_tokens


def test_numpy_tokens():
    tokens = np.arange(12, dtype=np.float32).reshape(3, 4)[::-1]
    tokens.flags.writeable = False
    assert np.array_equal(as_tokens(tokens).numpy(), tokens)
    assert as_tokens(tokens.astype(np.float16)).dtype == torch.float16
    assert np.array_equal(as_tokens(tokens.astype(">f8")).numpy(), tokens)


class ForeignArray:
    """What CuPy's arrays and torch have in common: DLPack, and nothing else."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor

    def __dlpack__(self, **options):
        return self.tensor.__dlpack__(**options)

    def __dlpack_device__(self):
        return self.tensor.__dlpack_device__()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64], ids=str)
def test_tokens_of_another_library_stay_where_they_are(dtype, device):
    tokens = torch.randn(5, 3, generator=torch.Generator().manual_seed(0)).to(device, dtype).T
    found = as_tokens(ForeignArray(tokens))
    assert found.device == tokens.device
    assert torch.equal(found, as_tokens(tokens))
    assert found.data_ptr() == tokens.data_ptr()


@pytest.mark.parametrize(
    ("tokens", "error", "message"),
    [
        (ForeignArray(torch.ones(2, 2).int()), TypeError, "floating-point type, got torch.int32"),
        (ForeignArray(torch.full((2, 2), torch.nan)), ValueError, "got 4 NaN"),
        ([[1.0]], TypeError, "X must be a torch tensor, a numpy array or another DLPack array, got list"),
        (torch.ones(2, 2, dtype=torch.int64), TypeError, "floating-point type, got torch.int64"),
        (np.ones((2, 2), dtype=np.complex128), TypeError, "numpy array of complex128"),
        (torch.ones(3), ValueError, r"2-D, \(n_tokens, n_features\), got shape \(3,\)"),
        (torch.ones(1, 3, 2), ValueError, r"got shape \(1, 3, 2\)"),
        (torch.ones(3, 0), ValueError, "at least one feature"),
        (torch.tensor([[1.0, 2.0], [3.0, torch.nan], [torch.inf, 0.0]]), ValueError, "got 2 NaN.* token 1, feature 1"),
        (torch.tensor([[1e5]]).half(), ValueError, "got 1 NaN or infinite"),
    ],
    ids=[
        "foreign-integer",
        "foreign-nan",
        "list",
        "integer",
        "complex",
        "1-D",
        "3-D",
        "no-features",
        "nan",
        "half-overflow",
    ],
)
def test_bad_tokens_are_refused(tokens, error, message):
    with pytest.raises(error, match=message):
        as_tokens(tokens)
