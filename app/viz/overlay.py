"""Frames with the scores and with the subspaces painted over them, as a video and as single pictures."""

from collections.abc import Iterable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

import av
import matplotlib
import numpy as np
from PIL import Image, ImageColor, ImageDraw, ImageFont

from ..video.views import letterbox
from .finished_run import FinishedRun
from .palette import (
    ALPHA,
    COLOURS,
    SCORE_ALPHA,
    SCORE_MAP,
    SCORE_SCALE,
    SUBSPACE_MAP,
    backdrop,
    size_ranks,
    subspace_names,
)

Kind = Literal["scores", "subspaces"]
KINDS: tuple[Kind, ...] = ("scores", "subspaces")
MIN_WIDTH, MAX_HEIGHT = 480, 2160
"""In pixels: small frames are enlarged to that width, as far as they become no higher."""
SLIDES_PER_SECOND = 4
_TICKS = 90_000  # of the video's clock, a second


class Painter:
    """Paints frames of one run with its scores or its subspaces.

    Attributes:
        colours: (t, h, w, 3) float64 RGB in [0, 255] of each token.
        weights: (t, h, w) float in [0, 1], of a token's colour over the frame.
        names: (name, colour) of the subspaces, for the legend.
    """

    def __init__(self, run: FinishedRun, kind: Kind) -> None:
        values, colour_map = (run.scores, SCORE_MAP) if kind == "scores" else (size_ranks(run.labels), SUBSPACE_MAP)
        in_grid = run.grid.arrange(values)
        self.colours = 255 * colour_map(in_grid)[..., :3]
        self.weights = SCORE_ALPHA * in_grid if kind == "scores" else np.full(in_grid.shape, ALPHA)
        self.names = subspace_names(run.labels)
        self._run, self._kind = run, kind
        self._steps = run.grid.steps_of_frames(len(run.indices))

    def step_at(self, seconds: float) -> int:
        """The step of the sampled frame that is nearest in time, the earlier of two; of a run about one video."""
        return int(self._steps[np.abs(self._run.timestamps - seconds).argmin()])

    def paint_sampled(self, n: int, frame: np.ndarray) -> np.ndarray:
        """Sampled frame `n`, see `paint`."""
        return self._paint(frame, int(self._steps[n]), self._run.moments(np.array([n]))[0])

    def paint(self, frame: np.ndarray, seconds: float) -> np.ndarray:
        """The frame, and beside it the frame with the colours of its tokens over it, for subspaces in grey. Below is a
        line with the time and the legend.

        Args:
            frame: (H, W, 3) uint8 RGB.
            seconds: its time.

        Returns:
            (H', W', 3) uint8: both, each enlarged by a whole number as `MIN_WIDTH` and `MAX_HEIGHT` say, its right and
            bottom edge repeated where that makes a side even, white beside it where it stays narrower; and the line.
        """
        return self._paint(frame, self.step_at(seconds), f"{seconds:.2f} s")

    def _paint(self, frame: np.ndarray, step: int, moment: str) -> np.ndarray:
        times = max(min(-(-MIN_WIDTH // frame.shape[1]), MAX_HEIGHT // frame.shape[0]), 1)
        frame = frame.repeat(times, 0).repeat(times, 1)
        height, width = frame.shape[:2]
        colours, weights = self.colours[step], self.weights[step]
        rows = np.arange(height) * colours.shape[0] // height
        columns = np.arange(width) * colours.shape[1] // width
        weight = weights[rows][:, columns, None]
        under = frame if self._kind == "scores" else backdrop(frame)
        painted = (weight * colours[rows][:, columns] + (1 - weight) * under).round().astype(np.uint8)
        even = ((0, height % 2), (0, width % 2), (0, 0))
        wide = ((0, 0), (0, max(MIN_WIDTH - width, 0) // 2 * 2), (0, 0))
        both = (np.pad(picture, even, mode="edge") for picture in (frame, painted))
        painted = np.concatenate([np.pad(picture, wide, constant_values=255) for picture in both], 1)
        return np.concatenate([painted, self._legend(painted.shape[1], moment)])

    def _legend(self, width: int, moment: str) -> np.ndarray:
        height = width // 96 * 2 + 4
        line = Image.new("RGB", (width, height), "white")
        draw = ImageDraw.Draw(line)
        font = _font(height * 0.6)
        middle, gap = height / 2, height // 4
        draw.text((gap, middle), moment, fill="black", font=font, anchor="lm")
        right = width - gap
        if self._kind == "scores":
            draw.text((right, middle), "1", fill="black", font=font, anchor="rm")
            bar = height * 5
            right -= int(font.getlength("1")) + gap + bar
            ramp = (255 * SCORE_SCALE(np.linspace(0, 1, bar))[:, :3]).round().astype(np.uint8)
            line.paste(Image.fromarray(np.repeat(ramp[None], height - 2 * gap, 0)), (right, gap))
            draw.text((right - gap, middle), "score 0", fill="black", font=font, anchor="rm")
            return np.asarray(line)
        # a box for each subspace with its number, 13 of them in four fifths of the width
        box = width * 4 // 5 // (len(COLOURS) + 1)
        font = _font(min(height * 0.6, box * 0.38))
        for name, colour in reversed(self.names):
            draw.rectangle((right - box + 2, gap // 2, right - 1, height - 1 - gap // 2), fill=colour)
            dark = ImageColor.getrgb(colour)[:3] @ np.array([0.2126, 0.7152, 0.0722]) < 110
            draw.text((right - box / 2, middle), name, fill="white" if dark else "black", font=font, anchor="mm")
            right -= box
        return np.asarray(line)


def _font(size: float) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(str(Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")), size)


def largest(painter: Painter, frames: Sequence[np.ndarray]) -> tuple[int, int]:
    """Height and width that every painted frame fits in."""
    shapes = {frame.shape: n for n, frame in enumerate(frames)}
    painted = [painter.paint_sampled(n, frames[n]).shape for n in shapes.values()]
    return max(shape[0] for shape in painted), max(shape[1] for shape in painted)


def write_video(
    path: Path,
    painter: Painter,
    frames: Iterable[tuple[float, np.ndarray]],
    *,
    slides: bool,
    size: tuple[int, int] | None = None,
) -> float:
    """Writes painted frames as H.264 in MP4, one at a time.

    Args:
        frames: (seconds, (H, W, 3) uint8 RGB) in order of time.
        slides: they are the sampled ones; show each for a quarter of a second, else at its own time, the last as long
            as the one before it.
        size: height and width, with black bars; None for those of the first.

    Returns:
        seconds of the first frame, which is shown at 0.
    """
    with av.open(str(path), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=30, options={"crf": "16"})
        stream.pix_fmt = "yuv420p"  # pyright: ignore[reportAttributeAccessIssue]
        stream.codec_context.time_base = Fraction(1, _TICKS)
        start, shown, lasts = 0.0, 0, _TICKS // SLIDES_PER_SECOND
        for n, (seconds, frame) in enumerate(frames, 1):
            picture = painter.paint_sampled(n - 1, frame) if slides else painter.paint(frame, seconds)
            if size is not None:
                picture = letterbox(picture, *size)
            if n == 1:
                stream.height, stream.width = picture.shape[:2]  # pyright: ignore[reportAttributeAccessIssue]
                start = seconds
            image = av.VideoFrame.from_ndarray(picture, format="rgb24")
            image.pts = round(_TICKS * ((n - 1) / SLIDES_PER_SECOND if slides else seconds - start))
            image.time_base = Fraction(1, _TICKS)
            lasts, shown = (image.pts - shown if n > 1 else lasts), image.pts
            _mux(container, stream.encode(image), lasts)  # pyright: ignore
        _mux(container, stream.encode(None), lasts)  # pyright: ignore
    return start


def _mux(container: Any, packets: Iterable[Any], duration: int) -> None:
    """Writes packets; the duration counts for the last one, where none follows that would end it."""
    for packet in packets:
        packet.duration = duration
        container.mux(packet)
