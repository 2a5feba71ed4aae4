"""PCA axes and spectral step on the emulated card: what the CPU finds, with CuPy and without, and few host reads."""

import sys
import warnings
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from emulated_cuda import cupy_stand_in
from emulated_cuda.budgets import assert_within
from emulated_cuda.device import EmulatedCuda
from sklearn.metrics import adjusted_rand_score
from torch import Tensor

from videoanchor_triton.anchor import eigenvectors
from videoanchor_triton.anchor.problem import fit_features
from videoanchor_triton.anchor.spectral import AssignLabels, spectral_subspaces


@pytest.fixture(autouse=True)
def untried(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Even a few tokens are too many for a dense decomposition, and whether CuPy works is not known."""
    monkeypatch.setattr(eigenvectors, "DENSE_SIZE", 0)
    monkeypatch.setattr(eigenvectors, "DENSE_RATIO", 0)
    eigenvectors._cupy_kernel.cache_clear()
    yield
    eigenvectors._cupy_kernel.cache_clear()


def graph(n_tokens: int = 120, lonely: int = 0) -> Tensor:
    """Four groups that share some affinity, as a sparse matrix."""
    random, truth = np.random.default_rng(0), np.arange(n_tokens) % 4
    weights = random.random((n_tokens, n_tokens)) * (random.random((n_tokens, n_tokens)) < 0.3)
    weights = torch.from_numpy(weights * np.where(truth[:, None] == truth, 1.0, 0.2))
    weights[:lonely] = weights[:, :lonely] = 0
    return (weights + weights.T).to_sparse_coo().coalesce()


def without_cupy(monkeypatch: pytest.MonkeyPatch, _card: EmulatedCuda) -> list[int]:
    monkeypatch.setitem(sys.modules, "cupy", None)
    return []


@pytest.mark.parametrize("index", [0, 1])
@pytest.mark.parametrize("assign_labels", ["cluster_qr", "kmeans", "discretize"])
@pytest.mark.parametrize("installed", [cupy_stand_in.install, without_cupy], ids=["cupy", "no-cupy"])
def test_the_spectral_step_is_that_of_the_cpu(
    two_cards: EmulatedCuda, monkeypatch: pytest.MonkeyPatch, installed, assign_labels: AssignLabels, index: int
) -> None:
    entered, place = installed(monkeypatch, two_cards), torch.device("cuda", index)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours = spectral_subspaces(graph(lonely=5).to(place), 9, assign_labels=assign_labels)
    cpus = spectral_subspaces(graph(lonely=5), 9, assign_labels=assign_labels)
    assert ours.labels.device == ours.projector_size.device == place
    assert adjusted_rand_score(cpus.labels.numpy(), ours.labels.cpu().numpy()) == 1.0
    assert ours.eigengap == pytest.approx(cpus.eigengap, abs=1e-9)
    assert ours.in_gap == cpus.in_gap
    torch.testing.assert_close(ours.projector_size.cpu(), cpus.projector_size, rtol=1e-6, atol=0)
    assert set(entered) == ({index} if installed is cupy_stand_in.install else set())


@pytest.mark.usefixtures("card")
def test_a_cupy_that_fails_is_replaced_by_torch(card: EmulatedCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("CUSOLVER_STATUS_INTERNAL_ERROR")

    cupy_stand_in.install(monkeypatch, card)
    monkeypatch.setattr(sys.modules["cupy"], "ElementwiseKernel", fail)
    with pytest.warns(UserWarning, match=r"CuPy failed \(CUSOLVER_STATUS_INTERNAL_ERROR\)"):
        ours = spectral_subspaces(graph().to("cuda"), 9)
    assert adjusted_rand_score(spectral_subspaces(graph(), 9).labels.numpy(), ours.labels.cpu().numpy()) == 1.0


@pytest.mark.parametrize("shape", [(60, 90), (90, 60)], ids=str)
def test_the_features_are_those_of_the_cpu(card: EmulatedCuda, shape: tuple[int, int]) -> None:
    tokens = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * torch.arange(1, shape[1] + 1) ** -0.5
    card.reset()
    ours, cpus = fit_features(tokens.to("cuda"), 8), fit_features(tokens, 8)
    torch.testing.assert_close(ours.values.cpu(), cpus.values, rtol=0, atol=1e-9)
    torch.testing.assert_close(ours.transform(tokens.to("cuda")).cpu(), cpus.values, rtol=0, atol=1e-9)
    assert_within(card, "features")


@pytest.mark.parametrize("cupy", [True, False])
def test_budget_of_the_spectral_step(card: EmulatedCuda, monkeypatch: pytest.MonkeyPatch, cupy: bool) -> None:
    (cupy_stand_in.install if cupy else without_cupy)(monkeypatch, card)
    affinity = graph().to("cuda")
    card.reset()
    spectral_subspaces(affinity, 6)
    assert_within(card, "spectral step")
