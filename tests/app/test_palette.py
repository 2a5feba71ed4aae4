"""Colours of the pictures: which subspace has which, apart for every sight, and the scale of the scores."""

import numpy as np
import pytest
from test_viz_pieces import finished

from videoanchor_triton.app.token_grid import TokenGrid
from videoanchor_triton.app.viz.overlay import MIN_WIDTH, Painter
from videoanchor_triton.app.viz.palette import COLOURS, OTHER, SCORE_SCALE, SUBSPACE_MAP, size_ranks, subspace_names


def test_colours_go_by_size_and_the_small_share_one() -> None:
    labels = np.repeat(np.arange(20), [3, 9, 9, *range(20, 37)])
    ranks = size_ranks(labels)
    assert (ranks[labels == 19] == 0).all()
    assert (ranks[labels == 1] == len(COLOURS)).all()
    assert (ranks[labels == 8] == 11).all()
    assert (ranks[labels == 7] == 12).all()
    names = subspace_names(labels)
    assert names == [*((str(n + 1), colour) for n, colour in enumerate(COLOURS)), ("rest", OTHER)]
    assert subspace_names(np.array([7, 7, 2])) == [("1", COLOURS[0]), ("2", COLOURS[1])]
    assert SUBSPACE_MAP([0, 12], bytes=True)[:, :3].tolist() == [[0, 180, 255], [138, 138, 138]]


_TO_LMS_LIKE = {  # Machado, Oliveira and Fernandes 2009, severity 1
    "normal": np.eye(3),
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.01182, 0.04294, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.3039]],
}


@pytest.mark.parametrize("sight", _TO_LMS_LIKE)
def test_colours_stay_apart_for_every_sight(sight: str) -> None:
    rgb = SUBSPACE_MAP(np.arange(len(COLOURS) + 1))[:, :3]
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4) @ np.array(_TO_LMS_LIKE[sight]).T
    to_xyz = np.array(
        [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.072175], [0.0193339, 0.119192, 0.9503041]]
    )
    xyz = np.clip(linear, 0, 1) @ to_xyz.T / (0.95047, 1, 1.08883)
    f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    lab = np.stack([116 * f[:, 1] - 16, 500 * (f[:, 0] - f[:, 1]), 200 * (f[:, 1] - f[:, 2])], 1)
    distance = np.linalg.norm(lab[:, None] - lab[None], axis=-1) + 1000 * np.eye(len(lab))
    assert distance.min() > 20


def test_the_scale_of_scores_is_what_lies_over_white() -> None:
    """At 0 white, as the frame shows through."""
    run = finished(TokenGrid(1, 1, 2), 1)
    run.scores[:] = 0, 1
    whole = Painter(run, "scores").paint(np.full((10, MIN_WIDTH, 3), 255, np.uint8), 0.1)
    left, right = (whole[5, x] for x in (MIN_WIDTH + 10, 2 * MIN_WIDTH - 10))
    np.testing.assert_allclose([left, right], 255 * SCORE_SCALE([0.0, 1.0])[:, :3], atol=1)
    assert left.tolist() == [255, 255, 255]
