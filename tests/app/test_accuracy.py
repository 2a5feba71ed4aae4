"""Answers as the judge: what may not change the trained model's answers does not, and what has to, does."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import AutoModelForImageTextToText

import videoanchor_triton as va
from benchmarks.room_scans.accuracy import KEEP, Asker, Way, gate
from videoanchor_triton.anchor.config import UNGATED
from videoanchor_triton.app.room_scans import CHECKPOINT


@pytest.fixture(scope="module")
def asker() -> Asker:
    return Asker(CHECKPOINT, 8)


@pytest.fixture(scope="module")
def plain(asker: Asker) -> tuple[np.ndarray, list[str]]:
    right, replies = asker.right(Way("paths", "transformers"))
    assert right.mean() > 0.9
    return right, replies


@pytest.mark.parametrize(
    "way",
    [
        Way("paths", "alpha 0", UNGATED),
        Way("paths", "a prompt at a time", UNGATED, n_rows=1),
        Way("paths", "chunks", UNGATED, options={"prefill_chunk_size": 40}),
        Way("paths", "reference attention", UNGATED, backend="reference"),
        Way("paths", "static cache", UNGATED, options={"cache_implementation": "static"}),
    ],
    ids=lambda way: way.name,
)
def test_other_paths_give_the_same_answers(asker: Asker, plain: tuple[np.ndarray, list[str]], way: Way) -> None:
    assert asker.right(way)[1] == plain[1]


def test_triton_gives_the_answers_of_sdpa() -> None:
    """The kernels, in the interpreter where there is no GPU, in a whole model, gated and with merged tokens."""
    asker, config = Asker(CHECKPOINT, 1), gate(alpha_k=9.5, alpha_v=1.0, keep=0.5)
    sdpa, triton = (asker.right(Way("gate", name, config, n_rows=16, backend=name))[1] for name in ("sdpa", "triton"))
    assert triton == sdpa


def test_alpha_0_is_the_model_to_the_bit(asker: Asker) -> None:
    inputs = asker.inputs(range(4))
    model = AutoModelForImageTextToText.from_pretrained(CHECKPOINT, dtype=torch.float32).eval()
    with torch.inference_mode():
        expected = model(**inputs).logits
        with va.enable(model, UNGATED):
            assert torch.equal(model(**inputs).logits, expected)


def test_half_of_the_tokens_answer_as_all_do(asker: Asker, plain: tuple[np.ndarray, list[str]]) -> None:
    """At most one question in 76; without counts, and with tokens dropped, many more are lost."""
    for group in ("ward", "farthest"):
        right, _ = asker.right(Way("keep", group, replace(KEEP, keep=0.5, group=group)))
        assert right.sum() >= plain[0].sum() - 1
    quarter, _ = asker.right(Way("keep", "farthest", KEEP))
    assert quarter.mean() > plain[0].mean() - 0.03
    dropped, _ = asker.right(Way("keep", "dropped", replace(KEEP, merge="drop")))
    assert dropped.mean() < plain[0].mean() - 0.05


def test_a_gate_that_is_too_strong_costs_answers(asker: Asker, plain: tuple[np.ndarray, list[str]]) -> None:
    """The judge sees what a gate does: published strengths, which are another model's, lose a fifth of the answers."""
    published = va.VideoAnchorConfig.preset("internvl2-8b", n_clusters=12, pca_rank=32)
    right, _ = asker.right(Way("gate", "published", published))
    assert right.mean() < plain[0].mean() - 0.2
