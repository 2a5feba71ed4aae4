"""What shows that a video is damaged is noted, or refused; what only looks like damage is not."""

import importlib
import json
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from tiny_models_checkpoint import save_checkpoint

from videoanchor_triton.app import cli
from videoanchor_triton.app.video.reader import VideoClip, read_video, stream_video
from videoanchor_triton.integrations.errors import InputError

N, HEIGHT, WIDTH = 60, 48, 64
Times = list[float]


def write(
    path: Path, codec: str = "libx264", sound: float = 0.0, sound_from: float = 0.0, times: Times | None = None,
    pixels: str = "yuv420p", mux: dict[str, str] | None = None, **options: str,
) -> Path:  # fmt: skip
    """Ten frames of moving noise a second, or at `times`; silence that lasts until second `sound`."""
    noise = np.random.default_rng(0).integers(0, 255, (HEIGHT // 8, 40, 3)).repeat(8, 0).repeat(8, 1).astype(np.uint8)
    packets: list[Any] = []
    with av.open(str(path), "w", options=mux or {}) as container:
        stream: Any = container.add_stream(codec, rate=10, options={"g": "12", **options})
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, pixels
        if times is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        for n in range(N if times is None else len(times)):
            picture = np.ascontiguousarray(noise[:, 3 * (n % 80) :][:, :WIDTH])
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24").reformat(format=pixels)
            if times is not None:
                frame.pts, frame.time_base = round(1000 * times[n]), Fraction(1, 1000)
            packets += stream.encode(frame)
        packets += stream.encode(None)
        if sound:
            track: Any = container.add_stream("aac", rate=16000)
            for start in range(round(sound_from * 16000), round(sound * 16000), 1024):
                samples = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
                samples.rate, samples.pts, samples.time_base = 16000, start, Fraction(1, 16000)
                packets += track.encode(samples)
            packets += track.encode(None)
        for packet in sorted(packets, key=lambda packet: packet.dts * packet.time_base):
            container.mux(packet)
    return path


def trimmed(path: Path, first: float, start: float) -> Path:
    """A copy of a film from second `first`, whose edit list shows it from second `start` on."""
    whole = write(path.with_name("whole.mp4"), bf="2", sound=6.0)
    with av.open(str(whole)) as source, av.open(str(path), "w", options={"avoid_negative_ts": "disabled"}) as copy:
        streams = {stream.index: copy.add_stream_from_template(stream) for stream in source.streams}
        packet: Any
        for packet in source.demux():
            if packet.dts is not None and packet.pts * packet.time_base >= (
                first if packet.stream.type == "video" else start
            ):
                packet.pts -= round(start / packet.time_base)
                packet.dts -= round(start / packet.time_base)
                packet.stream = streams[packet.stream.index]
                copy.mux(packet)
    return path


def ending_early(path: Path) -> Path:
    """The edit list shows the first three of six seconds: those in the header are halved."""
    data = bytearray(write(path, bf="2").read_bytes())
    for name, place in ((b"mvhd", 20), (b"tkhd", 24), (b"elst", 12)):
        at = data.index(name) + place
        assert int.from_bytes(data[at : at + 4], "big") == 6000
        data[at : at + 4] = (3000).to_bytes(4, "big")
    path.write_bytes(data)
    return path


OPEN: dict[str, Any] = {"x264-params": "open-gop=1"}
PYRAMID: dict[str, Any] = {"x264-params": "open-gop=1:b-pyramid=normal"}
TENTHS = [n / 10 for n in range(300)]
VARIABLE = np.cumsum(np.random.default_rng(1).choice([0.033, 0.1, 0.5, 2.0], N)).tolist()
GOOD: dict[str, Callable[[Path], Path]] = {
    "b-frames": lambda folder: write(folder / "a.mp4", bf="4"),
    "open-groups-ts": lambda folder: write(folder / "a.ts", times=TENTHS, g="20", bf="3", **OPEN),
    "open-groups-mkv": lambda folder: write(folder / "a.mkv", times=TENTHS, bf="8", refs="8", **PYRAMID),
    "variable-rate": lambda folder: write(folder / "a.mp4", times=VARIABLE),
    "slides": lambda folder: write(folder / "a.mkv", times=[0, 10, 30, 31, 90]),
    "longer-sound-mp4": lambda folder: write(folder / "a.mp4", sound=15.0),
    "longer-sound-mkv": lambda folder: write(folder / "a.mkv", sound=15.0),
    "late-sound": lambda folder: write(folder / "a.mp4", sound=15.0, sound_from=4.0),
    "edit-list": lambda folder: trimmed(folder / "a.mp4", 1.2, 2.0),
    "edit-list-ends-early": lambda folder: ending_early(folder / "a.mp4"),
    "fragments": lambda folder: write(folder / "a.mp4", mux={"movflags": "frag_keyframe+empty_moov"}),
    "repeats-in-avi": lambda folder: write(folder / "a.avi", "mpeg4", times=[n + n // 3 for n in range(N)]),
    "vp9": lambda folder: write(folder / "a.webm", "libvpx-vp9", deadline="realtime"),
    "gif": lambda folder: write(folder / "a.gif", "gif", pixels="rgb8"),
}


@pytest.mark.parametrize("kind", GOOD)
def test_a_whole_video_has_no_note(kind: str, tmp_path: Path) -> None:
    path = GOOD[kind](tmp_path)
    for max_frames in (3, 100):
        clip = read_video(path, strict=True, max_frames=max_frames)
        assert clip.notes == ()
        assert len(clip.frames) == min(max_frames, clip.n_source_frames)


def cut(data: bytearray) -> None:
    del data[len(data) * 6 // 10 :]


def flipped(data: bytearray) -> None:
    """A byte in every two hundred, not in an index at the end."""
    for place in range(len(data) // 5, len(data) * 6 // 10, 200):
        data[place] ^= 0x55


DAMAGED: dict[str, tuple[Callable[[Path], Path], Callable[[bytearray], None], str]] = {
    "mkv-cut": (lambda folder: write(folder / "a.mkv"), cut, "cut short: it says that it lasts 6.0 s, and ends at "),
    "webm-cut": (lambda folder: write(folder / "a.webm", "libvpx"), cut, "cut short: it says that it lasts 6.0 s"),
    "mkv-cut-with-sound": (lambda folder: write(folder / "a.mkv", sound=15.0), cut, "cut short: it says that it last"),
    "mp4-cut": (lambda f: write(f / "a.mp4", mux={"movflags": "faststart"}), cut, "of the 60 frames that it declares"),
    "avi-cut": (lambda folder: write(folder / "a.avi", "mpeg4"), cut, "cut short: it says that it lasts 6.0 s"),
    "gif-cut": (lambda folder: write(folder / "a.gif", "gif", pixels="rgb8"), cut, "its end is missing"),
    "h264": (lambda folder: write(folder / "a.mp4"), flipped, "damaged: FFmpeg reports: h264: "),
    "h264-ts": (lambda folder: write(folder / "a.ts"), flipped, "damaged: "),
    "mpeg4": (lambda folder: write(folder / "a.mp4", "mpeg4"), flipped, "damaged: FFmpeg reports: mpeg4: "),
    "gif": (lambda folder: write(folder / "a.gif", "gif", pixels="rgb8"), flipped, "damaged: FFmpeg reports: gif: "),
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_damage_is_noted(kind: str, tmp_path: Path) -> None:
    make, damage, note = DAMAGED[kind]
    path = make(tmp_path)
    data = bytearray(path.read_bytes())
    damage(data)
    path.write_bytes(data)
    clip = read_video(path, max_frames=8)
    assert note in "; ".join(clip.notes)
    with pytest.raises(InputError, match=rf"{path.name} is refused \(--strict\): .*(cut short|damaged)"):
        read_video(path, max_frames=8, strict=True)


def test_damage_elsewhere_is_not_looked_for(tmp_path: Path) -> None:
    """Nothing more is decoded for it: the damage lies behind the wanted frames."""
    path = write(tmp_path / "a.mp4", bf="0")
    clip = read_video(path, indices=[0, 1])
    with av.open(str(path)) as container:
        packets: Any = container.demux(video=0)
        start = next(p.pos for p in packets if p.is_keyframe and p.pts * p.time_base > 3)
    data = bytearray(path.read_bytes())
    data[start + 40 : start + 200] = bytes(160)
    path.write_bytes(data)
    again = read_video(path, indices=[0, 1], strict=True)
    assert again.n_decoded == clip.n_decoded < 30
    np.testing.assert_array_equal(again.frames, clip.frames)
    assert read_video(path, indices=[45]).notes


def test_a_recording_that_begins_in_the_middle(tmp_path: Path) -> None:
    """What no decoder can show is left out and said, and is no damage."""
    with av.open(str(write(tmp_path / "whole.ts"))) as source, av.open(str(tmp_path / "middle.ts"), "w") as copy:
        stream = copy.add_stream_from_template(source.streams.video[0])
        for n, packet in enumerate(source.demux(video=0)):
            if n >= 7 and packet.dts is not None:
                packet.stream = stream
                copy.mux(packet)
    clip = read_video(tmp_path / "middle.ts", max_frames=100, strict=True)
    n_before = clip.n_source_frames - len(clip.frames)
    assert 1 <= n_before <= 12
    expected = f"it begins in the middle: {n_before} of {clip.n_source_frames} frames are before its first keyframe"
    assert clip.notes == (expected,)


def test_strict_pictures(tmp_path: Path) -> None:
    """All frames of a damaged film: refused after the last, so that nothing of it is kept."""
    path = write(tmp_path / "a.mkv")
    path.write_bytes(path.read_bytes()[:-1000])
    assert len(list(stream_video(path))) > 30
    with pytest.raises(InputError, match="refused"):
        list(stream_video(path, strict=True))


COMMANDS = {
    "run": ("--video", "v", "--question", "q", "--out", "o", "--model", "m"),
    "batch": ("rows.csv", "--out", "o", "--model", "m"),
    "eval": ("rows.jsonl", "--out", "o", "--model", "m"),
    "tune": ("rows.jsonl", "--out", "o", "--model", "m"),
    "viz": ("folder",),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_that_reads_videos_has_strict(command: str) -> None:
    args = cli._parser().parse_args([command, *COMMANDS[command], "--strict"])
    assert args.strict is True


def test_a_strict_batch(tmp_path: Path) -> None:
    """A damaged video and a URL are rows that failed, each with its reason."""
    save_checkpoint("internvl", tmp_path / "checkpoint")
    write(tmp_path / "whole.mkv")
    (tmp_path / "cut.mkv").write_bytes((tmp_path / "whole.mkv").read_bytes()[:-1000])
    names = ("whole.mkv", "cut.mkv", "nope://example.org/v/a.mp4", "rtsp://camera/a.mp4")
    rows = [json.dumps({"video": name, "question": "word5"}) for name in names]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    scores = ("--alpha-k", "2", "--alpha-v", "1", "--scorer", "kmeans", "--n-clusters", "3", "--pca-rank", "8")
    size = ("--max-frames", "2", "--max-new-tokens", "2", "--strict", "--tables", "csv")
    where = (tmp_path / "rows.jsonl", "--model", tmp_path / "checkpoint", "--out", tmp_path / "out")
    assert cli.main(["batch", *map(str, where), *scores, *size]) == 1
    records = map(json.loads, (tmp_path / "out" / "results.jsonl").read_text().splitlines())
    reasons = {Path(record["video"]).name: record["reason"] for record in records if record["status"] == "failed"}
    assert len(reasons) == 2  # both URLs end in a.mp4
    assert "cut.mkv is refused (--strict): cut short: it says that it lasts 6.0 s" in reasons["cut.mkv"]
    assert "fsspec knows no such protocol" in reasons["a.mp4"]


def test_the_benchmark_counts_what_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    video_damage: Any = importlib.import_module("benchmarks.video.damage")
    assert video_damage.main(["--quick", "--out", str(tmp_path)]) == 0
    rows = json.loads((tmp_path / "video-damage.json").read_text())["rows"]
    assert {row["files"] for row in rows} == {1}
    for row in rows:
        assert row["refused"] + row["changed"] + row["same_noted"] <= 1
        assert row["changed_noted"] <= row["changed"]
    assert sum(row["changed_noted"] for row in rows) >= 1

    def noted(*_: object, **__: object) -> VideoClip:
        nothing = np.zeros(0)
        return VideoClip(np.zeros((8, 2, 2, 3), np.uint8), nothing, nothing, 8, 1.0, notes=("damaged",))

    monkeypatch.setattr(video_damage, "read_video", noted)
    with pytest.raises(ValueError, match="the whole file has 8 frames and the notes"):
        video_damage.measure("GIF", tmp_path, 1)
