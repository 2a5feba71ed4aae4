"""Scores on the emulated card: what the CPU finds, on the tensor's own card, within the budget of host reads."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from emulated_cuda import cupy_stand_in
from emulated_cuda.budgets import assert_within, of_the_package
from emulated_cuda.device import EmulatedCuda
from sklearn.metrics import adjusted_rand_score
from torch import Tensor

import videoanchor_triton as va
from videoanchor_triton.anchor import iterates
from videoanchor_triton.anchor.timing import Stopwatch, mark_time, seconds_between

CONFIG = va.VideoAnchorConfig(alpha_k=9.5, alpha_v=2.5, pca_rank=8, n_clusters=4, tol=1e-6)  # CPU and CUDA agree
FRAMES = torch.arange(48) % 6


def planes(dtype: torch.dtype = torch.float32) -> Tensor:
    """(48, 16) tokens of four planes through 0 of unequal size."""
    torch.manual_seed(0)
    sizes = (18, 14, 10, 6)
    return torch.cat([torch.randn(n, 2) @ torch.randn(2, 16) + 1e-3 * torch.randn(n, 16) for n in sizes]).to(dtype)


@pytest.fixture
def torch_form(card: EmulatedCuda, monkeypatch: pytest.MonkeyPatch) -> EmulatedCuda:
    """The solver without its kernels, which take seconds each in Triton's interpreter."""
    monkeypatch.setattr(iterates, "_runs_triton", lambda _: False)
    return card


def on_the_card(result: va.AnchorResult, place: str = "cuda:0") -> None:
    assert result.scores.device == result.labels.device == torch.device(place)
    assert torch.isfinite(result.scores.cpu()).all()
    assert result.duality_gap is None or result.duality_gap.device == torch.device(place)


def agree(ours: va.AnchorResult, cpus: va.AnchorResult, atol: float) -> None:
    """The same clusters, whatever their numbers, and the same scores."""
    on_the_card(ours)
    assert list(ours.seconds) == list(cpus.seconds)
    assert adjusted_rand_score(cpus.labels.numpy(), ours.labels.cpu().numpy()) == 1.0
    torch.testing.assert_close(ours.scores.cpu(), cpus.scores, atol=atol, rtol=0)


@pytest.mark.usefixtures("torch_form")
@pytest.mark.parametrize(
    ("tol", "dtype"),
    [(1e-6, torch.float32), (1e-7, torch.float64), (1e-6, torch.bfloat16), (1e-6, torch.float16)],
)
def test_every_precision(tol: float, dtype: torch.dtype) -> None:
    X, config = planes(dtype), replace(CONFIG, tol=tol)
    agree(va.anchor_scores(X.to("cuda"), config), va.anchor_scores(X, config), atol=5e-3)


def of_norms(X: Tensor) -> Tensor:
    return X.float().square().sum(1) / 1e4


def of_an_array(X: Tensor) -> np.ndarray:
    return np.linspace(0, 1, len(X))


@pytest.mark.usefixtures("torch_form")
@pytest.mark.parametrize(
    "changes",
    [
        {"n_clusters": "auto"},
        {"assign_labels": "discretize"},
        {"assign_labels": "kmeans"},
        {"score": "size"},
        {"score": "row_sum"},
        {"score": "projector"},
        {"scorer": "knn"},
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
    agree(ours, va.anchor_scores(X, config, frames=FRAMES), atol=5e-3)


@pytest.mark.usefixtures("torch_form")
def test_frames_may_be_on_the_cpu() -> None:
    config = replace(CONFIG, score="cross_frame")
    ours = [va.anchor_scores(planes().to("cuda"), config, frames=FRAMES.to(place)) for place in ("cuda", "cpu")]
    assert torch.equal(ours[0].scores, ours[1].scores)


@pytest.mark.usefixtures("torch_form")
def test_the_authors_arithmetic() -> None:
    config = CONFIG.reproduce()
    ours, cpus = (va.anchor_scores(planes()[::3].to(place), config) for place in ("cuda", "cpu"))
    agree(ours, cpus, atol=2**-7)


@pytest.mark.usefixtures("card")
def test_tokens_that_are_not_finite() -> None:
    X = planes().index_fill(0, torch.tensor([3]), torch.nan).to("cuda")
    with pytest.raises(ValueError, match=r"16 NaN or infinite values, the first at token 3, feature 0"):
        va.anchor_scores(X, CONFIG)


def of_scores(X: Tensor) -> None:
    on_the_card(va.anchor_scores(X, CONFIG), "cuda:1")


def of_a_stream(X: Tensor) -> None:
    stream = va.AnchorStream(CONFIG, max_atoms=20)
    for chunk in X[torch.randperm(48, device=X.device)].split(24):
        on_the_card(stream.update(chunk), "cuda:1")


def of_the_estimator(X: Tensor) -> None:
    found = va.SparseSubspaceClustering(4, 8).fit(X)
    assert adjusted_rand_score(np.repeat(range(4), (18, 14, 10, 6)), found.labels_) > 0.9
    assert list(found.seconds_) == ["pca", "solve", "spectral"]


@pytest.mark.usefixtures("torch_form")
@pytest.mark.parametrize(
    "call",
    [
        of_scores,
        of_a_stream,
        of_the_estimator,
        lambda X: on_the_card(va.anchor_scores(X, replace(CONFIG, scorer="kmeans")), "cuda:1"),
        lambda X: on_the_card(va.anchor_scores(X, replace(CONFIG, scorer="knn")), "cuda:1"),
    ],
    ids=["scores", "stream", "estimator", "kmeans", "knn"],
)
def test_on_another_card_than_the_current(two_cards: EmulatedCuda, call: Callable[[Tensor], None]) -> None:
    call(planes().to("cuda:1"))
    assert two_cards.current == 0


@pytest.mark.usefixtures("torch_form")
def test_an_array_of_cupy() -> None:
    X = planes().to("cuda")
    array = cupy_stand_in.from_dlpack(X)
    assert torch.equal(va.anchor_scores(array, CONFIG).scores, va.anchor_scores(X, CONFIG).scores)
    labels = [va.SparseSubspaceClustering(4, 8).fit(x).labels_ for x in (X, array)]
    np.testing.assert_array_equal(labels[0], labels[1])


def test_budget_of_a_call(torch_form: EmulatedCuda) -> None:
    """`anchor_scores` of 48 tokens: the solver asks after every third iteration, the rest is fixed."""
    X = planes().to("cuda")
    torch_form.reset()
    result = va.anchor_scores(X, CONFIG)
    reads = of_the_package(torch_form.reads)
    assert result.converged
    assert_within(torch_form, "scores")
    assert "synchronize" not in {what for what, _ in reads}


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
