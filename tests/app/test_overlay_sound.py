"""Overlay videos keep the sound of their video, packet by packet, at the times of the pictures."""

from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from viz_runs import moving_pattern

from videoanchor_triton.app.token_grid import TokenGrid
from videoanchor_triton.app.video.reader import add_sound, stream_video, write_video
from videoanchor_triton.app.viz.finished_run import FinishedRun
from videoanchor_triton.app.viz.render import Gallery
from videoanchor_triton.integrations.errors import InputError

FPS, N_FRAMES, RATE = 5, 10, 16_000


def write_clip(path: Path, codec: str | None, late: float = 0.0) -> Path:
    """Two seconds of H.264, and a beep in its second second; the pictures begin `late` seconds after the sound."""
    with av.open(str(path), "w") as container:
        pictures: Any = container.add_stream("libx264", rate=FPS)
        frames = moving_pattern(N_FRAMES, 48, 64)
        pictures.height, pictures.width, pictures.pix_fmt = 48, 64, "yuv420p"
        sound: Any = None if codec is None else container.add_stream(codec, rate=RATE, layout="mono")
        for n, frame in enumerate(frames):
            picture = av.VideoFrame.from_ndarray(frame, format="rgb24")
            picture.pts = n + round(late * FPS)
            container.mux(pictures.encode(picture))
        container.mux(pictures.encode(None))
        if sound is None:
            return path
        beep = np.zeros(round((2 + late) * RATE), np.float32)
        beep[round((1 + late) * RATE) :] = 0.5 * np.sin(np.arange(RATE) * 0.4)
        size = sound.codec_context.frame_size or 1024
        resampler = av.AudioResampler(format=sound.codec_context.format, layout="mono", rate=RATE, frame_size=size)
        samples = av.AudioFrame.from_ndarray(beep[None], format="fltp", layout="mono")
        samples.sample_rate, samples.pts = RATE, 0
        for piece in [*resampler.resample(samples), *resampler.resample(None)]:
            container.mux(sound.encode(piece))
        container.mux(sound.encode(None))
    return path


def heard(path: Path) -> tuple[float, int]:
    """When the beep begins, in seconds, and how many packets of sound there are."""
    with av.open(str(path)) as container:
        frames = [
            (float(frame.time or 0), float(np.abs(frame.to_ndarray().astype(float)).max()))
            for frame in container.decode(audio=0)
        ]
    loudest = max(level for _, level in frames)
    with av.open(str(path)) as container:
        n_packets = sum(packet.size > 0 for packet in container.demux(audio=0))
    return next(time for time, level in frames if level > 0.1 * loudest), n_packets


def shown(path: Path) -> tuple[list[float], float]:
    """Times of the pictures, and how long the track lasts."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        lasts = float((stream.duration or 0) * (stream.time_base or 0))
        return [float(frame.time or 0) for frame in container.decode(stream)], lasts


def overlays(video: Path, out: Path) -> list[str]:
    """Makes the overlay of all frames of a video, and returns what was said."""
    times = [seconds for seconds, _ in stream_video(video)]
    grid, indices = TokenGrid(2, 2, 3), np.array([2, 7])
    scores = np.linspace(0, 1, grid.n_tokens, dtype=np.float32)
    record = {"video": str(video), "model": "m", "question": "q", "answer": "a", "config": {}}
    run = FinishedRun(out, record, grid, scores, np.arange(12) % 3, np.array(times)[indices], indices)
    said: list[str] = []
    reading = {"timeout": 60, "strict": False, "max_download": 0}
    Gallery(run, out, None, "png", lambda *_: None, said.append, **reading).overlay(all_frames=True)
    assert {path.name for path in out.iterdir()} == {"overlay_scores.mp4", "overlay_subspaces.mp4"}
    return said


@pytest.mark.parametrize(("codec", "suffix"), [("aac", "mp4"), ("libopus", "mkv"), ("mp2", "ts")])
def test_the_sound_is_there_at_its_time(codec: str, suffix: str, tmp_path: Path) -> None:
    video = write_clip(tmp_path / f"clip.{suffix}", codec)
    (tmp_path / "out").mkdir()
    assert overlays(video, tmp_path / "out") == []
    begins, n_packets = heard(video)
    for name in ("overlay_scores.mp4", "overlay_subspaces.mp4"):
        times, lasts = shown(tmp_path / "out" / name)
        np.testing.assert_allclose(times, np.arange(N_FRAMES) / FPS, atol=2e-3)
        assert lasts == pytest.approx(N_FRAMES / FPS, abs=2e-3), "the last picture is shown as long as the others"
        found, n_found = heard(tmp_path / "out" / name)
        assert found == pytest.approx(begins - shown(video)[0][0], abs=0.03)
        assert abs(n_found - n_packets) <= 1, "nothing is left out"


def test_pictures_that_begin_late_keep_their_sound(tmp_path: Path) -> None:
    """0 is the first frame; the sound before it goes."""
    video = write_clip(tmp_path / "clip.mkv", "libopus", late=0.6)
    assert heard(video)[0] == pytest.approx(1.6, abs=0.05)
    (tmp_path / "out").mkdir()
    assert overlays(video, tmp_path / "out") == []
    assert heard(tmp_path / "out" / "overlay_scores.mp4")[0] == pytest.approx(1.0, abs=0.05)
    assert shown(tmp_path / "out" / "overlay_scores.mp4")[0][0] == pytest.approx(0, abs=2e-3)


def test_without_sound_there_is_none(tmp_path: Path) -> None:
    video = write_clip(tmp_path / "clip.mp4", None)
    (tmp_path / "out").mkdir()
    assert overlays(video, tmp_path / "out") == []
    with av.open(str(tmp_path / "out" / "overlay_scores.mp4")) as container:
        assert not container.streams.audio
    assert len(shown(tmp_path / "out" / "overlay_scores.mp4")[0]) == N_FRAMES


def test_sound_that_does_not_fit_is_told_once_and_left_out(tmp_path: Path) -> None:
    video = write_clip(tmp_path / "clip.flv", "nellymoser")
    (tmp_path / "out").mkdir()
    (said,) = overlays(video, tmp_path / "out")
    assert "its sound (nellymoser) does not fit into MP4 and is left out" in said
    times, _ = shown(tmp_path / "out" / "overlay_scores.mp4")
    np.testing.assert_allclose(times, np.arange(N_FRAMES) / FPS, atol=2e-3)


def test_a_source_that_cannot_be_read_leaves_the_pictures_as_they_were(tmp_path: Path) -> None:
    write_video(tmp_path / "pictures.mp4", moving_pattern(4, 48, 64), FPS)
    before = (tmp_path / "pictures.mp4").read_bytes()
    (tmp_path / "broken.mp4").write_bytes(b"\0" * 5000)
    with pytest.raises(InputError, match=r"broken\.mp4 cannot be read for its sound"):
        add_sound(tmp_path / "pictures.mp4", tmp_path / "broken.mp4", 0.0)
    assert (tmp_path / "pictures.mp4").read_bytes() == before
    assert len([*tmp_path.iterdir()]) == 2
