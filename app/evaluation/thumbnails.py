"""Small frames of what was asked about, for pages, kept beside the replies: a rerun decodes nothing again."""

from base64 import b64encode
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..atomic_write import write_whole
from ..video.names import Videos, name_of, shown
from ..video.reader import VideoClip
from .questions import Question, digest
from .settings import Setting

FOLDER = "frames"
"""Beside the results."""
MOST_FRAMES = 8
"""Of all videos of a question; of each of many at least one."""
_MOST_PICTURES = 32
"""A WebP is no wider than 16,383 pixels."""
_HEIGHT, _GAP = 96, 4
_MOST_CHARACTERS = 10_000_000
"""Of all pictures on a page."""


class Thumbnails:
    """A folder of strips of frames, one WebP for each clip or clips.

    Args:
        folder: of the results; FOLDER in it is made with the first strip.
        run: what else of the settings says which frames are taken.
    """

    def __init__(self, folder: Path, run: Mapping[str, Any]) -> None:
        self._folder = folder / FOLDER
        self._run = [str(run[name]) for name in ("fps", "sampling", "max_pixels")]

    def keep(self, videos: Videos, max_frames: int, clips: Sequence[VideoClip]) -> None:
        """Writes some of the frames, from left to right in their order."""
        frames = []
        for clip in clips:
            n = min(len(clip.frames), max(MOST_FRAMES // len(clips), 1))
            frames += [clip.frames[at] for at in np.linspace(0, len(clip.frames) - 1, n).round().astype(int)]
        pictures = [Image.fromarray(frame) for frame in frames[:_MOST_PICTURES]]
        for picture in pictures:
            picture.thumbnail((4 * _HEIGHT, _HEIGHT))
        width = sum(picture.width + _GAP for picture in pictures) - _GAP
        strip, left = Image.new("RGB", (width, max(picture.height for picture in pictures)), "white"), 0
        for picture in pictures:
            strip.paste(picture, (left, 0))
            left += picture.width + _GAP
        content = BytesIO()
        strip.save(content, "webp", quality=60)
        path = self._path(videos, max_frames)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, content.getvalue())

    def name(self, question: Question, setting: Setting) -> str | None:
        """Of the strip in FOLDER; None where none was kept."""
        path = self._path(question.video, setting.max_frames)
        return path.name if path.is_file() else None

    def _path(self, videos: Videos, max_frames: int) -> Path:
        return self._folder / f"{digest(name_of(shown(videos)), max_frames, *self._run)}.webp"


def strip_path(results: Path, name: str | None) -> str | None:
    """Where `Thumbnails` keeps the strip of this name, for results that may be of anyone: never outside of FOLDER."""
    return None if name is None else str(results.parent / FOLDER / Path(name).name)


class OnPage:
    """Strips as HTML, until they are too many for one page.

    Attributes:
        n_left_out: those that found no room.
    """

    def __init__(self) -> None:
        self._room, self.n_left_out = _MOST_CHARACTERS, 0

    def image(self, path: str | None) -> str:
        """An element that shows the strip, or nothing where there is none."""
        picture = b"" if path is None or not Path(path).is_file() else Path(path).read_bytes()
        if picture[8:12] != b"WEBP":
            return ""
        text = b64encode(picture).decode()
        if len(text) > self._room:
            self.n_left_out += 1
            return ""
        self._room -= len(text)
        return f'<img class="frames" src="data:image/webp;base64,{text}" alt="Some of the frames that the model saw">'
