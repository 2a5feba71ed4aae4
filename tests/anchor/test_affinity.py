import numpy as np
import pytest
import scipy.sparse
import torch

from videoanchor_triton.anchor.affinity import affinity_matrix, coefficient_matrix, majority_labels, scipy_matrix
from videoanchor_triton.anchor.options import SolverOptions
from videoanchor_triton.anchor.problem import token_features
from videoanchor_triton.anchor.solver import SelfExpression, self_expression

from .tokens import DEVICES, vit_like


def sparse_rows(n_tokens: int, k: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Signed coefficients without self-expression, a third of the slots unused, with an arbitrary index there."""
    random = np.random.default_rng(seed)
    others = [random.choice(np.delete(np.arange(n_tokens), j), k, replace=False) for j in range(n_tokens)]
    values = random.standard_normal((n_tokens, k)) * (random.random((n_tokens, k)) < 2 / 3)
    return torch.from_numpy(np.stack(others)), torch.from_numpy(values)


def dense_coefficients(indices: torch.Tensor, values: torch.Tensor) -> np.ndarray:
    dense = np.zeros((len(values), len(values)))
    for j, (row, weights) in enumerate(zip(indices.cpu().numpy(), values.cpu().numpy(), strict=True)):
        for i, weight in zip(row, weights, strict=True):
            dense[i, j] += weight
    return dense


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize(("n_tokens", "k"), [(2, 1), (7, 3), (53, 52)], ids=str)
def test_matrices_hold_the_rows(n_tokens, k, index_dtype, dtype, device):
    indices, values = sparse_rows(n_tokens, k)
    indices, values = indices.to(device, index_dtype), values.to(device, dtype)
    expected = dense_coefficients(indices, values)
    coef = coefficient_matrix(indices, values)
    assert isinstance(coef, scipy.sparse.csc_array)
    assert (coef.dtype, coef.nnz) == (values.cpu().numpy().dtype, int((values != 0).sum()))
    assert coef.has_canonical_format
    np.testing.assert_array_equal(coef.toarray(), expected)
    affinity = affinity_matrix(indices, values)
    assert (affinity.dtype, affinity.device, affinity.is_coalesced()) == (torch.float64, values.device, True)
    np.testing.assert_array_equal(affinity.to_dense().cpu().numpy(), np.abs(expected) + np.abs(expected).T)
    copy = scipy_matrix(affinity)
    assert isinstance(copy, scipy.sparse.csr_array)
    assert copy.has_canonical_format
    np.testing.assert_array_equal(copy.toarray(), affinity.to_dense().cpu().numpy())


@pytest.mark.parametrize("rank", [8, 24])
def test_what_the_tolerance_leaves_open_is_no_link(rank):
    features = token_features(vit_like(16), rank)
    rough, exact = (self_expression(features, SolverOptions(tol=tol)) for tol in (1e-3, 1e-7))
    found, everything, optimal = (
        affinity.to_dense()
        for affinity in (rough.affinity(), *(affinity_matrix(x.indices, x.values) for x in (rough, exact)))
    )
    assert (found <= everything).all()
    assert (found > 0).sum() < 0.8 * (everything > 0).sum()
    assert (found - optimal).abs().sum() < (everything - optimal).abs().sum()


@pytest.mark.parametrize(
    ("tol", "kept"), [(torch.inf, [3.0, 2.0]), (0.0, [3.0, 2.0]), (0.4, [3.0, 2.0]), (4.0, [3.0, 0.0])]
)
def test_links_are_left_out_by_the_tolerance(tol, kept):
    indices, values = torch.tensor([[1, 2], [0, 2], [0, 1]]), torch.tensor([[3.0, -2.0], [0.0, 0.0], [0.0, 0.0]])
    solution = SelfExpression(indices, values.double(), torch.zeros(3), 0, tol, 3)
    assert solution.affinity().to_dense()[0].tolist() == [0.0, *kept]


def test_affinity_of_coefficients_that_are_not_finite():
    solution = SelfExpression(torch.tensor([[1], [0]]), torch.tensor([[torch.nan], [1.0]]), torch.zeros(2), 0, 1e-3, 2)
    with pytest.raises(ValueError, match="got NaN"):
        solution.affinity()


def test_tokens_over_other_atoms_have_no_affinity():
    solution = self_expression(torch.randn(3, 9), atoms=torch.randn(3, 7))
    with pytest.raises(ValueError, match="9 tokens over 7 atoms"):
        solution.affinity()


def test_majority_labels():
    weights = scipy.sparse.csr_array([[0.2, 0.3, 0.4, 0], [0.5, 0.25, 0.25, 9], [0, 0, 0, 9], [0, 0, 0, 0]])
    labels = np.array([0, 0, 1, -1])
    assert majority_labels(weights, labels, 3).tolist() == [0, 0, -1, -1], "0.2 + 0.3 > 0.4; without label no vote"
    assert majority_labels(weights, np.array([2, 1, 1, -1]), 3).tolist() == [1, 1, -1, -1], "equal: the lowest"


@pytest.mark.parametrize("shape", [(0, 0), (0, 3), (4, 0)], ids=str)
def test_nothing_to_hold(shape):
    indices, values = torch.zeros(shape, dtype=torch.int64), torch.zeros(shape)
    assert coefficient_matrix(indices, values).shape == (shape[0], shape[0])
    assert affinity_matrix(indices, values).shape == (shape[0], shape[0])
    assert scipy_matrix(affinity_matrix(indices, values)).nnz == 0


def test_unused_slots_may_have_any_index():
    indices, values = torch.tensor([[1, 99], [0, -5]]), torch.tensor([[2.0, 0.0], [-3.0, 0.0]])
    assert affinity_matrix(indices, values).to_dense().tolist() == [[0, 5], [5, 0]]
    assert coefficient_matrix(indices, values).toarray().tolist() == [[0, -3], [2, 0]]


@pytest.mark.parametrize(
    ("indices", "values", "error", "message"),
    [
        (torch.zeros(3, 2, dtype=torch.int64), torch.zeros(3, 1), ValueError, r"got \(3, 2\) and \(3, 1\)"),
        (torch.zeros(3, dtype=torch.int64), torch.zeros(3), ValueError, r"got \(3,\) and \(3,\)"),
        (torch.zeros(3, 2), torch.zeros(3, 2), TypeError, r"got torch.float32 and"),
        (torch.zeros(3, 2, dtype=torch.int64), torch.zeros(3, 2).int(), TypeError, r"and torch.int32"),
        (torch.tensor([[3], [0], [0]]), torch.ones(3, 1), ValueError, r"\[0, n_tokens=3\), got values from 0 to 3"),
        (torch.tensor([[-1], [0], [0]]), torch.ones(3, 1), ValueError, "got values from -1 to 0"),
        (torch.tensor([[1], [0]]), torch.tensor([[1.0], [torch.nan]]), ValueError, "got NaN"),
        (torch.tensor([[1], [0]]), torch.tensor([[1.0], [torch.inf]]), ValueError, "infinite"),
    ],
    ids=["shapes", "1-D", "float-indices", "integer-values", "too-large", "negative", "nan", "inf"],
)
@pytest.mark.parametrize("function", [affinity_matrix, coefficient_matrix], ids=lambda function: function.__name__)
def test_bad_rows_are_refused(function, indices, values, error, message):
    with pytest.raises(error, match=message):
        function(indices, values)
