"""Scores on the emulated card: what the CPU finds, on the tensor's own card, within the budget of host reads."""

import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from emulated_cuda import cupy_stand_in
from emulated_cuda.budgets import BUDGETS, assert_within, of_the_package
from emulated_cuda.device import EmulatedCuda
from emulated_cuda.fused_pass import TorchPass, in_torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.metrics import adjusted_rand_score
from torch import Tensor

import videoanchor_triton as va
from videoanchor_triton.anchor import eigenvectors, fused
from videoanchor_triton.anchor.options import Algorithm
from videoanchor_triton.anchor.timing import Stopwatch, mark_time, seconds_between

ALGORITHMS: tuple[Algorithm, ...] = ("auto", "dense", "blocked", "working-set")
# 140 to 180 iterations: operators are slow here
CONFIG = va.VideoAnchorConfig(alpha_k=9.5, alpha_v=2.5, pca_rank=8, n_clusters=4, tol=0.1, rho=100.0)
FRAMES = torch.arange(48) % 6


def planes(dtype: torch.dtype = torch.float32) -> Tensor:
    """(48, 16) tokens of four planes through 0 of unequal size."""
    torch.manual_seed(0)
    sizes = (18, 14, 10, 6)
    return torch.cat([torch.randn(n, 2) @ torch.randn(2, 16) + 1e-3 * torch.randn(n, 16) for n in sizes]).to(dtype)


@pytest.fixture
def torch_pass(card: EmulatedCuda, monkeypatch: pytest.MonkeyPatch) -> EmulatedCuda:
    monkeypatch.setattr(fused, "update_state_kernel", TorchPass())
    return card


def on_the_card(result: va.AnchorResult, place: str = "cuda:0") -> None:
    assert result.scores.device == result.labels.device == torch.device(place)
    assert torch.isfinite(result.scores.cpu()).all()
    assert result.duality_gap is None or result.duality_gap.device == torch.device(place)


def agree(ours: va.AnchorResult, cpus: va.AnchorResult, atol: float) -> None:
    """The same clusters, whatever their numbers, and the same scores."""
    on_the_card(ours)
    assert ours.algorithm == cpus.algorithm
    assert list(ours.seconds) == list(cpus.seconds)
    assert adjusted_rand_score(cpus.labels.numpy(), ours.labels.cpu().numpy()) == 1.0
    torch.testing.assert_close(ours.scores.cpu(), cpus.scores, atol=atol, rtol=0)


@pytest.mark.parametrize("has_own", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_pass_itself(card: EmulatedCuda, dtype: torch.dtype, has_own: bool) -> None:
    torch.manual_seed(0)
    state, product, reflected = torch.randn(3, 3, 7, dtype=dtype)
    own, settings = torch.tensor([[0], [4], [6]]), torch.tensor([0.3, 1.8], dtype=dtype)
    ours = [x.to("cuda") for x in (state, product, reflected)]
    fused.update_state(ours[0], ours[1], ours[2], own.to("cuda") if has_own else None, settings.to("cuda"))
    expected = [x.double() for x in (state, product, reflected)]
    in_torch(expected[0], expected[1], expected[2], own, settings.double(), has_own)
    for found, exact in zip(ours, expected, strict=True):
        torch.testing.assert_close(found.cpu().double(), exact, atol=16 * torch.finfo(dtype).eps, rtol=0)
    assert card.launches == 1


def test_a_solve_with_the_pass_itself(card: EmulatedCuda) -> None:
    Y = planes().T[:4, :40:4].contiguous()
    options = va.SolverOptions(algorithm="dense", tol=0.1)
    found, cpus = va.self_expression(Y.to("cuda"), options), va.self_expression(Y, options)
    assert found.converged
    assert card.launches == found.n_iter
    torch.testing.assert_close(found.to_dense().cpu(), cpus.to_dense(), atol=1e-3, rtol=0)


@pytest.mark.usefixtures("torch_pass")
@pytest.mark.parametrize(
    ("algorithm", "dtype"),
    [
        ("auto", torch.float32),
        ("dense", torch.float64),
        ("blocked", torch.bfloat16),
        ("working-set", torch.float32),
        ("working-set", torch.float16),
    ],
)
def test_every_algorithm_and_precision(algorithm: Algorithm, dtype: torch.dtype) -> None:
    X, config = planes(dtype), replace(CONFIG, algorithm=algorithm)
    agree(va.anchor_scores(X.to("cuda"), config), va.anchor_scores(X, config), atol=1e-3)


def of_norms(X: Tensor) -> Tensor:
    return X.float().square().sum(1) / 1e4


def of_an_array(X: Tensor) -> np.ndarray:
    return np.linspace(0, 1, len(X))


@pytest.mark.usefixtures("torch_pass")
@pytest.mark.parametrize(
    "changes",
    [
        {"n_clusters": "auto"},
        {"assign_labels": "cluster_qr"},
        {"assign_labels": "kmeans"},
        {"score": "size"},
        {"score": "row_sum"},
        {"score": "cross_frame"},
        {"pca_rank": None},
        {"affine": False},
        {"n_clusters": 100},
        {"scorer": "kmeans"},
        {"scorer": "uniform"},
        {"scorer": of_norms},
        {"scorer": of_an_array},
    ],
    ids=lambda changes: ", ".join(f"{name} {getattr(value, '__name__', value)}" for name, value in changes.items()),
)
def test_every_score_and_label(changes: dict[str, Any]) -> None:
    X, config = planes(), replace(CONFIG, **changes)
    ours = va.anchor_scores(X.to("cuda"), config, frames=FRAMES.to("cuda"))
    agree(ours, va.anchor_scores(X, config, frames=FRAMES), atol=1e-3)


@pytest.mark.usefixtures("torch_pass")
def test_frames_may_be_on_the_cpu() -> None:
    config = replace(CONFIG, score="cross_frame")
    ours = [va.anchor_scores(planes().to("cuda"), config, frames=FRAMES.to(place)) for place in ("cuda", "cpu")]
    assert torch.equal(ours[0].scores, ours[1].scores)


@pytest.mark.usefixtures("torch_pass")
def test_the_authors_arithmetic() -> None:
    config = replace(CONFIG, max_iter=30).reproduce()
    with pytest.warns(ConvergenceWarning):
        ours, cpus = (va.anchor_scores(planes().to(place), config) for place in ("cuda", "cpu"))
    agree(ours, cpus, atol=0.0)


@pytest.mark.usefixtures("card")
def test_tokens_that_are_not_finite() -> None:
    X = planes().index_fill(0, torch.tensor([3]), torch.nan).to("cuda")
    with pytest.raises(ValueError, match=r"16 NaN or infinite values, the first at token 3, feature 0"):
        va.anchor_scores(X, CONFIG)


def of_scores(X: Tensor, algorithm: Algorithm) -> None:
    on_the_card(va.anchor_scores(X, replace(CONFIG, algorithm=algorithm)), "cuda:1")


def of_authors(X: Tensor) -> None:
    with pytest.warns(ConvergenceWarning):
        on_the_card(va.anchor_scores(X, replace(CONFIG, max_iter=10).reproduce()), "cuda:1")


def of_a_stream(X: Tensor) -> None:
    stream = va.AnchorStream(CONFIG, max_atoms=20)
    for chunk in X[torch.randperm(48, device=X.device)].split(24):
        on_the_card(stream.update(chunk), "cuda:1")


def of_the_estimator(X: Tensor) -> None:
    found = va.SparseSubspaceClustering(4, 8, tol=0.1, rho=100.0, random_state=0).fit(X)
    assert adjusted_rand_score(np.repeat(range(4), (18, 14, 10, 6)), found.labels_) == 1.0
    assert list(found.seconds_) == ["pca", "solve", "spectral"]


@pytest.mark.parametrize(
    "call",
    [
        *[partial(of_scores, algorithm=name) for name in ALGORITHMS],
        of_authors,
        of_a_stream,
        of_the_estimator,
        lambda X: on_the_card(va.anchor_scores(X, replace(CONFIG, scorer="kmeans")), "cuda:1"),
    ],
    ids=[*ALGORITHMS, "authors", "stream", "estimator", "kmeans"],
)
def test_on_another_card_than_the_current(
    two_cards: EmulatedCuda, torch_pass: EmulatedCuda, call: Callable[[Tensor], None], request: pytest.FixtureRequest
) -> None:
    """The stand-in is launched by the product's own launcher, which has to name the card."""
    call(planes().to("cuda:1"))
    assert two_cards.current == 0
    assert torch_pass.launches > 0 or request.node.callspec.id == "kmeans"


LANCZOS = pytest.mark.usefixtures("torch_pass", "lanczos")


@pytest.fixture
def lanczos(monkeypatch: pytest.MonkeyPatch) -> None:
    """Even a few tokens are too many for a dense decomposition."""
    monkeypatch.setattr(eigenvectors, "DENSE_TOKENS", 0)
    monkeypatch.setattr(eigenvectors, "DENSE_RATIO", 0)
    eigenvectors._warn_once.cache_clear()


@LANCZOS
def test_lanczos_without_cupy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cupy", None)
    cpus = va.anchor_scores(planes(), CONFIG)
    with pytest.warns(UserWarning, match="CuPy is not installed"):
        agree(va.anchor_scores(planes().to("cuda"), CONFIG), cpus, atol=1e-3)


@LANCZOS
@pytest.mark.parametrize("index", [0, 1])
def test_lanczos_with_cupy(two_cards: EmulatedCuda, monkeypatch: pytest.MonkeyPatch, index: int) -> None:
    entered = cupy_stand_in.install(monkeypatch, two_cards)
    cpus = va.anchor_scores(planes(), CONFIG)
    two_cards.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = va.anchor_scores(planes().to(f"cuda:{index}"), CONFIG)
    assert entered == [index]
    assert not [line for _, line in two_cards.uploads if "eigenvectors" in line]
    on_the_card(found, f"cuda:{index}")
    torch.testing.assert_close(found.scores.cpu(), cpus.scores, atol=1e-3, rtol=0)


@LANCZOS
def test_lanczos_where_cupy_fails(card: EmulatedCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    def eigsh(*_: Any, **__: Any) -> None:
        raise RuntimeError("CUSOLVER_STATUS_INTERNAL_ERROR")

    cupy_stand_in.install(monkeypatch, card, eigsh)
    cpus = va.anchor_scores(planes(), CONFIG)
    with pytest.warns(UserWarning, match=r"CuPy failed \(CUSOLVER_STATUS_INTERNAL_ERROR\)"):
        agree(va.anchor_scores(planes().to("cuda"), CONFIG), cpus, atol=1e-3)


@pytest.mark.usefixtures("torch_pass")
def test_an_array_of_cupy() -> None:
    X = planes().to("cuda")
    array = cupy_stand_in.from_dlpack(X)
    assert torch.equal(va.anchor_scores(array, CONFIG).scores, va.anchor_scores(X, CONFIG).scores)
    labels = [va.SparseSubspaceClustering(4, 8, tol=0.1, rho=100.0, random_state=0).fit(x).labels_ for x in (X, array)]
    np.testing.assert_array_equal(labels[0], labels[1])


@pytest.mark.parametrize("algorithm", ["dense", "working-set"])
def test_budget_of_a_call(torch_pass: EmulatedCuda, algorithm: Algorithm) -> None:
    """`anchor_scores` of 48 tokens, in at most 200 iterations: the solver's reads grow with them, the rest does not."""
    X, config = planes().to("cuda"), replace(CONFIG, algorithm=algorithm)
    torch_pass.reset()
    result = va.anchor_scores(X, config)
    reads = of_the_package(torch_pass.reads)
    assert_within(torch_pass, f"scores: {algorithm}")
    assert result.n_iter <= 200
    assert "synchronize" not in {what for what, _ in reads}


@pytest.mark.parametrize("algorithm", ["dense", "blocked", "working-set"])
def test_budget_of_20_iterations(torch_pass: EmulatedCuda, algorithm: Algorithm) -> None:
    """Twenty iterations in which no token is done: the difference of two solves that are ended early."""
    Y, counts = planes(torch.float64).T.contiguous().to("cuda"), []
    for max_iter in (40, 60):
        torch_pass.reset()
        options = va.SolverOptions(algorithm=algorithm, max_iter=max_iter, tol=0.0)
        with pytest.warns(ConvergenceWarning):
            va.self_expression(Y, options, dtype=torch.float64)
        counts.append([of_the_package(x).total() for x in (torch_pass.reads, torch_pass.uploads)])
    assert (np.array(counts[1]) - counts[0] <= BUDGETS[f"solve: {algorithm}, 20 iterations"]).all(), counts


def test_time_is_read_without_a_wait_in_between(card: EmulatedCuda) -> None:
    """By events of the tensors' own card, of which only the last may have to be waited for."""
    watch = Stopwatch(torch.device("cuda", 0))
    for name in ("one", "two"):
        with watch.stage(name):
            torch.ones(2, device="cuda").sum()
    assert not card.reads
    assert list(watch.seconds()) == ["one", "two"]
    assert min(watch.seconds().values()) >= 0
    assert card.reads.total() <= 1
    begin, end = mark_time(torch.device("cuda")), mark_time(torch.device("cuda"))
    assert 0 <= seconds_between(begin, end) < 60
