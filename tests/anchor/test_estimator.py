from typing import cast

import numpy as np
import pytest
import scipy.sparse
import torch
from sklearn.base import clone
from sklearn.exceptions import ConvergenceWarning, NotFittedError
from sklearn.metrics import adjusted_rand_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

from videoanchor_triton.anchor import estimator as estimator_module
from videoanchor_triton.anchor.estimator import SparseSubspaceClustering
from videoanchor_triton.anchor.solver import NEGLIGIBLE, SolverOptions
from videoanchor_triton.anchor.spectral import Subspaces

from .tokens import DEVICES, planted_subspaces, vit_like


class ForeignArray:
    """An array of another library, CuPy's say: DLPack, and nothing else."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor

    def __dlpack__(self, **options):
        return self.tensor.__dlpack__(**options)

    def __dlpack_device__(self):
        return self.tensor.__dlpack_device__()


@parametrize_with_checks([SparseSubspaceClustering()])
def test_is_a_scikit_learn_estimator(estimator, check):
    check(estimator)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("n_clusters", [4, "auto"])
def test_finds_planted_subspaces(n_clusters, device):
    tokens, truth = planted_subspaces()
    model = SparseSubspaceClustering(n_clusters, None, affine=False, tol=1e-7).fit(tokens.to(device))
    assert adjusted_rand_score(truth, model.labels_) == 1.0
    assert model.labels_.dtype == np.int64
    assert model.n_clusters_ == 4
    assert model.n_features_in_ == 40
    assert model.n_iter_ > 0
    expected = abs(model.coef_) + abs(model.coef_).T
    left_out = (expected - model.affinity_matrix_).toarray()  # to the bit 0, but for what the tolerance leaves open
    largest = abs(model.coef_).toarray().max(0)
    assert (left_out >= 0).all()
    assert (left_out <= NEGLIGIBLE * model.tol * (largest[:, None] + largest)).all()
    inside = truth[:, None] == truth[None, :]
    assert np.abs(model.coef_.toarray())[~inside].sum() < 1e-3


@pytest.mark.parametrize("n_subspaces", [2, 3, 6])
@pytest.mark.parametrize("noise", [0.0, 0.02], ids="noise{}".format)
def test_auto_counts_planted_subspaces(n_subspaces, noise):
    tokens, truth = planted_subspaces(n_subspaces, noise=noise)
    model = SparseSubspaceClustering("auto", None, affine=False).fit(tokens)
    assert model.n_clusters_ == n_subspaces
    assert adjusted_rand_score(truth, model.labels_) == 1.0


def test_coefficients_express_the_samples():
    tokens = vit_like(4, 20).double()[:, :20]
    model = SparseSubspaceClustering(4, None, tol=1e-5).fit(tokens)
    assert scipy.sparse.issparse(model.coef_)
    coef = model.coef_.toarray()
    np.testing.assert_allclose(coef.sum(0), 1, atol=1e-4)
    assert not coef.diagonal().any()
    np.testing.assert_allclose(coef.T @ tokens.numpy(), tokens.numpy(), atol=0.02)


def test_reports_what_it_did():
    model = SparseSubspaceClustering(4, 12, random_state=0, tol=1e-3).fit(vit_like(4, 20))
    assert model.duality_gap_.shape == (80,)
    assert model.duality_gap_.dtype == np.float64
    assert model.duality_gap_.max() <= 1e-3
    assert list(model.seconds_) == ["pca", "solve", "spectral"]
    assert all(seconds >= 0 for seconds in model.seconds_.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_all_kinds_of_arrays_give_the_same(dtype):
    tokens = vit_like(4, 20).to(dtype)
    kinds = [tokens, tokens.numpy(), ForeignArray(tokens), tokens.numpy()[:, ::-1].copy()[:, ::-1]]
    models = [SparseSubspaceClustering(4, 12, random_state=0).fit(X) for X in kinds]
    for model in models:
        np.testing.assert_array_equal(model.labels_, models[0].labels_)
        np.testing.assert_array_equal(model.coef_.toarray(), models[0].coef_.toarray())
        assert model.coef_.dtype == np.float64
        assert model.n_features_in_ == 128


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_is_computed_in_float32(dtype, device):
    tokens = vit_like(4, 20).to(device, dtype)
    model, expected = (SparseSubspaceClustering(4, 12, random_state=0).fit(X) for X in (tokens, tokens.float()))
    np.testing.assert_array_equal(model.coef_.toarray(), expected.coef_.toarray())
    assert model.coef_.dtype == np.float64


@pytest.mark.parametrize("assign_labels", ["discretize", "cluster_qr", "kmeans"])
def test_fits_repeat_to_the_bit(assign_labels):
    tokens = vit_like(4, 20)
    model = SparseSubspaceClustering(7, 12, assign_labels=assign_labels, random_state=3)
    copies = [cast(SparseSubspaceClustering, clone(model)) for _ in range(3)]
    models = [copy.fit(tokens) for copy in copies[:2]]
    np.testing.assert_array_equal(models[0].labels_, models[1].labels_)
    np.testing.assert_array_equal(models[0].coef_.toarray(), models[1].coef_.toarray())
    np.testing.assert_array_equal(models[0].duality_gap_, models[1].duality_gap_)
    np.testing.assert_array_equal(copies[2].fit_predict(tokens), models[0].labels_)


def test_all_settings_reach_the_solver(monkeypatch):
    given = []

    def record(features, options, *, progress):
        given.append((tuple(features.shape), options))
        return solve(features, SolverOptions(), progress=progress)

    solve = estimator_module.self_expression
    monkeypatch.setattr(estimator_module, "self_expression", record)
    settings = {
        "affine": False,
        "alpha_e": 0.5,
        "alpha_z": 7.0,
        "tol": 0.5,
        "memory_budget": 2**33,
    }
    SparseSubspaceClustering(4, 5, random_state=0).set_params(**settings).fit(vit_like(2, 20))
    assert given == [((5, 40), SolverOptions(**settings))]
    SparseSubspaceClustering(4).fit(vit_like(2, 20).double())
    assert given[1] == ((39, 40), SolverOptions())


def test_assign_labels_and_the_seed_reach_the_spectral_step(monkeypatch):
    given = []

    def record(affinity, n_clusters, **options):
        given.append((n_clusters, options))
        return Subspaces(torch.zeros(len(affinity), dtype=torch.int64), None, None, torch.ones(len(affinity)))

    monkeypatch.setattr(estimator_module, "spectral_subspaces", record)
    SparseSubspaceClustering("auto", assign_labels="kmeans", random_state=5).fit(vit_like(2, 20))
    assert given == [("auto", {"assign_labels": "kmeans", "random_state": 5})]


def test_works_in_a_pipeline():
    tokens = vit_like(4, 20).numpy()
    pipeline = make_pipeline(StandardScaler(), SparseSubspaceClustering(4, random_state=0))
    pipeline.set_params(sparsesubspaceclustering__pca_rank=12)
    labels = pipeline.fit_predict(tokens)
    scaled = StandardScaler().fit_transform(tokens)
    np.testing.assert_array_equal(labels, SparseSubspaceClustering(4, 12, random_state=0).fit_predict(scaled))


def test_names_of_features_are_kept_and_forgotten():
    pandas = pytest.importorskip("pandas")
    tokens = vit_like(2, 20)[:, :3].numpy()
    model = SparseSubspaceClustering(2).fit(pandas.DataFrame(tokens, columns=["x", "y", "z"]))
    assert model.feature_names_in_.tolist() == ["x", "y", "z"]
    model.fit(torch.from_numpy(tokens))
    assert not hasattr(model, "feature_names_in_")


@pytest.mark.parametrize("n_samples", [1, 2, 5])
@pytest.mark.parametrize("affine", [True, False], ids=["affine", "linear"])
def test_fewer_samples_than_clusters(affine, n_samples):
    tokens = np.random.default_rng(0).standard_normal((n_samples, 4))
    model = SparseSubspaceClustering(24, affine=affine).fit(tokens)
    np.testing.assert_array_equal(model.labels_, np.arange(n_samples))
    assert model.n_clusters_ == n_samples
    assert model.coef_.shape == (n_samples, n_samples)


@pytest.mark.parametrize("n_samples", [1, 2])
@pytest.mark.parametrize("n_clusters", [1, "auto"])
@pytest.mark.parametrize("pca_rank", [None, 3])
def test_one_or_two_samples(pca_rank, n_clusters, n_samples):
    tokens = np.random.default_rng(0).standard_normal((n_samples, 4))
    np.testing.assert_array_equal(SparseSubspaceClustering(n_clusters, pca_rank).fit_predict(tokens), [0] * n_samples)


@pytest.mark.parametrize("pca_rank", [None, 3])
@pytest.mark.parametrize("n_clusters", [3, "auto"])
@pytest.mark.parametrize("value", [0.0, 1.0])
def test_equal_samples_are_one_cluster(value, n_clusters, pca_rank):
    model = SparseSubspaceClustering(n_clusters, pca_rank).fit(np.full((10, 4), value))
    assert model.labels_.tolist() == [0] * 10
    assert model.coef_.nnz == 0


@pytest.mark.parametrize("pca_rank", [None, 64])
def test_duplicate_samples_share_a_cluster(pca_rank):
    tokens = planted_subspaces(3, 12)[0]
    doubled = torch.cat([tokens, tokens])
    model = SparseSubspaceClustering(3, pca_rank, affine=False, random_state=0).fit(doubled)
    assert np.isfinite(model.coef_.data).all()
    assert not model.coef_.diagonal().any()
    np.testing.assert_array_equal(model.labels_[:36], model.labels_[36:])


def test_features_without_information_change_nothing():
    tokens = planted_subspaces(3, 12)[0]
    constant = torch.cat([tokens, torch.zeros(36, 3, dtype=torch.float64)], 1)
    for pca_rank in (None, 40):
        one, other = (SparseSubspaceClustering(3, pca_rank, tol=1e-7).fit(X) for X in (tokens, constant))
        np.testing.assert_allclose(one.coef_.toarray(), other.coef_.toarray(), atol=0.02)
        np.testing.assert_array_equal(one.labels_, other.labels_)


def test_a_rank_above_that_of_the_samples_is_clipped():
    tokens = planted_subspaces(2, 20, dim=2)[0]
    models = [SparseSubspaceClustering(2, rank, random_state=0).fit(tokens) for rank in (4, 40, 10_000)]
    for model in models[1:]:
        np.testing.assert_allclose(model.coef_.toarray(), models[0].coef_.toarray(), atol=1e-6)


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"n_clusters": 0}, "n_clusters"),
        ({"n_clusters": "many"}, "n_clusters"),
        ({"pca_rank": 0}, "pca_rank"),
        ({"tol": -1.0}, "tol"),
        ({"assign_labels": "nearest"}, "assign_labels"),
        ({"memory_budget": 0}, "memory_budget"),
        ({"memory_budget": 1e9}, "memory_budget"),
        ({"random_state": "zero"}, "'zero' cannot be used to seed"),
    ],
    ids=str,
)
def test_parameters_are_checked(parameters, message):
    with pytest.raises((TypeError, ValueError), match=message):
        SparseSubspaceClustering(**parameters).fit(np.eye(5))


@pytest.mark.parametrize(
    ("tokens", "error"),
    [
        (torch.zeros(0, 3), ValueError),
        (torch.zeros(3, 0), ValueError),
        (torch.tensor([[1.0], [torch.nan]]), ValueError),
        (torch.tensor([[1.0], [torch.inf]]).half(), ValueError),
        (torch.ones(3), ValueError),
        (torch.ones(3, 2, dtype=torch.int64), TypeError),
        (ForeignArray(torch.zeros(0, 3)), ValueError),
        (ForeignArray(torch.ones(3, 2).int()), TypeError),
    ],
    ids=["empty", "no-features", "nan", "inf", "1-D", "integer", "foreign-empty", "foreign-integer"],
)
def test_bad_tensors_are_refused(tokens, error):
    with pytest.raises(error, match="X must"):
        SparseSubspaceClustering(2).fit(tokens)


@pytest.mark.parametrize(
    "tokens", [np.zeros((0, 3)), np.zeros((3, 0)), np.array([[1.0], [np.nan]]), np.ones(3)], ids=str
)
def test_bad_arrays_are_refused(tokens):
    with pytest.raises(ValueError, match=r"Found array|contains NaN|Expected 2D"):
        SparseSubspaceClustering(2).fit(tokens)


def test_samples_that_do_not_converge_are_named():
    with pytest.warns(ConvergenceWarning, match="did not come within"):
        model = SparseSubspaceClustering(3, 12, tol=1e-17).fit(vit_like(2, 20))
    assert model.duality_gap_.max() > 1e-17


def test_verbose_prints_the_progress(capsys):
    SparseSubspaceClustering(2, verbose=True).fit(vit_like(2, 20))
    assert "solve: " in capsys.readouterr().out
    SparseSubspaceClustering(2).fit(vit_like(2, 20))
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("to", [torch.Tensor.numpy, torch.Tensor.clone, ForeignArray], ids=["numpy", "torch", "dlpack"])
def test_new_samples_join_the_subspace_that_expresses_them(to):
    tokens, truth = planted_subspaces(3, 24)
    new = torch.arange(len(tokens)) % 3 == 0
    model = SparseSubspaceClustering(3, None, affine=False, tol=1e-6).fit(to(tokens[~new]))
    coefficients = model.transform(to(tokens[new]))
    assert coefficients.shape == (int(new.sum()), int((~new).sum()))
    np.testing.assert_allclose(coefficients @ tokens[~new].numpy(), tokens[new].numpy(), atol=0.05)
    of_fit = np.asarray(truth)[~new.numpy()]
    label_of = {int(label): of_fit[model.labels_ == label][0] for label in np.unique(model.labels_)}
    assert [label_of[int(label)] for label in model.predict(to(tokens[new]))] == list(np.asarray(truth)[new.numpy()])


def test_transform_solves_the_problem_of_fit():
    tokens = vit_like(4, 20).double()
    model = SparseSubspaceClustering(4, 12).fit(tokens[:60])
    found = estimator_module.fit_features(tokens[:60], 12)
    solved = estimator_module.self_expression(found.transform(tokens[60:]), SolverOptions(), atoms=found.values)
    assert (solved.gap <= 1e-3).all()
    np.testing.assert_array_equal(model.transform(tokens[60:]).toarray(), solved.to_dense().T.numpy())
    np.testing.assert_allclose(model.transform(tokens[60:]).sum(1), 1, atol=1e-12)


def test_a_sample_of_fit_is_expressed_by_itself():
    tokens = vit_like(4, 20).double()
    model = SparseSubspaceClustering(4, 12).fit(tokens)
    assert (model.transform(tokens[:5]).toarray()[np.arange(5), np.arange(5)] > 0.9).all()
    np.testing.assert_array_equal(model.predict(tokens[:5]), model.labels_[:5])


def test_what_no_sample_expresses_has_no_label():
    tokens = planted_subspaces(2, 20)[0]
    model = SparseSubspaceClustering(2, None, affine=False).fit(tokens)
    nothing = torch.zeros(1, tokens.shape[1], dtype=torch.float64)
    assert model.transform(nothing).nnz == 0
    assert model.predict(torch.cat([nothing, tokens[:1]])).tolist() == [-1, model.labels_[0]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_precisions_of_new_samples(dtype):
    tokens, truth = planted_subspaces(3, 24)
    model = SparseSubspaceClustering(3, None, affine=False).fit(tokens.to(dtype))
    mixed = model.predict(tokens.to(torch.float32 if dtype == torch.float64 else torch.float64))
    assert mixed.dtype == np.int64
    np.testing.assert_array_equal(mixed, model.predict(tokens.to(dtype)))
    np.testing.assert_array_equal(mixed, model.labels_)
    assert model.transform(tokens[:2].to(dtype)).dtype == np.float64
    assert adjusted_rand_score(truth, mixed) == 1.0


def test_no_new_samples():
    tokens = planted_subspaces(2, 20)[0]
    model = SparseSubspaceClustering(2).fit(tokens)
    assert model.transform(tokens[:0]).shape == (0, len(tokens))
    assert model.predict(tokens[:0]).shape == (0,)


def test_eigengap_is_that_of_the_affinity():
    tokens, _ = planted_subspaces(3, 24)
    model = SparseSubspaceClustering(3, None, affine=False).fit(tokens)
    affinity = model.affinity_matrix_.toarray()
    root = 1 / np.sqrt(affinity.sum(0))
    eigenvalues = np.linalg.eigvalsh(affinity * root * root[:, None])[::-1]
    assert model.eigengap_ == pytest.approx(eigenvalues[2] - eigenvalues[3], abs=1e-9)


def test_predict_checks_what_it_is_given():
    tokens = planted_subspaces(2, 20)[0]
    model = SparseSubspaceClustering(2)
    with pytest.raises(NotFittedError):
        model.predict(tokens)
    model.fit(tokens)
    with pytest.raises(ValueError, match="features"):
        model.predict(tokens[:, :3])
    with pytest.raises(ValueError, match="features"):
        model.transform(tokens[:, :3].numpy())
