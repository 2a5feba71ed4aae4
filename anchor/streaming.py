"""Scores of a video that goes on: new tokens are scored together with a bounded dictionary of earlier ones."""

import math
from dataclasses import dataclass, replace
from numbers import Integral

import numpy as np
import torch
from scipy.sparse import csc_array
from torch import Tensor

from .affinity import coefficient_matrix, majority_labels
from .compress import group_factors
from .config import VideoAnchorConfig
from .grouping import group_means, group_tokens
from .problem import DLPackArray, as_tokens, computing_precision, token_features
from .scores import ROUNDOFF, AnchorResult
from .solver import SelfExpression, self_expression
from .spectral import MAX_AUTO_CLUSTERS, Subspaces, spectral_subspaces
from .timing import Progress, Stopwatch
from .validation import check_integer


@dataclass(frozen=True)
class Atoms:
    """The dictionary: earlier tokens that new ones are expressed over.

    Attributes:
        tokens: (K, D), as they came, in the precision of the stream.
        position: (K,) int64, which token of the stream each is, counted from 0; ascending.
        labels: (K,) int64 clusters, as they were handed out.
        scores: (K,) float32 in [0, 1], what the last update made of them. What was handed out before may differ: by
            how much is what it costs to keep old scores.
    """

    tokens: Tensor
    position: Tensor
    labels: Tensor
    scores: Tensor


@dataclass(frozen=True)
class MergedTokens:
    """All tokens of a stream so far, in a bounded number of groups: what a cache of a video without end holds.

    One key with gamma_k and one value with gamma_v are, within an attention call, what the group's members would be if
    each had its own gates and all were as the group's token is (docs/merging.md).

    Attributes:
        tokens: (K, D) means of the groups, in the precision of the stream; of equal members, these to the bit.
        counts: (K,) int64 members of each; their sum is the number of tokens so far.
        position: (K,) int64, which token of the stream stands for the group, counted from 0: a member; ascending.
        scores: (K,) float64 means of the members' scores, as they were handed out.
        squares: (K,) float64 means of their squares.
        config: whose alpha_k and alpha_v the gates have.
    """

    tokens: Tensor
    counts: Tensor
    position: Tensor
    scores: Tensor
    squares: Tensor
    config: VideoAnchorConfig

    @property
    def gamma_k(self) -> Tensor:
        """(K,) float32 sums of the members' 1 + alpha_k s, as `write_pages` takes them."""
        return self._factors()[0].exp().float()

    @property
    def gamma_v(self) -> Tensor:
        """(K,) float32 means of the members' 1 + alpha_v s, weighted by their 1 + alpha_k s."""
        return self._factors()[1].float()

    def _factors(self) -> tuple[Tensor, Tensor]:
        return group_factors(self.counts.double(), self.scores, self.squares, self.config)

    def merged(self, k: int) -> "MergedTokens":
        """In at most k groups."""
        if len(self.tokens) <= k:
            return self
        groups = group_tokens(self.tokens, k, self.config.group)
        weights = group_means(self.counts[:, None].double(), groups.member, k)

        def mean(x: Tensor) -> Tensor:  # about a member, so that what does not change stays to the bit
            about = x[groups.kept]
            weighted = self.counts[:, None] * (x - about[groups.member])
            return about + group_means(weighted, groups.member, k) / weights

        counts = torch.zeros_like(self.counts[:k]).index_add_(0, groups.member, self.counts)
        moments = mean(torch.stack([self.scores, self.squares], 1))
        tokens = mean(self.tokens).to(self.tokens.dtype)
        return replace(
            self,
            tokens=tokens,
            counts=counts,
            position=self.position[groups.kept],
            scores=moments[:, 0],
            squares=moments[:, 1],
        )

    def followed_by(self, new: "MergedTokens") -> "MergedTokens":
        """These, then new ones."""
        names = ("tokens", "counts", "position", "scores", "squares")
        return replace(self, **{name: torch.cat([getattr(self, name), getattr(new, name)]) for name in names})


class AnchorStream:
    """Scores of visual tokens that arrive in chunks, frame by frame say (`anchor_scores` for a video that goes on).

    The first chunk is scored exactly as `anchor_scores` does. Each later one is put together with the dictionary, at
    most `max_atoms` earlier tokens. In this window every token, new or old, is expressed by the others, with PCA and
    weights of the window. Then

    - the row sum r_i of a new token is that in the window. The old ones are expressed again because r_i counts how
      much token i serves others: among the tokens of one chunk alone it says little. Affine row sums are 1 on average
      in every window, so that those of old and new tokens compare.
    - a new token gets the label with which it shares most affinity |W_ij| + |W_ji| in the dictionary, the lowest of
      equal ones; without any, that of those new tokens that have got one, and so on; those that nothing links to the
      dictionary share one further cluster.
    - s_hat_i = pi_i r_i with pi_i the share of its cluster among all tokens so far; the score is
      (s_hat_i - min) / (max - min) with min and max of the first chunk, clipped to [0, 1].
    - the next dictionary are the tokens of the window with the largest sum_j |W_ij|, at least one of each cluster,
      earlier ones first where they are equal.

    Exact: the first chunk; the self-expression of every window, which is certified as always; and so, as long as
    nothing was dropped from the dictionary, all row sums of the last window, which are those of all tokens solved at
    once. Not exact: tokens that were dropped express nothing and are expressed by nothing; clusters are those of the
    first chunk, except for one (start a new stream at a cut to another scene); and scores, once handed out, do not
    change, although later frames would change pi and r, and although a first chunk that shows little of the video
    gives a poor range: if nothing stands out in it, all scores of the stream are 0.
    In benchmarks/results/ssc-streaming, with a dictionary of a quarter of the clip and chunks of an eighth, the rank
    correlation of new scores with those of everything solved at once is 0.35 to 0.45, and 0.19 behind a cut.

    Time and memory of an update are those of `max_atoms` + chunk tokens, however long the video: few large chunks cost
    less than many small ones. On the CPU the result is the same to the bit run to run, with the same number of
    threads. An update that fails leaves the stream as it was.

    With `config.keep`, a number, a cache goes with the stream: `merged` has at most so many tokens, which stand for all
    that came. New ones enter it as they are, and what was there merges to make room, again and again; a chunk of more
    than half of `keep` merges too, so that what came before keeps the other half. Nothing is dropped: the counts sum
    to `n_tokens`. Tokens are grouped by their embeddings, group="farthest", since the others would need to know places
    or how many tokens each stands for. Scores do not depend on it.

    Args:
        config: settings; the scorer must be "ssc", the score "published" and the arithmetic "exact". Other scores would
            need their own rule for keeping early ones valid: the cross-frame score of a token changes with every frame
            that follows. `keep` must be 1, for no cache, or a number of tokens, and then `group` must be "farthest".
        max_atoms: bound on the dictionary, above the number of clusters.

    Attributes:
        dictionary: the `Atoms`; None before the first chunk.
        n_tokens: tokens so far.
        cluster_sizes: (n_clusters + 1,) int64, tokens of each cluster so far, on the CPU; the last cluster is the
            further one. Empty before the first chunk.
        solution: the self-expression of the last window, the dictionary before the new tokens; None before the first
            chunk.
        merged: the `MergedTokens`; None before the first chunk, and with keep=1.

    Raises:
        TypeError, ValueError: the scorer is not "ssc", the score not "published", the arithmetic not "exact", keep is a
            share, group beside keep is not "farthest", or max_atoms is no integer or too small.

    See Also:
        anchor_scores: for a video that is all there.

    Examples:
        >>> import torch
        >>> import videoanchor_triton as va
        >>> config = va.VideoAnchorConfig(alpha_k=9.5, alpha_v=2.5, n_clusters=3)
        >>> stream = va.AnchorStream(config, max_atoms=16)
        >>> [stream.update(frame).scores.shape[0] for frame in torch.randn(3, 12, 8)]  # 3 frames of 12 tokens
        [12, 12, 12]
        >>> stream.n_tokens, len(stream.dictionary.tokens)
        (36, 16)
    """

    def __init__(self, config: VideoAnchorConfig, *, max_atoms: int = 2048) -> None:
        if config.scorer != "ssc":
            raise ValueError(f'config.scorer must be "ssc" for a stream, got {config.scorer!r}; use anchor_scores')
        if config.score != "published":
            raise ValueError(f'config.score must be "published" for a stream, got {config.score!r}; use anchor_scores')
        if config.arithmetic != "exact":
            raise ValueError(
                f'config.arithmetic must be "exact" for a stream, got {config.arithmetic!r}; leave reproduce() out'
            )
        if config.merges and not isinstance(config.keep, Integral):
            raise ValueError(
                f"config.keep must be a number of tokens for a stream, of whose end nobody knows, got {config.keep}; "
                "give keep=2048, say"
            )
        if config.merges and config.group != "farthest":
            raise ValueError(f'config.group must be "farthest" for a stream with keep, got {config.group!r}')
        if config.merges and config.merge != "counts":
            raise ValueError(f'config.merge must be "counts" for a stream with keep, got {config.merge!r}')
        # Under "auto", tokens without affinity are one more.
        n_clusters = MAX_AUTO_CLUSTERS + 1 if config.n_clusters == "auto" else config.n_clusters
        check_integer("max_atoms", max_atoms, low=n_clusters + 1)
        self.config = config
        self.max_atoms = max_atoms
        self.dictionary: Atoms | None = None
        self.n_tokens = 0
        self.cluster_sizes = torch.zeros(0, dtype=torch.int64)
        self.solution: SelfExpression | None = None
        self.merged: MergedTokens | None = None
        self._lowest, self._spread = 0.0, math.inf  # of s_hat in the first chunk

    def update(self, X: Tensor | np.ndarray | DLPackArray, *, progress: Progress | None = None) -> AnchorResult:
        """Score the tokens of new frames.

        Args:
            X: (n, D) tokens as `anchor_scores` takes them, n >= 1, in the first chunk n >= 2 that are not all equal.
            progress: called as progress("solve", tokens done, tokens of the window) at most four times a second, and
                once at the end.

        Returns:
            Scores, labels and duality gaps of these n tokens; n_iter, residual and converged are those of the window,
            eigengap and in_gap those of the first chunk, None of later ones.

        Raises:
            TypeError: X is no floating-point tensor or array, or its precision is not that of the first chunk (half
                precisions count as float32).
            ValueError: X is empty, holds NaN or infinity, or has other features or another device than the first
                chunk; or the first chunk shows nothing.
            MemoryError: see `self_expression`.

        Warns:
            ConvergenceWarning: some tokens of the window, old ones first, did not come within config.tol.
        """
        tokens = as_tokens(X)
        tokens = tokens.to(computing_precision(tokens))
        self._check(tokens)
        old, config, device = self.dictionary, self.config, tokens.device
        window = tokens if old is None else torch.cat([old.tokens, tokens])
        n_old = len(window) - len(tokens)
        watch = Stopwatch(device)
        with watch.stage("pca"):
            features = token_features(window, config.pca_rank)
        if old is None and bool((features == features[:, :1]).all()):
            raise ValueError(f"the {len(tokens)} tokens of the first chunk are equal; start with frames that differ")
        with watch.stage("solve"):
            solution = self_expression(features, config, progress=progress)
        weights = abs(coefficient_matrix(solution.indices, solution.values))
        with watch.stage("spectral" if old is None else "cluster"):
            if old is None:
                found = self._first_subspaces(solution)
                labels, eigengap, in_gap = found.labels, found.eigengap, found.in_gap
            else:
                labels, eigengap, in_gap = self._joined_labels(weights, old.labels), None, None
            n_clusters = len(self.cluster_sizes) or int(labels.amax()) + 2
            sizes = torch.bincount(labels[n_old:].cpu(), minlength=n_clusters)
            sizes[: len(self.cluster_sizes)] += self.cluster_sizes
        with watch.stage("score"):
            n_tokens = self.n_tokens + len(tokens)
            unscaled = sizes.to(device)[labels].double() / n_tokens * solution.row_sums()
            lowest, spread = _range(unscaled) if old is None else (self._lowest, self._spread)
            scores = ((unscaled - lowest) / spread).clamp(0, 1).float()
        position = torch.arange(self.n_tokens, n_tokens, device=device)
        position = position if old is None else torch.cat([old.position, position])
        kept = self._heaviest(weights, labels)
        merged = self._merged_with(tokens, scores[n_old:], position[n_old:]) if config.merges else None
        self.dictionary, self.merged = Atoms(window[kept], position[kept], labels[kept], scores[kept]), merged
        self.n_tokens, self.cluster_sizes, self.solution = n_tokens, sizes, solution
        self._lowest, self._spread = lowest, spread
        if progress is not None:
            progress("score", 1, 1)
        return AnchorResult(
            scores=scores[n_old:].clone(),
            labels=labels[n_old:].clone(),
            n_iter=solution.n_iter,
            residual=solution.residual,
            converged=solution.converged,
            duality_gap=solution.gap[n_old:].clone(),
            eigengap=eigengap,
            in_gap=in_gap,
            seconds=watch.seconds(),
        )

    def _merged_with(self, tokens: Tensor, scores: Tensor, position: Tensor) -> MergedTokens:
        """The cache with new tokens (n, D), their scores and positions (n,)."""
        keep, s = int(self.config.keep), scores.double()
        new = MergedTokens(tokens, torch.ones_like(position), position, s, s.square(), self.config)
        if self.merged is None:
            return replace(new, tokens=tokens.clone()).merged(keep)
        old = self.merged.merged(max(keep - len(tokens), keep // 2))
        return old.followed_by(new.merged(keep - len(old.tokens)))

    def _check(self, tokens: Tensor) -> None:
        if self.dictionary is None:
            if len(tokens) < 2:
                raise ValueError(f"the first chunk must have at least 2 tokens, got shape {tuple(tokens.shape)}")
            return
        if len(tokens) == 0:
            raise ValueError(f"X must have at least 1 token, got shape {tuple(tokens.shape)}; skip an empty chunk")
        known = self.dictionary.tokens
        if tokens.shape[1] != known.shape[1]:
            raise ValueError(f"X must have {known.shape[1]} features as the first chunk, got {tokens.shape[1]}")
        if tokens.device != known.device:
            raise ValueError(f"X must be on {known.device} as the first chunk, got {tokens.device}")
        if tokens.dtype != known.dtype:
            raise TypeError(f"X must be {known.dtype} as the first chunk, got {tokens.dtype}; convert it")

    def _first_subspaces(self, solution: SelfExpression) -> Subspaces:
        return spectral_subspaces(
            solution.affinity(),
            self.config.n_clusters,
            assign_labels=self.config.assign_labels,
            random_state=self.config.random_state,
        )

    def _joined_labels(self, weights: csc_array, old_labels: Tensor) -> Tensor:
        """(K + n,) labels of the window, given |W| and the (K,) labels of the dictionary, which stay."""
        affinity, further, n_old = (weights + weights.T).tocsr(), len(self.cluster_sizes) - 1, len(old_labels)
        labels = np.full(weights.shape[0], -1)  # pyright: ignore[reportOptionalSubscript]
        labels[:n_old] = old_labels.cpu().numpy()
        while True:
            found = majority_labels(affinity, labels, further + 1)
            new = (labels < 0) & (found >= 0)
            if not new.any():
                return torch.from_numpy(np.where(labels < 0, further, labels)).to(old_labels.device)
            labels[new] = found[new]

    def _heaviest(self, weights: csc_array, labels: Tensor) -> Tensor:
        """Tokens of the window that are kept, ascending, given |W|."""
        order = np.argsort(-np.asarray(weights.sum(axis=1)), kind="stable")
        first = np.unique(labels.cpu().numpy()[order], return_index=True)[1]  # the heaviest of each cluster
        kept = np.concatenate([order[first], np.delete(order, first)])[: self.max_atoms]
        return torch.from_numpy(np.sort(kept)).to(labels.device)


def _range(unscaled: Tensor) -> tuple[float, float]:
    """Lowest value and spread of the unscaled score, see `shared_expression_score`; infinite spread if constant."""
    lowest, highest = torch.stack(unscaled.aminmax()).tolist()
    spread = highest - lowest
    return lowest, math.inf if spread <= ROUNDOFF * max(-lowest, highest) else spread
