"""Which frames are decoded and how they come out: seeks, scenes, rotation, pixels that are not square."""

import importlib
import json
import struct
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from av.stream import Disposition

from videoanchor_triton.app.video import sampling
from videoanchor_triton.app.video.decoding import apply_display_matrix
from videoanchor_triton.app.video.reader import read_video
from videoanchor_triton.integrations.errors import InputError


def write(path: Path, frames: np.ndarray, codec: str = "libx264", **options: str) -> Path:
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream(codec, rate=10, options={"crf": "10", **options})
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))
    return path


def counted(n: int) -> np.ndarray:
    """Frame i spells i in 10 bits: black and white columns of 8 pixels."""
    bits = (np.arange(n)[:, None] >> np.arange(10)) & 1
    return np.broadcast_to(np.repeat(255 * bits, 8, 1)[:, None, :, None], (n, 32, 80, 3)).astype(np.uint8)


def spelled(frames: np.ndarray) -> list[int]:
    bits = frames[:, 8:24, 4::8].mean((1, 3)) > 127
    return (bits @ (1 << np.arange(10))).tolist()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("long")


LAYOUTS = {
    "mp4-b-frames": ("mp4", {"g": "25", "bf": "3", "preset": "veryfast"}),
    "mp4-open-gop": ("mp4", {"g": "25", "bf": "3", "x264-params": "open-gop=1", "preset": "veryfast"}),
    "mkv": ("mkv", {"g": "25", "bf": "2", "preset": "ultrafast"}),
    "ts": ("ts", {"g": "25", "bf": "2", "preset": "veryfast"}),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_far_apart_frames_are_reached_by_keyframes(layout: str, folder: Path) -> None:
    """Five of 1000 frames: no more than two groups of pictures each (a seek in TS hits no keyframe), and what the
    decoder's threads take beside it."""
    suffix, options = LAYOUTS[layout]
    path = write(folder / f"{layout}.{suffix}", counted(1000), sc_threshold="0", **options)
    clip = read_video(path, max_frames=5)
    assert clip.indices.tolist() == [100, 300, 500, 700, 900]
    assert spelled(clip.frames) == [100, 300, 500, 700, 900]
    np.testing.assert_allclose(clip.timestamps, clip.indices / 10, atol=1e-3)
    assert clip.n_source_frames == 1000
    assert 5 <= clip.n_decoded <= 5 * (2 * 25 + 30)
    again = read_video(path, indices=[0, 24, 25, 26, 998, 999])
    assert spelled(again.frames) == [0, 24, 25, 26, 998, 999]


def test_neighbouring_frames_are_decoded_once(folder: Path) -> None:
    path = write(folder / "all.mp4", counted(120), g="25", sc_threshold="0")
    clip = read_video(path, max_frames=1000)
    assert spelled(clip.frames) == list(range(120))
    assert clip.n_decoded == 120


def test_one_keyframe_at_the_start(folder: Path) -> None:
    path = write(folder / "one-group.mp4", counted(200), g="1000", sc_threshold="0", preset="ultrafast")
    assert spelled(read_video(path, max_frames=4).frames) == [25, 75, 125, 175]


def test_frames_without_times_are_counted(folder: Path) -> None:
    """AVI keeps no presentation times."""
    path = write(folder / "b-frames.avi", counted(60), g="12", bf="2", codec="mpeg4", **{"b:v": "2M"})
    clip = read_video(path, max_frames=6)
    assert spelled(clip.frames) == clip.indices.tolist() == [5, 15, 25, 35, 45, 55]


def scenes(lengths: list[int], seed: int = 0) -> np.ndarray:
    """Scenes of smooth random pictures, slowly brightening."""
    generator = np.random.default_rng(seed)
    frames = []
    for length in lengths:
        base = np.kron(generator.integers(0, 200, (4, 4, 3)), np.ones((16, 16, 1)))
        frames += [np.clip(base + t * 20 / length, 0, 255).astype(np.uint8) for t in range(length)]
    return np.stack(frames)


@pytest.mark.parametrize("gop", ["250", "10"], ids=["all-frames", "keyframes"])
def test_every_scene_is_seen(gop: str, folder: Path) -> None:
    """Five scenes of 20, 200, 20, 40 and 20 frames: uniform sampling of six frames misses three of them."""
    lengths = [20, 200, 20, 40, 20]
    path = write(folder / f"scenes-{gop}.mp4", scenes(lengths), g=gop, preset="ultrafast", sc_threshold="0")
    scene_of = np.repeat(np.arange(5), lengths)
    assert len(set(scene_of[read_video(path, max_frames=6).indices])) < 5
    clip = read_video(path, max_frames=6, sampling="scene")
    assert clip.indices.tolist() == [10, 70, 170, 230, 260, 290]
    expected = scenes(lengths)[clip.indices].mean((1, 2))
    np.testing.assert_allclose(clip.frames.mean((1, 2)), expected, atol=4)
    assert clip.n_decoded < (350 if gop == "10" else 700)


def test_keyframes_suffice_for_scenes_of_a_long_video(folder: Path) -> None:
    path = write(folder / "long.mp4", scenes([400, 300, 300]), g="20", preset="ultrafast")
    clip = read_video(path, max_frames=3, sampling="scene")
    assert clip.indices.tolist() == [200, 550, 850]
    assert clip.n_decoded <= 55 + 3 * (20 + 30)


def test_more_scenes_than_frames_keeps_the_strongest_cuts() -> None:
    seconds, cuts = np.arange(100) / 10, np.array([10, 20, 60])
    strengths = np.array([0.2, 0.9, 0.5])
    assert sampling.by_scene(seconds, cuts, strengths, 3).tolist() == [10, 40, 80]
    assert sampling.by_scene(seconds, cuts, strengths, 1).tolist() == [50]
    assert sampling.by_scene(seconds, cuts[:0], strengths[:0], 4).tolist() == sampling.uniform(seconds, 4).tolist()
    assert sampling.by_scene(seconds, cuts, strengths, 1000).tolist() == list(range(100))


@pytest.mark.parametrize("count", [1, 2, 3, 7, 19, 20, 21])
def test_scenes_of_few_frames(count: int) -> None:
    """No more frames than asked for, each of its own, whatever the scenes."""
    generator = np.random.default_rng(count)
    seconds = np.cumsum(generator.exponential(size=20))
    cuts = np.sort(generator.choice(np.arange(1, 20), 6, replace=False))
    kept = sampling.by_scene(seconds, cuts, generator.random(6), count)
    assert 1 <= len(kept) <= min(count, 20)
    assert (np.diff(kept) > 0).all()
    if count > 6:
        assert len(set(np.searchsorted(cuts, kept, side="right"))) == 7


def test_what_a_scene_of_few_frames_cannot_use_goes_to_others() -> None:
    """Ten frames in one second, then two in fifty."""
    seconds = np.concatenate([np.arange(10) / 10, [1, 51]])
    assert sampling.by_scene(seconds, np.array([10]), np.array([1.0]), 7).tolist() == [1, 3, 5, 7, 9, 10, 11]


def corners() -> np.ndarray:
    """32 high, 48 wide: upper left red, upper right green, lower left blue, lower right white."""
    picture = np.zeros((32, 48, 3), np.uint8)
    picture[:16, :24], picture[:16, 24:] = (255, 0, 0), (0, 255, 0)
    picture[16:, :24], picture[16:, 24:] = (0, 0, 255), (255, 255, 255)
    return picture


def seen_corners(picture: np.ndarray) -> str:
    names = {(1, 0, 0): "R", (0, 1, 0): "G", (0, 0, 1): "B", (1, 1, 1): "W"}
    places = [picture[4, 4], picture[4, -5], picture[-5, 4], picture[-5, -5]]
    return "".join(names[int(r > 127), int(g > 127), int(b > 127)] for r, g, b in places)


# a, b, c, d of the display matrix; the corners that a player shows, upper left to lower right
ORIENTATIONS = {
    "none": ((1, 0, 0, 1), "RGBW"),
    "90-clockwise": ((0, 1, -1, 0), "BRWG"),
    "180": ((-1, 0, 0, -1), "WBGR"),
    "90-counterclockwise": ((0, -1, 1, 0), "GWRB"),
    "mirrored": ((-1, 0, 0, 1), "GRWB"),
    "upside-down": ((1, 0, 0, -1), "BWRG"),
    "transposed": ((0, 1, 1, 0), "RBGW"),
}


@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_rotated_video_comes_out_upright(orientation: str, tmp_path: Path) -> None:
    """As phones write it: the matrix stands in the track header of the MP4."""
    (a, b, c, d), expected = ORIENTATIONS[orientation]
    path = write(tmp_path / "phone.mp4", np.stack([corners()] * 3))
    data = bytearray(path.read_bytes())
    matrix = data.index(b"tkhd") + 4 + 40  # version and flags, times, duration, layer (ISO/IEC 14496-12)
    assert struct.unpack(">i", data[matrix : matrix + 4]) == (1 << 16,)
    values = [a << 16, b << 16, 0, c << 16, d << 16, 0, 0, 0, 1 << 30]
    data[matrix : matrix + 36] = struct.pack(">9i", *values)
    path.write_bytes(data)
    frames = read_video(path).frames
    assert frames.shape == ((3, 48, 32, 3) if a == 0 else (3, 32, 48, 3))
    assert [seen_corners(frame) for frame in frames] == [expected] * 3


def test_odd_angles_are_rounded_to_quarter_turns() -> None:
    matrix = np.array([[0.1, 0.99, 0], [-0.99, 0.1, 0], [0, 0, 1]]) * (1 << 16)
    assert seen_corners(apply_display_matrix(corners(), matrix.astype(np.int32))) == "BRWG"


def test_rotate_tag_without_a_matrix(tmp_path: Path) -> None:
    path = tmp_path / "old.mkv"
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream("ffv1", rate=5)
        stream.width, stream.height, stream.pix_fmt = 48, 32, "bgr0"
        stream.metadata["rotate"] = "90"
        container.mux(stream.encode(av.VideoFrame.from_ndarray(corners(), format="rgb24")))
        container.mux(stream.encode(None))
    assert seen_corners(read_video(path).frames[0]) == "BRWG"


def test_pixels_that_are_not_square(tmp_path: Path) -> None:
    path = tmp_path / "anamorphic.mkv"
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream("libx264", rate=5)
        stream.width, stream.height, stream.pix_fmt = 48, 32, "yuv420p"
        stream.codec_context.sample_aspect_ratio = Fraction(4, 3)
        container.mux(stream.encode(av.VideoFrame.from_ndarray(corners(), format="rgb24")))
        container.mux(stream.encode(None))
    clip = read_video(path)
    assert clip.frames.shape == (1, 32, 64, 3)
    assert seen_corners(clip.frames[0]) == "RGBW"


def test_a_file_cut_short_says_so(tmp_path: Path) -> None:
    """The index of this MP4 comes first and promises 300 frames."""
    noise = np.random.default_rng(0).integers(0, 255, (300, 32, 32, 3), dtype=np.uint8)
    path = tmp_path / "cut.mp4"
    with av.open(str(path), "w", options={"movflags": "faststart"}) as container:
        stream: Any = container.add_stream("libx264", rate=10, options={"preset": "ultrafast"})
        stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"
        for frame in noise:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    clip = read_video(path, max_frames=8)
    assert len(clip.frames) >= 7
    assert 100 < clip.n_source_frames < 200
    assert clip.timestamps[-1] < 20
    assert f"{clip.n_source_frames} of the 300 frames" in clip.notes[0]


def test_damage_in_the_middle_costs_only_what_it_hit(tmp_path: Path) -> None:
    path = write(tmp_path / "damaged.mkv", counted(200), g="20", sc_threshold="0")
    data = bytearray(path.read_bytes())
    data[len(data) // 2 : len(data) // 2 + 300] = bytes(300)
    path.write_bytes(data)
    clip = read_video(path, max_frames=10)
    assert len(clip.frames) == 9
    assert clip.notes[0] == "damaged: 1 of 10 frames cannot be decoded and are left out"
    right = np.round(clip.timestamps * 10).astype(int) == spelled(clip.frames)
    assert right.sum() >= 8, "a group of pictures is lost, the times of the others hold"


def test_a_song_with_a_cover_is_no_video(tmp_path: Path) -> None:
    path = tmp_path / "song.m4a"
    with av.open(str(path), "w", format="mp4") as container:
        sound: Any = container.add_stream("aac", rate=16000)
        cover: Any = container.add_stream("mjpeg", rate=1)
        cover.width, cover.height, cover.pix_fmt = 48, 32, "yuvj420p"
        cover.disposition = Disposition.attached_pic.value
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.rate, frame.pts = 16000, 0
        container.mux(sound.encode(frame))
        container.mux(cover.encode(av.VideoFrame.from_ndarray(corners(), format="rgb24")))
        container.mux(cover.encode(None))
        container.mux(sound.encode(None))
    with pytest.raises(InputError, match="no video stream"):
        read_video(path)


def test_a_playlist_reaches_no_network(tmp_path: Path) -> None:
    path = tmp_path / "list.m3u8"
    path.write_text("#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nhttp://127.0.0.1:9/a.ts\n#EXT-X-ENDLIST\n")
    with pytest.raises(InputError, match=r"cannot be read as a video|no video stream"):
        read_video(path)


def test_a_name_like_a_protocol_is_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "movie.mkv", counted(5)).rename(tmp_path / "pipe:0")
    monkeypatch.chdir(tmp_path)
    assert spelled(read_video("pipe:0").frames) == list(range(5))


def test_benchmark_times_only_what_is_right(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    video_decoding: Any = importlib.import_module("benchmarks.video.decoding")
    read = video_decoding.by_read_video

    def late(path: Path, indices: list[int]) -> Any:
        times, frames = read(path, indices)
        return times + 1e-5, frames

    def darker(path: Path, indices: list[int]) -> Any:
        times, frames = read(path, indices)
        return times, frames - np.minimum(frames, 3)

    def without_libraries(_path: Path, _indices: list[int]) -> Any:
        raise RuntimeError("no FFmpeg\nat all")

    wrong = {"late": late, "darker": darker, "without": without_libraries}
    right = {name: video_decoding.CONTENDERS[name] for name in ("read_video", "VideoFile")}
    monkeypatch.setattr(video_decoding, "CONTENDERS", right | wrong)
    assert video_decoding.main(["--quick", "--out", str(tmp_path)]) == 0
    rows = json.loads((tmp_path / "video-decoding.json").read_text())["rows"]
    reasons = [(row["contender"], row["reason"]) for row in rows if row["keyframe_seconds"] == 2]
    expected = ["", "", "other times", "other pixels", "RuntimeError: no FFmpeg"]
    assert reasons == list(zip(video_decoding.CONTENDERS, expected, strict=True))
    assert [row["seconds"] is None for row in rows] == [False, False, True, True, True] * 2
    assert "RuntimeError: no FFmpeg" in (tmp_path / "video-decoding.md").read_text()
