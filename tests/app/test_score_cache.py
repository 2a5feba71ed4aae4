"""Scores on disk: the same numbers again, or computed anew, never others."""

import errno
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import videoanchor_triton as va
from videoanchor_triton.anchor.scores import AnchorResult, anchor_scores
from videoanchor_triton.app import score_cache
from videoanchor_triton.app.score_cache import ScoreCache, cache_key

CONFIG = va.VideoAnchorConfig(alpha_k=2, alpha_v=1, n_clusters=3, pca_rank=5, scorer="kmeans")
PLENTY = 2**30


def tokens(n: int = 33, seed: int = 0) -> Tensor:
    return torch.randn(n, 17, generator=torch.Generator().manual_seed(seed))


def assert_same(ours: AnchorResult, other: AnchorResult) -> None:
    assert torch.equal(ours.scores, other.scores)
    assert torch.equal(ours.labels, other.labels)
    assert ours.labels.dtype == torch.int64
    for name in ("n_iter", "residual", "converged", "eigengap", "in_gap"):
        assert getattr(ours, name) == getattr(other, name), name
    if other.duality_gap is None:
        assert ours.duality_gap is None
    else:
        assert ours.duality_gap is not None
        assert torch.equal(ours.duality_gap, other.duality_gap)


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of tokens of each computation."""
    calls = []

    def counting(X: Tensor, config: Any, **options: Any) -> AnchorResult:
        calls.append(len(X))
        return anchor_scores(X, config, **options)

    monkeypatch.setattr(score_cache, "anchor_scores", counting)
    return calls


@pytest.mark.parametrize("scorer", ["ssc", "knn", "kmeans", "uniform"])
def test_the_same_numbers_again(tmp_path: Path, computed: list[int], scorer: Any) -> None:
    config = replace(CONFIG, scorer=scorer)
    expected = anchor_scores(tokens(), config)
    assert (expected.eigengap is None) == (expected.in_gap is None) == (scorer in ("kmeans", "uniform"))
    for folder in (tmp_path, tmp_path, tmp_path / "new"):
        assert_same(ScoreCache(folder, PLENTY).anchor_scores(tokens(), config), expected)
    assert computed == [33, 33]


def test_found_by_content_settings_and_version(monkeypatch: pytest.MonkeyPatch) -> None:
    x = tokens()
    other = x.clone()
    other[-1, -1] += 1e-6
    keys = [
        cache_key(x, CONFIG),
        cache_key(other, CONFIG),
        cache_key(x.double(), CONFIG),
        cache_key(x.flatten().view(17, 33), CONFIG),
        cache_key(x, CONFIG, frames=torch.arange(33)),
        cache_key(x, CONFIG, frames=torch.arange(33) // 2),
        cache_key(x, replace(CONFIG, n_clusters=4)),
        cache_key(x, replace(CONFIG, random_state=1)),
        cache_key(x, replace(CONFIG, tol=0.01)),
        cache_key(x, replace(CONFIG, assign_labels="kmeans")),
        cache_key(x, replace(CONFIG, scorer="knn")),
        cache_key(x, replace(CONFIG, scorer="knn", score="projector")),
    ]
    assert cache_key(x.clone(), replace(CONFIG, alpha_k=9, alpha_v=0, alpha_q=1, decode="prefill")) == keys[0]
    assert cache_key(x.T.contiguous().T, CONFIG) == keys[0], "strides are no content"
    monkeypatch.setattr(score_cache, "version", lambda _: "99")
    assert len({*keys, cache_key(x, CONFIG)}) == len(keys) + 1


def test_bfloat16_tokens(tmp_path: Path, computed: list[int]) -> None:
    cache, x = ScoreCache(tmp_path, PLENTY), tokens().bfloat16()
    assert_same(cache.anchor_scores(x, CONFIG), cache.anchor_scores(x, CONFIG))
    assert (computed, cache.hits, cache.misses) == ([33], 1, 1)


def corrupt_bit(content: bytes) -> bytes:
    return content[:-9] + bytes([content[-9] ^ 1]) + content[-8:]


@pytest.mark.parametrize(
    "corrupt",
    [
        pytest.param(lambda _: b"", id="empty"),
        pytest.param(lambda content: content[:-3], id="cut-short"),
        pytest.param(lambda content: content[:5], id="no-header"),
        pytest.param(corrupt_bit, id="one-bit"),
        pytest.param(lambda content: b"\xff" * len(content), id="garbage"),
        pytest.param(lambda content: content.replace(b"checksum", b"chocksum"), id="other-metadata"),
        pytest.param(lambda content: content.replace(b"labels", b"lobels"), id="other-tensor"),
    ],
)
def test_a_corrupt_entry_is_computed_again(tmp_path: Path, computed: list[int], corrupt: Any) -> None:
    cache = ScoreCache(tmp_path, PLENTY)
    expected = cache.anchor_scores(tokens(), CONFIG)
    (entry,) = tmp_path.iterdir()
    entry.write_bytes(corrupt(entry.read_bytes()))
    assert_same(cache.anchor_scores(tokens(), CONFIG), expected)
    assert_same(cache.anchor_scores(tokens(), CONFIG), expected)
    assert len(computed) == 2, "repaired by the second computation"


def test_an_entry_of_another_video_is_not_taken(tmp_path: Path) -> None:
    cache = ScoreCache(tmp_path, PLENTY)
    cache.anchor_scores(tokens(20), CONFIG)
    (entry,) = tmp_path.iterdir()
    entry.rename(tmp_path / f"{cache_key(tokens(), CONFIG)}.safetensors")
    assert_same(cache.anchor_scores(tokens(), CONFIG), anchor_scores(tokens(), CONFIG))


def test_size_grows_with_the_tokens_only(tmp_path: Path) -> None:
    cache = ScoreCache(tmp_path, PLENTY)
    cache.anchor_scores(tokens(301), replace(CONFIG, scorer="ssc", tol=0.1))
    (entry,) = tmp_path.iterdir()
    assert entry.stat().st_size < 301 * 20 + 1000  # scores 4, labels 8, gaps 8 bytes a token


def test_the_least_recently_used_go(tmp_path: Path, computed: list[int]) -> None:
    cache = ScoreCache(tmp_path, PLENTY)
    paths = [tmp_path / f"{cache_key(tokens(seed=seed), CONFIG)}.safetensors" for seed in range(4)]
    for time, seed in enumerate((0, 1, 2, 0)):
        cache.anchor_scores(tokens(seed=seed), CONFIG)
        os.utime(paths[seed], (time, time))
    size = paths[0].stat().st_size
    stranger = tmp_path / "mine.safetensors"
    stranger.write_bytes(b"x" * 10 * size)
    cache.max_bytes = 3 * size
    cache.anchor_scores(tokens(seed=3), CONFIG)
    assert [path.exists() for path in paths] == [True, False, True, True]
    assert stranger.exists(), "only entries are removed"
    assert computed == [33] * 4


def test_a_used_entry_counts_as_new(tmp_path: Path) -> None:
    cache = ScoreCache(tmp_path, PLENTY)
    cache.anchor_scores(tokens(), CONFIG)
    (entry,) = tmp_path.iterdir()
    os.utime(entry, (1, 1))
    cache.anchor_scores(tokens(), CONFIG)
    assert entry.stat().st_mtime > 1


def test_no_room_at_all(tmp_path: Path, computed: list[int]) -> None:
    cache = ScoreCache(tmp_path, 0)
    for _ in range(2):
        cache.anchor_scores(tokens(), CONFIG)
    assert computed == [33, 33]
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError, match="max_bytes"):
        ScoreCache(tmp_path, -1)


def test_a_full_disk_costs_the_entry_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(_file: int) -> None:
        raise OSError(errno.ENOSPC, "No space left")

    monkeypatch.setattr(os, "fsync", full)
    cache = ScoreCache(tmp_path, PLENTY)
    assert_same(cache.anchor_scores(tokens(), CONFIG), anchor_scores(tokens(), CONFIG))
    assert list(tmp_path.iterdir()) == []
    assert str(tmp_path / cache_key(tokens(), CONFIG)) in caplog.text


def test_an_interruption_leaves_no_entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(_file: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        ScoreCache(tmp_path, PLENTY).anchor_scores(tokens(), CONFIG)
    assert list(tmp_path.iterdir()) == []


def test_an_entry_can_be_read_by_whom_other_files_can(tmp_path: Path) -> None:
    (tmp_path / "other").touch()
    ScoreCache(tmp_path / "cache", PLENTY).anchor_scores(tokens(), CONFIG)
    (entry,) = (tmp_path / "cache").iterdir()
    assert entry.stat().st_mode == (tmp_path / "other").stat().st_mode


def test_what_a_killed_process_left_is_removed_with_the_rest(tmp_path: Path) -> None:
    cache = ScoreCache(tmp_path, PLENTY)
    cache.anchor_scores(tokens(), CONFIG)
    (entry,) = tmp_path.iterdir()
    left = entry.with_name(".writing-0123456789abcdef.safetensors")
    left.write_bytes(b"x" * 5000)
    os.utime(left, (1, 1))
    cache.max_bytes = 2 * entry.stat().st_size
    cache.anchor_scores(tokens(seed=1), CONFIG)
    assert not left.exists()
    assert entry.exists()


def test_a_scoring_function_is_refused(tmp_path: Path) -> None:
    config = va.VideoAnchorConfig(alpha_k=1, alpha_v=1, scorer=lambda x: x[:, 0])
    with pytest.raises(ValueError, match="named scorer"):
        ScoreCache(tmp_path, PLENTY).anchor_scores(tokens(), config)
