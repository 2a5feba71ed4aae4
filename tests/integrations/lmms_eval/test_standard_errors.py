"""Standard errors as lmms-eval computes them from our terms, against how much the metrics really vary."""

import numpy as np
import pytest

from videoanchor_triton.integrations.lmms_eval.standard_errors import Item, Parts, aggregation, metric_list

PARTS: Parts = [("a",), ("b", "c"), ("never asked",)]
TYPES = np.array(["a", "b", "b", "b", "b", "c"])


def clustered(terms: np.ndarray, videos: np.ndarray) -> float:
    """Equation 4 of Miller, "Adding Error Bars to Evals" (arXiv 2411.00640), which lmms-eval implements."""
    n, off = len(terms), terms - terms.mean()
    same = videos[:, None] == videos
    cross = (off[:, None] * off * same).sum() - (off**2).sum()
    return float(np.sqrt(off @ off / (n - 1) / n + cross / n**2))


def drawn(rng: np.random.Generator, n_videos: int, spread: float) -> tuple[list[Item], np.ndarray]:
    """Questions of all types about each video, whose difficulty they share."""
    videos = np.repeat(np.arange(n_videos), len(TYPES))
    types = np.tile(TYPES, n_videos)
    level = np.select([types == "a", types == "b"], [0.2, 0.5], 0.8) + np.repeat(
        rng.normal(0, spread, n_videos), len(TYPES)
    )
    scores = rng.random(len(videos)) < np.clip(level, 0.02, 0.98)
    return [{"score": float(s), "type": t} for s, t in zip(scores, types, strict=True)], videos


def test_a_mean_of_means_of_what_is_there() -> None:
    items = [{"score": s, "type": t} for s, t in ((1, "a"), (0, "a"), (1, "b"), (1, "b"), (0, "b"), (0.5, "c"))]
    assert aggregation(PARTS, 1)(items) == pytest.approx((0.5 + (2 / 3 + 0.5) / 2) / 2)
    assert np.mean([item["term"] for item in items]) == pytest.approx(aggregation(PARTS, 1)(items))
    assert aggregation(PARTS, 100)(items) == pytest.approx(100 * aggregation(PARTS, 1)(items))
    assert aggregation(None, 100)(items) == pytest.approx(100 * 3.5 / 6)
    assert [item["term"] for item in items] == pytest.approx([100, 0, 100, 100, 0, 50])
    (entry,) = metric_list({"one": [("a",)]}, {"one": 100})
    assert (entry["metric"], entry["aggregation"](items[:2])) == ("one", 50)


@pytest.mark.parametrize("spread", [0.0, 0.3])
@pytest.mark.parametrize("parts", [PARTS, None], ids=["means of means", "all questions"])
def test_the_standard_error_is_how_much_the_metric_varies(parts: Parts | None, spread: float) -> None:
    """In 600 evaluations of 60 videos; questions taken as independent are too sure where videos differ."""
    rng = np.random.default_rng(0)
    values, errors, independent = [], [], []
    for _ in range(600):
        items, videos = drawn(rng, 60, spread)
        values.append(aggregation(parts, 100)(items))
        terms = np.array([item["term"] for item in items])
        errors.append(clustered(terms, videos))
        independent.append(terms.std(ddof=1) / np.sqrt(len(terms)))
    varies = np.std(values, ddof=1)
    assert np.mean(errors) == pytest.approx(varies, rel=0.08)
    assert (np.mean(independent) < 0.9 * varies) == (spread > 0)
