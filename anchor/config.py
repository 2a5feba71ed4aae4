"""Settings of VideoAnchor: strength of the gate, and how the tokens are scored."""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, get_args

import numpy as np
from torch import Tensor

from .grouping import Group, Merge
from .options import SolverOptions
from .spectral import AssignLabels
from .validation import check_choice, check_integer, check_keep, check_number

Scorer = Literal["ssc", "knn", "kmeans", "uniform"]
ScoreFunction = Callable[[Tensor], Tensor]
Decode = Literal["persist", "prefill"]
Arithmetic = Literal["exact", "authors"]
Score = Literal["published", "size", "row_sum", "projector", "cross_frame", "permuted", "cross_frame_permuted"]

# VideoAnchor, arXiv 2509.25151: the only published values of alpha_q, alpha_k, alpha_v.
PUBLISHED_ALPHAS = {"internvl2-8b": {"alpha_q": 4.0, "alpha_k": 9.5, "alpha_v": 2.5}}
ALPHA_LIMIT = 1e4
"""A thousand times what is published. At it, values of 6.6 and more leave float16."""


@dataclass(frozen=True, kw_only=True)
class VideoAnchorConfig(SolverOptions):
    """Settings of VideoAnchor (arXiv 2509.25151). A token of score s is gated by gamma = 1 + alpha s.

    Attributes:
        alpha_k: strength of the gate on keys, >= 0 and < 10,000. Published for one model only, see `preset`; no default
            exists.
        alpha_v: strength of the gate on values, in the same range.
        alpha_q: strength of the gate on queries, in the same range. It cancels in the softmax and moves only the
            log-sum-exp, and the weight of attention sinks where a decoder has them.
        n_clusters: subspaces, >= 1; published 24. "auto" counts them by the eigengap, see `spectral_labels`.
        pca_rank: components of the tokens that are used; None uses the tokens as they are. The paper gives no value:
            64 is this package's choice.
        decode: "persist" gates decoding steps as well (the paper); "prefill" gates the prompt only (the authors'
            code).
        scorer: "ssc" (the paper), "knn" (not the paper: each token is expressed by its 10 nearest; docs/performance.md
            has clusters of both beside the truth), "kmeans" and "uniform" (ablations), see `anchor_scores`, or a
            function from tokens (N, D) to scores (N,) in [0, 1].
        score: what scorer="ssc" or "knn" makes of self-expression and clusters, see `anchor_scores`. "published" (the
            paper); "size" and "row_sum", its two factors alone (the paper's ablations); "projector" (this package's
            own), whose sizes do not depend on how eigenvectors become labels; "cross_frame" (this package's own), which
            needs to know the frame of each token; "permuted" and "cross_frame_permuted", the published and
            the cross-frame scores given to other tokens, by random_state: the controls that tell what scores say from
            how strong a gate is.
        arithmetic: "exact" computes scores and factors in float32; "authors" solves, clusters and rounds as the
            authors' code does, see `reproduce`.
        assign_labels: how eigenvectors become labels: "cluster_qr", which has no seed, "kmeans", or "discretize" (the
            authors', whose labels depend on the seed).
        random_state: seed of "kmeans" and "discretize", and of group="random" and "kmeans", in [0, 2^32).
        keep: the visual tokens of a prompt that are left once they are merged (this package's own): a share of them in
            (0, 1], or a number of them, at least 2. 1 merges nothing. A merged token has its group's mean embedding and
            the sum of its members' gates, see docs/merging.md. It holds in `generate()`.
        group: how they are grouped: "ward", "subspace", "farthest", "kmeans", "grid", "tome", "evs", "vidcom2" or
            "random", see docs/merging.md.
        merge: what stands for a group: "counts", its mean embedding, which counts as often as it has members; "mean",
            the same, counted as one token; "drop", the embedding and score of one member, as if the others had not been
            there. The last two are what others do, to compare with.
        affine, alpha_e, alpha_z, tol, memory_budget: see `SolverOptions`.

    Raises:
        TypeError, ValueError: a setting is of the wrong type or out of its range.

    See Also:
        enable: gates a model by these settings.
        anchor_scores: scores tokens by them.
        SolverOptions: those of the solver alone.

    Examples:
        >>> import videoanchor_triton as va
        >>> config = va.VideoAnchorConfig(alpha_k=9.5, alpha_v=2.5, n_clusters=12)
        >>> config.decode
        'persist'
        >>> va.VideoAnchorConfig.preset("InternVL2-8B", n_clusters="auto").alpha_q
        4.0
    """

    alpha_k: float
    alpha_v: float
    alpha_q: float = 0.0
    n_clusters: int | Literal["auto"] = 24
    pca_rank: int | None = 64
    decode: Decode = "persist"
    scorer: Scorer | ScoreFunction = "ssc"
    score: Score = "published"
    arithmetic: Arithmetic = "exact"
    assign_labels: AssignLabels = "cluster_qr"
    random_state: int = 0
    keep: float = 1.0
    group: Group = "ward"
    merge: Merge = "counts"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("alpha_k", "alpha_v", "alpha_q"):
            check_number(name, getattr(self, name), low=0, low_included=True, high=ALPHA_LIMIT)
        if self.n_clusters != "auto":
            check_integer("n_clusters", self.n_clusters, low=1)
        if self.pca_rank is not None:
            check_integer("pca_rank", self.pca_rank, low=1)
        check_integer("random_state", self.random_state, low=0, high=2**32 - 1)
        check_keep(self.keep)
        check_choice("group", self.group, get_args(Group))
        check_choice("merge", self.merge, get_args(Merge))
        check_choice("decode", self.decode, get_args(Decode))
        check_choice("arithmetic", self.arithmetic, get_args(Arithmetic))
        check_choice("assign_labels", self.assign_labels, get_args(AssignLabels))
        check_choice("score", self.score, get_args(Score))
        if not callable(self.scorer):
            check_choice("scorer", self.scorer, get_args(Scorer), " or a function from tokens (N, D) to scores (N,)")
        if self.scorer == "kmeans" and self.n_clusters == "auto":
            raise ValueError(
                'n_clusters="auto" needs the affinity of scorer="ssc" or "knn"; give scorer="kmeans" a number'
            )
        if self.score != "published" and self.scorer not in ("ssc", "knn"):
            raise ValueError(
                f'score={self.score!r} needs scorer="ssc" or "knn", got scorer={self.scorer!r}: leave score out'
            )
        if self.arithmetic == "authors" and self.score != "published":
            raise ValueError(f'arithmetic="authors" needs score="published", got score={self.score!r}')
        if self.arithmetic == "authors" and not (self.affine and self.assign_labels == "discretize"):
            raise ValueError('arithmetic="authors" needs affine=True and assign_labels="discretize": use reproduce()')
        if self.merges and self.group == "subspace" and (callable(self.scorer) or self.scorer == "uniform"):
            raise ValueError('group="subspace" needs the subspaces of scorer="ssc", "knn" or "kmeans"')
        if self.arithmetic == "authors" and self.merges:
            raise ValueError("keep merges tokens, which the authors' code does not: give reproduce() keep=1")
        if self.arithmetic == "authors" and self.n_clusters == "auto":
            raise ValueError('n_clusters="auto" is not in the authors\' code: give reproduce() a number of clusters')

    @property
    def merges(self) -> bool:
        """Whether visual tokens are merged at all."""
        return self.keep != 1

    @property
    def looks_at_frames(self) -> bool:
        """Whether the scores need the frame of each token."""
        return self.score.startswith("cross_frame")

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> "VideoAnchorConfig":
        """The published settings of a model, in any spelling of case; `overrides` replace or add single ones.

        Raises:
            ValueError: nothing is published for this model.
        """
        if name.lower() not in PUBLISHED_ALPHAS:
            raise ValueError(
                f"no values are published for {name!r}, only for {', '.join(PUBLISHED_ALPHAS)}; give alpha_k and "
                "alpha_v yourself, VideoAnchorConfig(alpha_k=..., alpha_v=...), or find them with `videoanchor tune`"
            )
        return cls(**{**PUBLISHED_ALPHAS[name.lower()], **overrides})

    def reproduce(self) -> "VideoAnchorConfig":
        """These settings with the authors' arithmetic, to compare a run with theirs to rounding.

        Their ADMM in float64 with their penalty and stopping rule, affine; scikit-learn's spectral clustering of the
        dense affinity, with "discretize"; row sums, scores and factors rounded to bfloat16, 1e-5 in the score's
        denominator, 1e-6 in the logarithm of the factors; decoding steps ungated; of a prompt with images and videos
        only the videos. Time and memory grow as theirs: N^2 in the number of tokens.
        """
        return replace(self, affine=True, assign_labels="discretize", decode="prefill", arithmetic="authors")

    def to_dict(self) -> dict[str, Any]:
        """All settings, ready for JSON; a scoring function becomes its qualified name."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        values = {name: value.item() if isinstance(value, np.generic) else value for name, value in values.items()}
        if callable(self.scorer):
            named = self.scorer if hasattr(self.scorer, "__qualname__") else type(self.scorer)
            values["scorer"] = f"{named.__module__}.{named.__qualname__}"
        return values


UNGATED = VideoAnchorConfig(alpha_k=0.0, alpha_v=0.0, scorer="uniform", n_clusters=1)
"""No gate, for which nothing is scored: what a gate is compared with."""
