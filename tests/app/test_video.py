"""Frames and timestamps out of files that were written for the test, and files that are none."""

import os
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import NoReturn

import av
import numpy as np
import pytest

from videoanchor_triton.app.video.reader import read_video, stream_video, write_video
from videoanchor_triton.app.video.sampling import Request
from videoanchor_triton.integrations.errors import InputError


def grey_frames(n: int, height: int = 48, width: int = 64) -> np.ndarray:
    """Frame i is a flat grey of value 4 * i: the value tells which frame came back."""
    values = (4 * np.arange(n)).astype(np.uint8)
    return np.broadcast_to(values[:, None, None, None], (n, height, width, 3)).copy()


def numbers(frames: np.ndarray) -> list[int]:
    return [round(float(frame.mean()) / 4) for frame in frames]


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    path = tmp_path / "clip.mp4"
    write_video(path, grey_frames(40), fps=8)
    return path


def test_all_frames_with_their_times(clip: Path) -> None:
    video = read_video(clip, max_frames=100)
    assert numbers(video.frames) == list(range(40))
    assert video.indices.tolist() == list(range(40))
    np.testing.assert_allclose(video.timestamps, np.arange(40) / 8, atol=1e-6)
    assert video.source_fps == pytest.approx(8)
    assert video.duration == pytest.approx(5)
    assert video.sampled_fps == pytest.approx(8)


@pytest.mark.parametrize(
    ("fps", "max_frames", "expected"),
    [
        pytest.param(None, 4, [5, 15, 25, 35], id="count"),
        pytest.param(2.0, 100, [2, 6, 10, 14, 18, 22, 26, 30, 34, 38], id="fps"),
        pytest.param(2.0, 4, [5, 15, 25, 35], id="fps-capped"),
        pytest.param(0.01, 100, [20], id="less-than-one-frame"),
        pytest.param(1000.0, 1000, list(range(40)), id="more-than-there-are"),
        pytest.param(None, 1, [20], id="one"),
    ],
)
def test_sampling(clip: Path, fps: float | None, max_frames: int, expected: list[int]) -> None:
    video = read_video(clip, fps=fps, max_frames=max_frames)
    assert video.indices.tolist() == expected
    assert numbers(video.frames) == expected
    np.testing.assert_allclose(video.timestamps, np.array(expected) / 8, atol=1e-6)


def test_variable_frame_rate_is_sampled_by_time(tmp_path: Path) -> None:
    """Ten frames in the first second, then one a second for nine: samples follow time, not frame numbers."""
    path = tmp_path / "variable.mp4"
    times = [i / 10 for i in range(10)] + [float(i) for i in range(1, 10)]
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        stream.codec_context.time_base = Fraction(1, 1000)
        for time, picture in zip(times, grey_frames(len(times)), strict=True):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = round(time * 1000), Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    video = read_video(path, max_frames=5)
    np.testing.assert_allclose(video.timestamps, np.array(times)[video.indices], atol=2e-3)
    assert numbers(video.frames) == video.indices.tolist()
    assert video.indices.tolist() == [9, 11, 13, 15, 17]
    np.testing.assert_allclose(read_video(path, max_frames=100).timestamps, times, atol=2e-3)


def test_a_single_frame(tmp_path: Path) -> None:
    write_video(tmp_path / "one.mp4", grey_frames(1), fps=8)
    video = read_video(tmp_path / "one.mp4")
    assert video.frames.shape == (1, 48, 64, 3)
    assert video.timestamps.tolist() == [0.0]


def test_odd_size(tmp_path: Path) -> None:
    path = tmp_path / "odd.mkv"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=5)
        stream.width, stream.height, stream.pix_fmt = 33, 17, "bgr0"
        for picture in grey_frames(3, 17, 33):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))
    assert read_video(path).frames.shape == (3, 17, 33, 3)


def test_truncated_file_gives_what_it_holds(tmp_path: Path) -> None:
    path = tmp_path / "whole.ts"
    with av.open(str(path), "w", format="mpegts") as container:
        stream = container.add_stream("libx264", rate=8)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for picture in np.random.default_rng(0).integers(0, 255, (40, 48, 64, 3), dtype=np.uint8):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))
    data = path.read_bytes()
    (tmp_path / "half.ts").write_bytes(data[: len(data) // 2])
    video = read_video(tmp_path / "half.ts", max_frames=100)
    assert 5 < len(video.frames) < 40


def _audio_only(path: Path) -> None:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.rate, frame.pts = 16000, 0
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def _no_frames(path: Path) -> None:
    with av.open(str(path), "w", format="avi") as container:
        stream = container.add_stream("mpeg4", rate=8)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        container.start_encoding()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        pytest.param(lambda _path: None, "no video file at", id="missing"),
        pytest.param(lambda path: path.mkdir(), "holds no image", id="empty-folder"),
        pytest.param(os.mkfifo, "no video file at", id="pipe"),
        pytest.param(lambda path: path.write_bytes(b""), "cannot be read as a video", id="empty"),
        pytest.param(lambda path: path.write_text("not a video" * 100), "cannot be read as a video", id="text"),
        pytest.param(_audio_only, "no video stream", id="audio-only"),
        pytest.param(_no_frames, "no frame", id="no-frames"),
    ],
)
def test_what_is_no_video(tmp_path: Path, make: Callable[[Path], object], message: str) -> None:
    path = tmp_path / "file.mp4"
    make(path)
    with pytest.raises(InputError, match=message):
        read_video(path)


def test_known_times(clip: Path) -> None:
    """A file that shows frames at other times than before, or does not have them, is refused before any is decoded."""
    assert numbers(read_video(clip, indices=[3, 9], known_times={3: 0.3751, 39: 4.875}).frames) == [3, 9]
    with pytest.raises(
        InputError, match=r"clip\.mp4 has no frame 3 at 0\.377 s, as it had before: it is another video"
    ):
        read_video(clip, indices=[50], known_times={0: 0.0, 3: 0.377})
    with pytest.raises(InputError, match="another video"):
        next(stream_video(clip, known_times={40: 5.0}))


def no_cuts(_count: int) -> NoReturn:
    raise AssertionError


@pytest.mark.parametrize("known", [(0, 0.0), (2, 1.0009)], ids=str)
def test_a_known_time(known: tuple[int, float]) -> None:
    Request(Path("clip"), known_times=dict([known])).frames(np.array([0.0, 0.1, 1.0]), no_cuts)


@pytest.mark.parametrize("known", [(0, 0.0011), (2, 0.1), (3, 1.5), (-1, 1.0), (1, float("nan"))], ids=str)
def test_a_time_of_another_video(known: tuple[int, float]) -> None:
    with pytest.raises(InputError, match="another video"):
        Request(Path("clip"), known_times=dict([(1, 0.1), known])).frames(np.array([0.0, 0.1, 1.0]), no_cuts)


@pytest.mark.parametrize(
    "options",
    [
        {"fps": 0.0},
        {"fps": float("nan")},
        {"fps": -1.0},
        {"max_frames": 0},
        {"timeout": 0.0},
        {"timeout": float("inf")},
        {"sampling": "random"},
        {"indices": []},
        {"indices": [3, 3]},
        {"indices": [5, 2]},
        {"indices": [-1]},
        {"indices": [40]},
    ],
    ids=str,
)
def test_sampling_arguments(clip: Path, options: dict[str, float]) -> None:
    with pytest.raises(InputError, match=next(iter(options))):
        read_video(clip, **options)  # pyright: ignore[reportArgumentType]
