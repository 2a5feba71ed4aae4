"""subspaces.png: which pixels are a subspace's own, and its size and share."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from test_viz_pieces import check_texts, figures, finished

from videoanchor_triton.app.token_grid import TokenGrid
from videoanchor_triton.app.video.reader import VideoClip
from videoanchor_triton.app.viz import montage

__all__ = ["figures"]  # a fixture


def test_tokens_of_a_subspace_are_as_they_are_and_others_faded(figures: list[Figure], tmp_path: Path) -> None:
    grid = TokenGrid(2, 2, 3, n_extra=1, row_newlines=True)
    labels = np.array([5, 5, 5, 2, 2, 5, 5, 2, 9, 5, 5, 2, 2, 5, 5, 2, 2])  # the fourth of a row has no place
    run = finished(grid, 4, labels)
    frames = np.full((4, 40, 60, 3), (200, 40, 40), np.uint8)
    clip = VideoClip(frames, run.timestamps, run.indices, 20, 10.0)
    montage.draw(tmp_path / "subspaces.png", clip.frames, run)
    (axis,) = figures[0].axes
    picture: Any = axis.images[0].get_array()
    names = [label.get_text() for label in axis.get_yticklabels()]
    assert names == ["1: 9 tokens\n52.9%", "2: 7 tokens\n41.2%\n5 not shown", "3: 1 token\n5.9%"]
    assert [label.get_text() for label in axis.get_xticklabels()] == ["0.10 s", "0.70 s"]
    own, faded = np.array([200, 40, 40]) / 255, 1 - 0.18 * (1 - 280 / 3 / 255)
    in_grid = grid.arrange(labels)
    for row, label in enumerate((5, 2, 9)):
        for step, y, x in np.ndindex(2, 2, 3):
            pixel = picture[row * 126 + 30 + 60 * y, 18 + step * 186 + 30 + 60 * x]
            expected = own if in_grid[step, y, x] == label else [faded] * 3
            np.testing.assert_allclose(pixel, expected, atol=1e-6)


def test_small_subspaces_beyond_the_rows_are_counted(figures: list[Figure], tmp_path: Path) -> None:
    grid = TokenGrid(1, 6, 10)
    labels = np.minimum(np.arange(60) // 2, 27)  # 27 of 2 tokens, one of 6
    clip = VideoClip(np.zeros((1, 30, 50, 3), np.uint8), np.zeros(1), np.zeros(1, int), 1, 1.0)
    montage.draw(tmp_path / "subspaces.png", clip.frames, finished(grid, 1, labels))
    title = figures[0].get_suptitle().replace("\n", " ")
    assert "28 subspaces of 60 visual tokens; the 4 smallest, 8 tokens in all, are not shown" in title
    assert len(figures[0].axes[0].get_yticklabels()) == montage.MAX_ROWS


@pytest.mark.parametrize(
    ("n_frames", "shape", "n_clusters"),
    [(1, (90, 160), 1), (2, (900, 90), 24), (3, (50, 400), 30), (40, (90, 160), 24), (1, (20, 3000), 2)],
)
def test_no_overlap(
    n_frames: int, shape: tuple[int, int], n_clusters: int, figures: list[Figure], tmp_path: Path
) -> None:
    grid = TokenGrid(n_frames, 5, 6, row_newlines=True)
    run = finished(grid, n_frames, np.arange(grid.n_tokens) % n_clusters)
    clip = VideoClip(np.zeros((n_frames, *shape, 3), np.uint8), run.timestamps, run.indices, 200, 10.0)
    montage.draw(tmp_path / "subspaces.png", clip.frames, run)
    check_texts(figures[0])
    assert max(figures[0].get_size_inches()) < 50
