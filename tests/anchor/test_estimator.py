import numpy as np
import pytest
import scipy.sparse
import torch
from sklearn.metrics import adjusted_rand_score
from sklearn.utils.estimator_checks import parametrize_with_checks

from videoanchor_triton.anchor.estimator import SparseSubspaceClustering

from .tokens import DEVICES, planted_subspaces, vit_like


@parametrize_with_checks([SparseSubspaceClustering()])
def test_is_a_scikit_learn_estimator(estimator, check):
    check(estimator)


@pytest.mark.parametrize("device", DEVICES)
def test_finds_planted_subspaces(device):
    tokens, truth = planted_subspaces()
    model = SparseSubspaceClustering(4, affine=False, random_state=0).fit(tokens.to(device))
    assert adjusted_rand_score(truth, model.labels_) == 1.0
    assert model.labels_.dtype == np.int64
    assert model.n_features_in_ == 40
    assert model.n_iter_ > 0
    expected = abs(model.coef_) + abs(model.coef_).T
    np.testing.assert_allclose(model.affinity_matrix_.toarray(), expected.toarray())
    inside = truth[:, None] == truth[None, :]
    assert np.abs(model.coef_.toarray())[~inside].sum() < 1e-6


def test_coefficients_express_the_samples():
    tokens = vit_like(4, 20).double()[:, :20]
    model = SparseSubspaceClustering(4, random_state=0, tol=1e-5, max_iter=20_000).fit(tokens)
    assert scipy.sparse.issparse(model.coef_)
    coef = model.coef_.toarray()
    np.testing.assert_allclose(coef.sum(0), 1, atol=1e-4)
    assert not coef.diagonal().any()
    np.testing.assert_allclose(coef.T @ tokens.numpy(), tokens.numpy(), atol=0.02)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_arrays_and_tensors_give_the_same(dtype):
    tokens = vit_like(4, 20).to(dtype)
    models = [SparseSubspaceClustering(4, 12, random_state=0).fit(X) for X in (tokens, tokens.numpy())]
    np.testing.assert_array_equal(models[0].labels_, models[1].labels_)
    np.testing.assert_array_equal(models[0].coef_.toarray(), models[1].coef_.toarray())
    assert models[0].coef_.dtype == tokens.numpy().dtype


def test_all_settings_reach_the_solver():
    tokens = vit_like(4, 20)
    base = {"pca_rank": 12, "random_state": 0, "tol": 0.02}
    coef = SparseSubspaceClustering(4, **base).fit(tokens).coef_
    for change in (
        {"affine": False},
        {"alpha_e": 0.01},
        {"alpha_z": 1.0},
        {"rho": 60.0},
        {"relaxation": 1.0},
        {"tol": 0.05},
        {"pca_rank": 5},
    ):
        assert abs(SparseSubspaceClustering(4, **{**base, **change}).fit(tokens).coef_ - coef).max() > 1e-4, change


@pytest.mark.parametrize("n_samples", [1, 2, 5])
def test_fewer_samples_than_clusters(n_samples):
    tokens = np.random.default_rng(0).standard_normal((n_samples, 4))
    np.testing.assert_array_equal(SparseSubspaceClustering(24).fit_predict(tokens), np.arange(n_samples))


def test_equal_samples_are_one_cluster():
    model = SparseSubspaceClustering(3).fit(np.ones((10, 4)))
    assert model.labels_.tolist() == [0] * 10
    assert model.coef_.nnz == 0


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"n_clusters": 0}, "n_clusters"),
        ({"pca_rank": 0}, "pca_rank"),
        ({"relaxation": 2}, "relaxation"),
        ({"rho": 0}, "rho"),
        ({"assign_labels": "kmeans"}, "assign_labels"),
    ],
    ids=str,
)
def test_parameters_are_checked(parameters, message):
    with pytest.raises(ValueError, match=f"The '{message}' parameter of SparseSubspaceClustering"):
        SparseSubspaceClustering(**parameters).fit(np.eye(5))


@pytest.mark.parametrize("tokens", [torch.zeros(0, 3), torch.tensor([[1.0], [torch.nan]]), torch.ones(3)], ids=str)
def test_bad_tensors_are_refused(tokens):
    with pytest.raises(ValueError, match="X must"):
        SparseSubspaceClustering(2).fit(tokens)


def test_verbose_prints_the_progress(capsys):
    SparseSubspaceClustering(2, verbose=True).fit(vit_like(2, 20))
    assert "solve: 10 of at most 10000 iterations" in capsys.readouterr().out
    SparseSubspaceClustering(2).fit(vit_like(2, 20))
    assert capsys.readouterr().out == ""
