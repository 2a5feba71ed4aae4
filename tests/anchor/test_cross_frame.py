import importlib
import json
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from videoanchor_triton.anchor.config import VideoAnchorConfig
from videoanchor_triton.anchor.cross_frame import cross_frame_score
from videoanchor_triton.anchor.problem import token_features
from videoanchor_triton.anchor.scores import anchor_scores, expression_score
from videoanchor_triton.anchor.solver import SelfExpression, self_expression
from videoanchor_triton.anchor.streaming import AnchorStream

from .tokens import DEVICES, vit_like

benchmark: Any = importlib.import_module("benchmarks.scores.cross_frame")


def config(**settings) -> VideoAnchorConfig:
    return VideoAnchorConfig(**{"alpha_k": 1.0, "alpha_v": 1.0, "n_clusters": 8, "pca_rank": 16, **settings})


def solution(indices, values, device="cpu") -> SelfExpression:
    values = torch.as_tensor(values, dtype=torch.float32, device=device)
    gap = torch.zeros(len(values), dtype=torch.float64, device=device)
    return SelfExpression(torch.as_tensor(indices, device=device), values, gap, 1, 1e-3, len(values))


def random_case(n_tokens: int = 37, k: int = 5, n_frames: int = 5, n_clusters: int = 6, seed: int = 0):
    """Signed coefficients with unused slots, tokens without expression, frames of unequal length, unused clusters."""
    random = np.random.default_rng(seed)
    indices = (np.arange(n_tokens)[:, None] + random.integers(1, n_tokens, (n_tokens, k))) % n_tokens
    values = random.standard_normal((n_tokens, k)) * (random.random((n_tokens, k)) < 0.7)
    values[[4, 11]] = 0
    frames = random.choice(n_frames, n_tokens, p=random.dirichlet(np.ones(n_frames)))
    labels = random.choice([0, 1, 3, 5], n_tokens)
    assert n_clusters > labels.max()
    return solution(indices, values), torch.from_numpy(labels), torch.from_numpy(frames)


def by_definition(found: SelfExpression, labels: torch.Tensor, frames: torch.Tensor) -> np.ndarray:
    """The formula, token by token, with a dense W."""
    W, c, f = np.zeros([len(labels)] * 2), labels.numpy(), frames.numpy()
    for j, (tokens, weights) in enumerate(zip(found.indices.numpy(), found.values.numpy(), strict=True)):
        for i, weight in zip(tokens, weights, strict=True):
            W[i, j] += abs(float(weight))
    ids = np.unique(f)
    scores = []
    for j in range(len(c)):
        total = W[:, j].sum()
        share = W[f != f[j], j].sum() / total if total else 0.0
        parts = np.array([((c == c[j]) & (f == frame)).sum() / (f == frame).sum() for frame in ids])
        q = parts[parts > 0] / parts.sum()
        spanned = (np.exp(-(q * np.log(q)).sum()) - 1) / (len(ids) - 1) if len(ids) > 1 else 0.0
        scores.append(share * spanned)
    return np.array(scores)


@pytest.mark.parametrize("device", DEVICES)
def test_score_by_hand(device):
    # frames 0 0 1 1 2 2; cluster 0: one token in each frame; cluster 1: one token in frames 0 and 1; cluster 2: alone
    found = solution(
        [[2, 1], [3, 0], [0, 4], [1, 0], [0, 2], [0, 1]],
        [[0.5, -0.5], [1, 0], [0.25, 0.75], [0, 0], [0.5, 0.5], [1, 1]],
        device,
    )
    labels = torch.tensor([0, 1, 0, 1, 0, 2], device=device)
    frames = torch.tensor([0, 0, 1, 1, 2, 2], device=device)
    scores = cross_frame_score(found, labels, frames)
    assert (scores.dtype, scores.device) == (torch.float32, found.values.device)
    # 0: half from its own frame; 1: cluster in two of three frames; 3: no expression; 5: cluster in one frame
    torch.testing.assert_close(scores.cpu(), torch.tensor([0.5, 0.5, 1.0, 0.0, 1.0, 0.0]))


@pytest.mark.parametrize("seed", range(6))
def test_score_is_that_of_the_definition(seed):
    case = random_case(seed=seed)
    found = cross_frame_score(*case).numpy()
    np.testing.assert_allclose(found, by_definition(*case), rtol=1e-6, atol=1e-12)
    assert found.max() > 0.2
    assert found[4] == found[11] == 0


def test_unequal_frames_count_alike():
    """A cluster that fills half of each frame spans them all, however many tokens a frame has."""
    frames = torch.tensor([7] * 2 + [-3] * 6 + [0] * 10)
    labels = torch.tensor([0, 1] + [0] * 3 + [1] * 3 + [0] * 5 + [1] * 5)
    indices = torch.where(frames == 0, 0, 17)[:, None]
    torch.testing.assert_close(cross_frame_score(solution(indices, torch.ones(18, 1)), labels, frames), torch.ones(18))


def test_a_cluster_that_strays_into_a_frame_does_not_span_it():
    n = 100
    frames, labels = torch.arange(2 * n) // n, torch.zeros(2 * n, dtype=torch.int64)
    labels[n + 1 :] = 1  # cluster 0: all of frame 0, one token of frame 1
    scores = cross_frame_score(
        solution((torch.arange(2 * n)[:, None] + n) % (2 * n), torch.ones(2 * n, 1)), labels, frames
    )
    assert 0 < scores[0] < 0.06


@pytest.mark.parametrize("seed", range(3))
def test_order_of_tokens_does_not_matter(seed):
    found, labels, frames = random_case(seed=seed)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    moved = solution(order.argsort()[found.indices[order]], found.values[order])
    torch.testing.assert_close(
        cross_frame_score(moved, labels[order], frames[order]), cross_frame_score(found, labels, frames)[order]
    )


def test_names_of_frames_and_clusters_do_not_matter():
    found, labels, frames = random_case()
    expected = cross_frame_score(found, labels, frames)
    names = torch.tensor([2**40, -5, 0, 12, 3])
    torch.testing.assert_close(cross_frame_score(found, labels, names[frames]), expected)
    torch.testing.assert_close(cross_frame_score(found, 9 - labels, frames), expected)
    assert torch.equal(cross_frame_score(found, labels.int(), frames.to(torch.uint8)), expected)


def test_scale_and_sign_of_the_coefficients_do_not_matter():
    found, labels, frames = random_case()
    changed = solution(found.indices, found.values * torch.linspace(1e-30, -1e6, len(labels))[:, None])
    torch.testing.assert_close(cross_frame_score(changed, labels, frames), cross_frame_score(found, labels, frames))


def test_what_is_expressed_within_its_frame_scores_zero():
    frames = torch.tensor([0, 0, 1, 1])
    found = solution([[1], [0], [3], [0]], [[1], [-2], [3], [1]])
    scores = cross_frame_score(found, torch.zeros(4, dtype=torch.int64), frames)
    assert scores.tolist() == [0.0, 0.0, 0.0, 1.0]


def test_what_spans_one_frame_scores_exactly_zero():
    """... although other frames express it: its subspace is no other frame's."""
    frames = torch.arange(12) // 3
    found = solution((torch.arange(12)[:, None] + 3) % 12, torch.full((12, 1), 0.1))
    assert cross_frame_score(found, frames, frames).tolist() == [0.0] * 12


@pytest.mark.parametrize(
    ("indices", "values", "labels", "frames"),
    [
        (torch.zeros(0, 3, dtype=torch.int64), torch.zeros(0, 3), [], []),
        ([[0]], [[0.0]], [0], [5]),
        ([[1], [0]], [[1.0], [1.0]], [0, 0], [4, 4]),
        ([[0], [0]], [[0.0], [0.0]], [0, 1], [0, 1]),
        (torch.zeros(2, 0, dtype=torch.int64), torch.zeros(2, 0), [0, 0], [0, 1]),
    ],
    ids=["no-tokens", "one", "one-frame", "no-expression", "no-slots"],
)
def test_nothing_to_look_across_scores_zero(indices, values, labels, frames):
    labels, frames = (torch.tensor(given, dtype=torch.int64) for given in (labels, frames))
    scores = cross_frame_score(solution(indices, values), labels, frames)
    assert (scores.dtype, scores.tolist()) == (torch.float32, [0.0] * len(labels))


@pytest.mark.parametrize("seed", range(4))
def test_scores_lie_between_0_and_1(seed):
    scores = cross_frame_score(*random_case(n_tokens=400, k=9, n_frames=31, seed=seed))
    assert 0 <= scores.amin() <= scores.amax() <= 1


def test_many_frames_and_clusters_take_memory_of_the_tokens_only():
    n = 200_000
    token = torch.arange(n)
    found = solution(((token + 1) % n)[:, None], torch.ones(n, 1))
    assert cross_frame_score(found, token, token).amax() == 0  # n clusters x n frames would be 320 GB


@pytest.mark.parametrize(
    ("frames", "error", "message"),
    [
        (torch.zeros(3), TypeError, "frames must be a tensor of integers, the frame of each token, got torch.float32"),
        (torch.zeros(3, dtype=torch.bool), TypeError, "got torch.bool"),
        ([0, 1, 2], TypeError, "got list"),
        (torch.zeros(4, dtype=torch.int64), ValueError, r"frames must have shape \(3,\), .* got \(4,\)"),
        (torch.zeros(3, 1, dtype=torch.int64), ValueError, r"got \(3, 1\)"),
    ],
    ids=["float", "bool", "list", "length", "2-D"],
)
@pytest.mark.parametrize("score", ["published", "cross_frame"])
def test_frames_are_checked(frames, error, message, score):
    with pytest.raises(error, match=message):
        anchor_scores(torch.randn(3, 4), config(score=score), frames=frames)


def test_labels_are_checked():
    with pytest.raises(ValueError, match=r"labels must have shape \(2,\), one per token, got \(1,\)"):
        cross_frame_score(solution([[1], [0]], [[1], [1]]), torch.tensor([0]), torch.tensor([0, 1]))


@pytest.mark.parametrize("n_tokens", [0, 3])
def test_cross_frame_needs_frames(n_tokens):
    with pytest.raises(ValueError, match='score="cross_frame" needs frames'):
        anchor_scores(torch.zeros(n_tokens, 4), config(score="cross_frame"))
    with pytest.raises(ValueError, match='score="cross_frame" needs frames'):
        expression_score(solution([[1], [0]], [[1], [1]]), torch.tensor([0, 0]), "cross_frame")


@pytest.mark.parametrize("device", DEVICES)
def test_anchor_scores_are_those_of_the_definition(device):
    tokens = vit_like(4, 15).to(device)
    frames = torch.arange(60) // 15  # on the CPU, wherever the tokens are
    found = self_expression(token_features(tokens, 16), config())
    result = anchor_scores(tokens, config(score="cross_frame"), frames=frames)
    expected = by_definition(found, result.labels.cpu(), frames)
    np.testing.assert_allclose(result.scores.cpu().numpy(), expected, rtol=1e-5, atol=1e-7)
    assert result.scores.device == tokens.device
    assert list(result.seconds) == ["pca", "solve", "spectral", "score"]
    again = anchor_scores(tokens, config(score="cross_frame"), frames=frames)
    assert torch.equal(result.scores, again.scores)


def test_frames_change_no_other_score():
    tokens, frames = vit_like(4, 15), torch.arange(60) // 15
    published, given = anchor_scores(tokens, config()), anchor_scores(tokens, config(), frames=frames)
    assert torch.equal(given.scores, published.scores)
    assert torch.equal(given.labels, anchor_scores(tokens, config(score="cross_frame"), frames=frames).labels)


def test_a_stream_has_the_published_score_only():
    with pytest.raises(ValueError, match=r"config\.score must be \"published\" for a stream, got 'cross_frame'"):
        AnchorStream(config(score="cross_frame"))


@pytest.mark.parametrize(
    "tokens", [torch.ones(1, 9), torch.ones(8, 9), torch.zeros(0, 9)], ids=["one", "equal", "none"]
)
def test_nothing_to_tell_apart_scores_zero(tokens):
    result = anchor_scores(tokens, config(score="cross_frame"), frames=torch.arange(len(tokens)) // 2)
    assert result.scores.tolist() == [0.0] * len(tokens)


def test_finds_a_small_object_that_all_frames_share():
    """Where the published score follows the size of the subspaces."""
    clip = benchmark.subspaces(0.25, seed=50)
    settings = {"n_clusters": clip.n_clusters, "pca_rank": 64}
    frames = torch.from_numpy(clip.frames)
    auc = {
        score: roc_auc_score(clip.shared, anchor_scores(clip.X, config(score=score, **settings), frames=frames).scores)
        for score in ("published", "cross_frame")
    }
    assert auc["cross_frame"] > 0.95
    assert auc["published"] < 0.5


def test_benchmark_runs(tmp_path, monkeypatch, capsys):
    def clips(_quick):
        yield "subspaces", 1.0, 0, benchmark.subspaces(1.0, 0, 24)
        yield "camera, china.jpg", 0.25, 0, benchmark.camera(0, 0.25, 0, 3, 4)

    monkeypatch.setattr(benchmark, "clips", clips)
    assert benchmark.main(["--out", str(tmp_path), "--quick"]) == 0
    rows = json.loads((tmp_path / "cross-frame.json").read_text())["rows"]
    assert [row["method"] for row in rows] == [*benchmark.METHODS] * 2
    assert {row["auc"] for row in rows if row["method"] == "uniform"} == {0.5}
    assert all(0 <= row["auc"] <= 1 and 0 < row["shared"] < 1 for row in rows)
    text = (tmp_path / "cross-frame.md").read_text()
    assert "- subspaces: cross_frame above published in" in text
    assert "## camera, china.jpg: 72 to 72 tokens, 1 seeds" in text
    assert (tmp_path / "cross-frame.csv").read_text().count("\n") == 15
    assert (tmp_path / "cross-frame.png").read_bytes().startswith(b"\x89PNG")
    assert "cross_frame" in capsys.readouterr().out


def test_benchmark_verdict_counts():
    def row(seed: int, method: str, auc: float):
        return benchmark.Row("a", 1.0, seed, method, 9, 0.5, auc, 0.1, 0.0)

    rows = [row(0, "published", 0.5), row(0, "cross_frame", 0.75), row(1, "published", 0.5), row(1, "cross_frame", 0.5)]
    rows.append(row(0, "kmeans", 0.9))
    assert benchmark.verdict(rows, "a") == (
        "- a: cross_frame above published in 1 of 2 clips, mean AUC 0.625 against 0.500; its lowest is 0.500. "
        "ARI 0.100, of k-means 0.100."
    )


@pytest.mark.parametrize("size", [0.25, 8.0])
def test_benchmark_objects_have_the_sizes_that_they_say(size):
    clip = benchmark.subspaces(size, 0, per_frame=600)
    count = np.bincount(clip.truth)
    assert (np.bincount(clip.frames[clip.truth == 0]) > 0).all()
    assert all(len(np.unique(clip.frames[clip.truth == k])) == 1 for k in range(5, 11))
    assert 0.6 < count[:3].mean() / count[5:].mean() / size < 1.6
    assert (clip.shared == (clip.truth < 3)).all()


def test_benchmark_camera_shows_what_it_says():
    """Tokens that all frames show lie in every view; the middle of the photograph does, its edges do not."""
    still = benchmark.camera(0, 0.0, 0)
    moved = benchmark.camera(0, 0.4, 0)
    assert moved.shared.mean() < still.shared.mean() < 1
    grid = moved.shared.reshape(6, 9, 12)
    assert grid.any(axis=(1, 2)).all()
    assert len(np.unique(moved.truth)) <= 24
    part = benchmark.half(1, 0.25, 0)
    assert part.shared.mean() == 0.25
    assert (part.truth.reshape(6, 9, 12)[:, :, 3:] == 1 + np.arange(6)[:, None, None]).all()
