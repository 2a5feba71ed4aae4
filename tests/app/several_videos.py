"""A checkpoint, videos and an image, and the settings with which questions are asked about several of them."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import videoanchor_triton as va
from videoanchor_triton.app import demo, pipeline
from videoanchor_triton.app.video.reader import write_video

CONFIG = va.VideoAnchorConfig(alpha_k=2, alpha_v=1, scorer="kmeans", n_clusters=3, pca_rank=8)
GATE = ("--alpha-k", "2", "--alpha-v", "1", "--scorer", "kmeans", "--n-clusters", "3", "--pca-rank", "8")
SIZE = ("--max-frames", "4", "--max-new-tokens", "3", "--device", "cpu")


@pytest.fixture(scope="session")
def several(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint, a video of 8 frames, a longer and taller one, one of 2 frames, and an image."""
    path, rng = tmp_path_factory.mktemp("several"), np.random.default_rng(0)
    demo.make_checkpoint(path / "checkpoint")
    for name, n, height, width in (("a", 8, 84, 112), ("b", 12, 168, 56), ("short", 2, 84, 112)):
        write_video(path / f"{name}.mp4", rng.integers(0, 255, (n, height, width, 3), dtype=np.uint8), fps=4)
    Image.fromarray(rng.integers(0, 255, (112, 168, 3), dtype=np.uint8)).save(path / "view.png")
    return path


@pytest.fixture(scope="session")
def loaded_several(several: Path) -> tuple[Any, Any]:
    return pipeline.load(str(several / "checkpoint"), "cpu")
