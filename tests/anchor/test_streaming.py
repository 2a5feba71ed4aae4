"""A stream against all tokens at once, and what it promises for a video without end."""

import tracemalloc

import numpy as np
import pytest
import torch
from scipy.sparse import csc_array
from sklearn.exceptions import ConvergenceWarning
from sklearn.metrics import adjusted_rand_score
from torch import Tensor

from videoanchor_triton.anchor import streaming
from videoanchor_triton.anchor.config import VideoAnchorConfig
from videoanchor_triton.anchor.memory import SMALLEST_BLOCK, solver_memory_bytes
from videoanchor_triton.anchor.problem import token_features
from videoanchor_triton.anchor.scores import AnchorResult, anchor_scores
from videoanchor_triton.anchor.solver import self_expression
from videoanchor_triton.anchor.streaming import AnchorStream, Atoms

from .test_solver import PeakMemory
from .tokens import DEVICES, planted_subspaces, vit_like


def config(**settings) -> VideoAnchorConfig:
    return VideoAnchorConfig(**{"alpha_k": 1.0, "alpha_v": 1.0, "n_clusters": 6, "pca_rank": 16, **settings})


def atoms_of(stream: AnchorStream) -> Atoms:
    assert stream.dictionary is not None
    return stream.dictionary


def row_sums(stream: AnchorStream) -> Tensor:
    assert stream.solution is not None
    return stream.solution.row_sums()


def stream_of(X: Tensor, first: int, chunk: int, max_atoms: int, **settings) -> tuple[AnchorStream, list[AnchorResult]]:
    stream = AnchorStream(config(**settings), max_atoms=max_atoms)
    results = [stream.update(X[:first])]
    return stream, results + [stream.update(part) for part in X[first:].split(chunk)]


def absolute(links: list[list[tuple[int, float]]]) -> csc_array:
    """|W| of tokens j that are expressed by the tokens and with the weights of links[j]."""
    dense = np.zeros((len(links), len(links)))
    for j, link in enumerate(links):
        for i, weight in link:
            dense[i, j] += abs(weight)
    return csc_array(dense)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"affine": False, "pca_rank": None},
        {"n_clusters": "auto"},
        {"score": "published", "assign_labels": "kmeans"},
    ],
    ids=["default", "linear-no-pca", "auto", "kmeans"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("device", DEVICES)
def test_the_first_chunk_is_scored_as_ever(settings, dtype, device):
    X = vit_like(3, 29).to(device, dtype)
    stream = AnchorStream(config(**settings), max_atoms=60)
    found, expected = stream.update(X), anchor_scores(X, config(**settings))
    assert torch.equal(found.scores, expected.scores)
    assert found.scores.dtype == torch.float32
    assert torch.equal(found.labels, expected.labels)
    assert found.duality_gap is not None
    assert expected.duality_gap is not None
    assert torch.equal(found.duality_gap, expected.duality_gap)
    assert (found.n_iter, found.residual, found.converged) == (expected.n_iter, expected.residual, expected.converged)
    assert set(found.seconds) == set(expected.seconds)
    assert stream.n_tokens == 87
    assert found.eigengap is not None
    assert (found.eigengap, found.in_gap) == (expected.eigengap, expected.in_gap)
    later = stream.update(X[:5])
    assert later.eigengap is later.in_gap is None, "labels come from the first chunk's"


def test_nothing_is_lost_while_the_dictionary_holds_all_tokens():
    X, first, last = vit_like(5, 27), 54, 17
    stream, results = stream_of(X, first, 32, 200)
    assert atoms_of(stream).position.tolist() == list(range(135))
    assert torch.equal(atoms_of(stream).tokens, X)
    assert len(results[-1].scores) == last
    whole = self_expression(token_features(X, 16), config())
    assert torch.equal(row_sums(stream), whole.row_sums())
    assert results[-1].duality_gap is not None
    assert torch.equal(results[-1].duality_gap, whole.gap[-last:])
    # s_hat = pi r, between the extremes that it had in the first chunk
    start = self_expression(token_features(X[:first], 16), config()).row_sums().numpy()
    labels = torch.cat([result.labels for result in results]).numpy()
    range_of = np.bincount(labels[:first])[labels[:first]] / first * start
    unscaled = np.bincount(labels)[labels] / 135 * whole.row_sums().numpy()
    expected = np.clip((unscaled - range_of.min()) / np.ptp(range_of), 0, 1)
    np.testing.assert_allclose(results[-1].scores.numpy(), expected[-last:], atol=1e-6)
    np.testing.assert_allclose(atoms_of(stream).scores.numpy(), expected, atol=1e-6)
    assert stream.cluster_sizes.tolist() == np.bincount(labels, minlength=len(stream.cluster_sizes)).tolist()


def test_a_window_is_the_dictionary_and_the_chunk_and_certified():
    X = vit_like(6, 25)
    stream, _ = stream_of(X[:125], 50, 25, 40)
    before = atoms_of(stream)
    found = stream.update(X[125:])
    window = self_expression(token_features(torch.cat([before.tokens, X[125:]]), 16), config())
    assert torch.equal(row_sums(stream), window.row_sums())
    assert found.duality_gap is not None
    assert torch.equal(found.duality_gap, window.gap[40:])
    assert float(window.gap.max()) == found.residual <= config().tol
    assert found.converged
    assert torch.equal(X[before.position], before.tokens)


def test_later_tokens_join_the_subspaces_of_the_first_chunk():
    X, truth = planted_subspaces(each=60, seed=3)
    stream, results = stream_of(X, 80, 23, 40, n_clusters=4, affine=False, pca_rank=None)
    labels = torch.cat([result.labels for result in results]).numpy()
    assert adjusted_rand_score(truth, labels) == 1
    assert stream.cluster_sizes.tolist() == [60, 60, 60, 60, 0]
    assert len(atoms_of(stream).labels) == 40
    assert set(atoms_of(stream).labels.tolist()) == {0, 1, 2, 3}
    assert torch.equal(torch.from_numpy(labels)[atoms_of(stream).position], atoms_of(stream).labels)


def test_a_new_subspace_is_a_further_cluster():
    X, truth = planted_subspaces(3, each=24, n_features=40)
    new = torch.zeros(16, 43, dtype=torch.float64)
    new[:, 40:] = torch.randn(16, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    X = torch.nn.functional.pad(X, (0, 3))
    stream = AnchorStream(config(n_clusters=3, affine=False, pca_rank=None), max_atoms=20)
    known = stream.update(X[:48]).labels
    for part in (new[:8], new[8:]):
        found = stream.update(torch.cat([X[48:60], part]))
        assert found.labels[12:].tolist() == [3] * 8
        assert adjusted_rand_score(truth[:60], [*known, *found.labels[:12]]) == 1
    assert int(stream.cluster_sizes[3]) == 16


def test_labels_follow_the_affinity():
    stream = AnchorStream(config(n_clusters=2))
    stream.cluster_sizes = torch.tensor([1, 2, 0])
    old = torch.tensor([0, 1, 1])
    links = [
        [(1, 1.0), (6, 5.0)], [(0, 1.0)], [(0, 1.0)],  # the dictionary; token 0 is expressed by token 6 as well
        [(0, -3.0), (1, 1.0), (2, 1.5)],  # 3: absolute weights, 3 against 2.5
        [(0, 1.0), (1, 0.5), (2, 0.5)],  # 4: equal, the lowest label
        [(7, 1.0)],  # 5: by token 7 only, which follows token 6
        [(1, 1.0), (2, 1.0)],  # 6: 2 against the 5 with which it expresses token 0
        [(6, 1.0), (3, 0.25)],  # 7: no link to the dictionary
        [(9, 1.0)], [(8, 1.0)],  # 8, 9: no link to anything else
    ]  # fmt: skip
    assert stream._joined_labels(absolute(links), old).tolist() == [0, 1, 1, 0, 0, 0, 0, 0, 2, 2]
    links[7] = [(6, 0.25), (4, 0.25), (10, 9.0)]
    links.append([(1, 1.0)])  # 10: label 1, which token 7 and then token 5 take over
    assert stream._joined_labels(absolute(links), old).tolist() == [0, 1, 1, 0, 0, 1, 0, 1, 2, 2, 1]


@pytest.mark.parametrize(
    ("weights", "labels", "kept"),
    [
        ([1.0, -4.0, 3.0, 2.0, 5.0], [0, 0, 0, 0, 0], [1, 2, 4]),
        ([2.0, 1.0, 2.0, 2.0, 2.0], [0, 0, 0, 0, 0], [0, 2, 3]),
        ([9.0, 8.0, 7.0, 1.0, 2.0], [0, 0, 0, 1, 1], [0, 1, 4]),
        ([9.0, 8.0, 7.0, 0.0, 1.0], [0, 0, 0, 1, 2], [0, 3, 4]),
        ([9.0, 8.0, 0.0, 0.0, 0.0], [0, 0, 2, 2, 2], [0, 1, 2]),
    ],
    ids=["absolute", "ties", "cluster", "clusters", "no-weight"],
)
def test_the_heaviest_are_kept_and_one_of_each_cluster(weights, labels, kept):
    stream = AnchorStream(config(n_clusters=2), max_atoms=3)
    links = [list(enumerate(weights)), *([[]] * (len(weights) - 1))]
    assert stream._heaviest(absolute(links), torch.tensor(labels)).tolist() == kept


def test_weight_is_a_sum_over_all_that_is_expressed():
    stream = AnchorStream(config(n_clusters=1), max_atoms=2)
    links = [[(1, 0.6), (2, 0.5)], [(2, -0.5)], [(0, 0.9)], [(1, 0.5), (1, 0.0)]]
    assert stream._heaviest(absolute(links), torch.zeros(4, dtype=torch.int64)).tolist() == [1, 2]


def test_the_dictionary_is_that_of_the_largest_weights():
    X = vit_like(4, 25)
    stream = AnchorStream(config(n_clusters=1), max_atoms=30)
    stream.update(X)
    weight = self_expression(token_features(X, 16), config()).to_dense().abs().double().sum(1)
    assert set(atoms_of(stream).position.tolist()) == set(weight.topk(30).indices.tolist())


def test_results_and_input_are_not_shared_with_the_stream():
    X = vit_like(4, 21)
    _, expected = stream_of(X, 42, 21, 40)
    stream, given = AnchorStream(config(), max_atoms=40), X.clone()
    for part, right in zip((given[:42], given[42:63], given[63:]), expected, strict=True):
        found = stream.update(part)
        assert torch.equal(found.scores, right.scores)
        assert torch.equal(found.labels, right.labels)
        for tensor in (found.scores, found.labels, found.duality_gap):
            assert tensor is not None
            assert tensor.untyped_storage().nbytes() == tensor.nbytes, "holds the whole window"
            tensor.zero_()
        part.zero_()


def test_the_same_to_the_bit_run_to_run():
    X = vit_like(5, 23)
    (one, first), (other, second) = (stream_of(X, 46, 19, 30) for _ in range(2))
    for found, again in zip(first, second, strict=True):
        assert torch.equal(found.scores, again.scores)
        assert torch.equal(found.labels, again.labels)
    for name in ("tokens", "position", "labels", "scores"):
        assert torch.equal(getattr(atoms_of(one), name), getattr(atoms_of(other), name))


def noise(n_tokens: int, n_features: int) -> Tensor:
    return torch.randn(n_tokens, n_features, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def test_scores_beyond_the_range_of_the_first_chunk_are_clipped():
    stream = AnchorStream(config(n_clusters=1), max_atoms=12)  # fewer than came before: pi = 1 is that of all tokens
    stream.update(vit_like(1, 20))
    stream._lowest, stream._spread = 0.8, 0.5
    scores = stream.update(vit_like(2, 15, seed=1)).scores
    unclipped = (row_sums(stream)[12:] - 0.8) / 0.5
    assert float(unclipped.min()) < 0
    assert float(unclipped.max()) > 1
    torch.testing.assert_close(scores, unclipped.clip(0, 1).float(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("first", [2, 3])
def test_a_first_chunk_in_which_nothing_stands_out_gives_no_range(first):
    stream = AnchorStream(config(n_clusters=1, pca_rank=None, tol=1e-5), max_atoms=20)  # at 1e-3 equal sums differ
    assert stream.update(torch.eye(6, dtype=torch.float64)[:first]).scores.tolist() == [0.0] * first
    assert stream.update(noise(12, 6)).scores.tolist() == [0.0] * 12
    assert row_sums(stream).std() > 0.1


def test_single_and_repeated_tokens():
    X = vit_like(3, 24)
    stream = AnchorStream(config(), max_atoms=50)
    known = stream.update(X[:48])
    again = stream.update(X[:24])
    assert torch.equal(again.labels, known.labels[:24])
    for token in X[48:52]:
        found = stream.update(token[None])
        assert found.scores.shape == found.labels.shape == (1,)
        assert torch.isfinite(found.scores).all()
    assert (stream.n_tokens, len(atoms_of(stream).tokens), int(stream.cluster_sizes.sum())) == (76, 50, 76)


def test_a_window_of_equal_tokens_has_no_affinity():
    stream = AnchorStream(config(n_clusters=1), max_atoms=2)
    stream.update(vit_like(1, 20))
    stream.dictionary = Atoms(atoms_of(stream).tokens[:1], torch.tensor([3]), torch.tensor([0]), torch.zeros(1))
    found = stream.update(atoms_of(stream).tokens.repeat(3, 1))
    assert found.labels.tolist() == [1, 1, 1]
    assert len(found.scores.unique()) == 1


def test_halves_and_arrays_join_a_stream_of_float32():
    X = vit_like(3, 20).bfloat16()
    stream, other = AnchorStream(config(), max_atoms=50), AnchorStream(config(), max_atoms=50)
    for part, same in ((X[:40], X[:40].float()), (X[40:].float().numpy(), X[40:])):
        found, expected = stream.update(part), other.update(same)
        assert torch.equal(found.scores, expected.scores)


@pytest.mark.parametrize(
    ("first", "error", "message"),
    [
        (torch.zeros(0, 4), ValueError, r"first chunk must have at least 2 tokens, got shape \(0, 4\)"),
        (torch.randn(1, 4), ValueError, r"at least 2 tokens, got shape \(1, 4\)"),
        (torch.full((5, 4), 0.1), ValueError, "the 5 tokens of the first chunk are equal; start with frames that"),
        (torch.tensor([[1.0, torch.nan], [0.0, 1.0]]), ValueError, "must be finite, got 1 NaN or infinite"),
        (torch.zeros(3, 4, dtype=torch.int64), TypeError, "floating-point"),
        ([[1.0, 2.0]], TypeError, "X must be a torch tensor"),
    ],
    ids=["empty", "one", "equal", "nan", "integers", "list"],
)
@pytest.mark.parametrize("pca_rank", [None, 3], ids=["no-pca", "pca"])
def test_bad_first_chunks(first, error, message, pca_rank):
    stream = AnchorStream(config(pca_rank=pca_rank))
    with pytest.raises(error, match=message):
        stream.update(first)
    assert (stream.n_tokens, stream.dictionary, stream.solution) == (0, None, None)


@pytest.mark.parametrize(
    ("chunk", "error", "message"),
    [
        (torch.zeros(0, 128), ValueError, r"at least 1 token, got shape \(0, 128\); skip"),
        (torch.randn(5, 127), ValueError, "must have 128 features as the first chunk, got 127"),
        (torch.randn(5, 128).double(), TypeError, "must be torch.float32 as the first chunk, got torch.float64"),
        (torch.randn(5, 128, device="meta"), ValueError, "must be on cpu as the first chunk, got meta"),
        (torch.full((5, 128), torch.inf), ValueError, "must be finite, got 640 NaN or infinite"),
        (torch.randn(128), ValueError, "must be 2-D"),
    ],
    ids=["empty", "features", "dtype", "device", "infinite", "1-D"],
)
def test_bad_later_chunks(chunk, error, message, monkeypatch):
    if chunk.is_meta:  # stands for another device, where no value can be looked at
        monkeypatch.setattr(streaming, "as_tokens", lambda tokens: tokens)
    stream = AnchorStream(config(), max_atoms=20)
    stream.update(vit_like(2, 20))
    before = atoms_of(stream)
    with pytest.raises(error, match=message):
        stream.update(chunk)
    assert (stream.n_tokens, stream.dictionary) == (40, before)


@pytest.mark.parametrize(
    ("settings", "max_atoms", "error", "message"),
    [
        ({"scorer": "kmeans"}, 50, ValueError, "config.scorer must be \"ssc\" for a stream, got 'kmeans'"),
        ({"scorer": lambda tokens: tokens[:, 0]}, 50, ValueError, "config.scorer must be"),
        (
            {"arithmetic": "authors", "assign_labels": "discretize"},
            50,
            ValueError,
            "config.arithmetic must be \"exact\" for a stream, got 'authors'; leave reproduce",
        ),
        ({}, 6, ValueError, "max_atoms must be >= 7, got 6"),
        ({"n_clusters": "auto"}, 51, ValueError, "max_atoms must be >= 52, got 51"),
        ({}, 50.0, TypeError, "max_atoms must be an integer, got 50.0"),
    ],
    ids=["kmeans", "function", "authors", "too-few", "too-few-for-auto", "no-integer"],
)
def test_bad_settings(settings, max_atoms, error, message):
    with pytest.raises(error, match=message):
        AnchorStream(config(**settings), max_atoms=max_atoms)


@pytest.mark.parametrize("stage", ["solve", "score"])
def test_an_update_that_fails_changes_nothing(stage, monkeypatch):
    X = vit_like(3, 24)
    _, expected = stream_of(X, 48, 24, 30)
    stream = AnchorStream(config(), max_atoms=30)

    def stop(*_: object) -> None:
        raise InterruptedError

    for start, end, right in ((0, 48, expected[0]), (48, 72, expected[1])):
        part = X[start:end]
        with monkeypatch.context() as patched:
            if stage == "score":
                patched.setattr(AnchorStream, "_heaviest", stop)
            with pytest.raises(InterruptedError):
                stream.update(part, progress=stop if stage == "solve" else None)
        assert stream.n_tokens == int(stream.cluster_sizes.sum()) == start
        found = stream.update(part)
        assert torch.equal(found.scores, right.scores)
        assert torch.equal(found.labels, right.labels)


def test_progress_and_what_did_not_converge_are_reported():
    X, calls = vit_like(3, 24), []
    stream = AnchorStream(config(tol=1e-17), max_atoms=30)
    for part, window in ((X[:48], 48), (X[48:], 54)):
        calls.clear()
        with pytest.warns(ConvergenceWarning, match=f"of {window} tokens did not come within") as caught:
            found = stream.update(part, progress=lambda *call: calls.append(call))
        assert len(caught) == 1
        assert not found.converged
        assert calls[-1] == ("score", 1, 1)
        assert {(stage, total) for stage, _, total in calls[:-1]} == {("solve", window)}


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
@pytest.mark.parametrize("settings", [{}, {"keep": 50, "group": "farthest"}], ids=["scores", "cache"])
def test_memory_does_not_grow_with_the_video(settings):
    X = vit_like(16, 20, 64)
    stream = AnchorStream(config(**settings), max_atoms=60)
    stream.update(X[:80])
    peaks = []
    tracemalloc.start()  # of NumPy and SciPy
    with PeakMemory() as memory_use:
        for part in X[80:].split(20):
            tracemalloc.reset_peak()
            memory_use.peak = 0
            stream.update(part)
            peaks.append((memory_use.peak, tracemalloc.get_traced_memory()[1]))
    tracemalloc.stop()
    assert len(peaks) == 12
    ours, theirs = np.array(peaks).T
    assert ours[6:].max() <= 1.1 * ours[:6].max()
    assert theirs[6:].max() <= 1.2 * theirs[:6].max()


def test_the_memory_budget_bounds_every_window():
    X, budget = vit_like(4, 50), solver_memory_bytes(150, 150, 16, SMALLEST_BLOCK)
    stream = AnchorStream(config(memory_budget=budget), max_atoms=150)
    stream.update(X[:60])
    with pytest.raises(MemoryError, match="of 200 tokens"):
        stream.update(X[60:])
    assert stream.n_tokens == 60
