"""Aggregations whose standard errors lmms-eval works out rightly: by video, and for means of means."""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Item = dict[str, Any]
"""Of a question: "score", its "type", its "video", and "term", which lmms-eval reads as `score_key`."""
Parts = Sequence[Sequence[str]]


def aggregation(parts: Parts | None, scale: float) -> Callable[[list[Item]], float]:
    """The mean over parts of the mean over types of the mean score, times `scale`.

    lmms-eval's standard errors are those of the mean of one number a question, "term". For a mean of means that number
    is the metric itself plus the question's share in it, as its linearisation has it: the mean of the terms is the
    metric, and their spread over videos is that of the metric.

    Args:
        parts: types that are one part; parts and types without a question do not count. None: all questions alike.

    Examples:
        >>> from videoanchor_triton.integrations.lmms_eval.standard_errors import aggregation
        >>> items = [{"score": score, "type": kind} for score, kind in ((1, "a"), (0, "b"), (1, "b"), (0, "b"))]
        >>> round(aggregation((("a",), ("b",)), 100)(items), 2)
        66.67
        >>> [round(item["term"], 2) for item in items]
        [66.67, 44.44, 111.11, 44.44]
    """

    def aggregate(items: list[Item]) -> float:
        by_type = defaultdict[str, list[Item]](list)
        for item in items:
            by_type["" if parts is None else item["type"]].append(item)
        present = [[kind for kind in part if kind in by_type] for part in ((("",),) if parts is None else parts)]
        present = [part for part in present if part]
        means = {kind: sum(item["score"] for item in some) / len(some) for kind, some in by_type.items()}
        weights = {kind: 1 / len(present) / len(part) for part in present for kind in part}
        value = sum(weight * means[kind] for kind, weight in weights.items())
        for kind, some in by_type.items():
            often = len(items) * weights[kind] / len(some)
            for item in some:
                item["term"] = scale * (value + often * (item["score"] - means[kind]))
        return scale * value

    return aggregate


def metric_list(metrics: Mapping[str, Parts | None], scales: Mapping[str, float]) -> list[dict[str, Any]]:
    """lmms-eval's entries for `aggregation`s by name; a scale that is not given is 1."""
    return [
        {"metric": name, "aggregation": aggregation(parts, scales.get(name, 1)), "higher_is_better": True}
        for name, parts in metrics.items()
    ]
