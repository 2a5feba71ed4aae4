"""What a file may cost: large frames and images are scaled down or refused, and the process that reads is bounded; and
names and tags that are no text."""

import os
import re
import resource
import subprocess
import sys
import textwrap
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import ExifTags, Image

from videoanchor_triton.app import cli
from videoanchor_triton.app.video import limits
from videoanchor_triton.app.video.reader import read_video, stream_video, write_video
from videoanchor_triton.integrations.errors import InputError


def halves(height: int, width: int, n: int = 2) -> np.ndarray:
    """(n, height, width, 3): the left half white, the right black."""
    frames = np.zeros((n, height, width, 3), np.uint8)
    frames[:, :, : width // 2] = 255
    return frames


def is_halves(frame: np.ndarray) -> bool:
    width = frame.shape[1]
    return bool(frame[:, : width // 2 - 2].min() > 240 and frame[:, width // 2 + 2 :].max() < 15)


@pytest.mark.parametrize(
    ("size", "most", "expected"),
    [
        ((3840, 2160), limits.MAX_PIXELS, (3840, 2160)),
        ((4096, 2160), limits.MAX_PIXELS, (4096, 2160)),
        ((5120, 2880), limits.MAX_PIXELS, (5120, 2880)),
        ((4032, 3024), limits.MAX_PIXELS, (4032, 3024)),
        ((8192, 8192), limits.MAX_PIXELS, (4096, 4096)),
        ((100, 50), 1250, (50, 25)),
        ((10**9, 1), 10**6, (31622776, 1)),
        ((64, 48), 1, (1, 1)),
    ],
)
def test_bounded(size: tuple[int, int], most: int, expected: tuple[int, int]) -> None:
    found = limits.bounded(*size, most)
    assert found == expected


def test_large_frames_are_scaled_down(tmp_path: Path) -> None:
    write_video(tmp_path / "a.mp4", halves(120, 200, 6), fps=4)
    assert read_video(tmp_path / "a.mp4", max_pixels=120 * 200).notes == ()
    clip = read_video(tmp_path / "a.mp4", max_frames=3, max_pixels=6000)
    assert clip.frames.shape == (3, 60, 100, 3)
    assert all(map(is_halves, clip.frames))
    assert clip.notes == ("frames of 200 x 120 pixels scaled to 100 x 60 (--max-pixels 6000)",)
    assert {frame.shape for _, frame in stream_video(tmp_path / "a.mp4", max_pixels=6000)} == {(60, 100, 3)}
    assert read_video(tmp_path / "a.mp4", max_pixels=6000, strict=True).notes == clip.notes, "no damage"


def test_pixels_stretched_to_a_bomb(tmp_path: Path) -> None:
    """A small frame whose pixels are said to be 100 times as wide as high."""
    with av.open(str(tmp_path / "a.mkv"), "w") as container:
        stream: Any = container.add_stream("libx264", rate=5)
        stream.width, stream.height, stream.pix_fmt = 320, 240, "yuv420p"
        stream.codec_context.sample_aspect_ratio = Fraction(100)
        for picture in halves(240, 320):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))
    with av.open(str(tmp_path / "a.mkv")) as container:
        assert container.streams.video[0].sample_aspect_ratio == 100
    _, height, width, _ = read_video(tmp_path / "a.mkv", max_pixels=60_000).frames.shape
    assert height * width <= 60_000


def test_large_images_are_scaled_down(tmp_path: Path) -> None:
    """Each for itself, and a photo that lies on its side."""
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 8
    lying = np.rot90(halves(400, 800, 1)[0], -1)
    Image.fromarray(lying).save(tmp_path / "1.jpg", exif=exif)
    Image.fromarray(halves(40, 80, 1)[0]).save(tmp_path / "2.png")
    clip = read_video(tmp_path, max_pixels=5000)
    assert clip.frames.shape == (2, 50, 100, 3)
    assert all(map(is_halves, clip.frames))
    assert clip.notes == (
        "1 of 2 images scaled down (--max-pixels 5000)",
        "1 of 2 images scaled into 100 x 50 pixels with black bars",
    )


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparent_images_of_many_rows(mode: str, tmp_path: Path) -> None:
    image = np.zeros((1300, 4, 4), np.uint8)
    image[::2, :, 3] = 255
    layers = Image.fromarray(image)
    (layers.quantize(4) if mode == "P" else layers.convert(mode)).save(tmp_path / "a.png")
    frame = read_video(tmp_path / "a.png").frames[0]
    assert (frame[::2] == 0).all()
    assert (frame[1::2] == 255).all()


@pytest.fixture(scope="module")
def huge(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An image and a video of 13,000 x 5,300 pixels, each a few kB."""
    folder = tmp_path_factory.mktemp("huge")
    Image.new("1", (13_000, 5_300)).save(folder / "a.png")
    with av.open(str(folder / "a.mov"), "w") as container:
        stream: Any = container.add_stream("png", rate=5)
        stream.width, stream.height, stream.pix_fmt = 13_000, 5_300, "monob"
        frame = av.VideoFrame(13_000, 5_300, "monob")
        frame.planes[0].update(bytes(frame.planes[0].buffer_size))
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return folder


PEAK = """
    import re, resource, sys
    from pathlib import Path
    from videoanchor_triton.app.video.reader import read_video
    try:
        read_video(sys.argv[1], max_pixels=int(sys.argv[2]))
    except ValueError as error:
        print(error)
    print(int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) // 1024)
    print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss // 1024)
"""


def peaks(path: Path, max_pixels: int = limits.MAX_PIXELS) -> tuple[str, int, int]:
    """What was said, and MiB of the process that asks and of the one that reads."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-c", textwrap.dedent(PEAK), str(path), str(max_pixels)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    *said, own, child = done.stdout.splitlines()
    return " ".join(said), int(own), int(child)


@pytest.mark.parametrize("name", ["a.png", "a.mov"])
def test_what_is_too_large_is_refused_before_it_is_decoded(name: str, huge: Path) -> None:
    """A frame of it alone would take 197 MiB as RGB."""
    said, own, child = peaks(huge / name)
    assert said.startswith(str(huge / name))
    assert "13000 x 5300 pixels are more than the 67,108," in said or "decoded, of at most 67,108,864 pixels" in said
    assert own < 150
    assert child < 150


def test_memory_of_a_large_image(tmp_path: Path) -> None:
    """64 million pixels, which took 1.4 GiB to read and 184 MiB to hold."""
    Image.new("RGBA", (8000, 8000), (9, 9, 9, 0)).save(tmp_path / "a.png")
    said, own, child = peaks(tmp_path / "a.png", 10**6)
    assert said == ""
    assert own < 150
    assert child < 900


def test_kept_frames_do_not_pile_up(tmp_path: Path) -> None:
    """40 frames of 1920 x 1080 are 119 MiB as they are decoded."""
    with av.open(str(tmp_path / "a.mp4"), "w") as container:
        stream: Any = container.add_stream("libx264", rate=5, options={"preset": "ultrafast", "threads": "1"})
        stream.width, stream.height, stream.pix_fmt = 1920, 1080, "yuv420p"
        for n in range(40):
            frame = av.VideoFrame(1920, 1080, "yuv420p")
            frame.pts = n
            for plane in frame.planes:
                plane.update(bytes(plane.buffer_size))
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    few, many = (_child_peak(tmp_path / "a.mp4", [*range(n)]) for n in (2, 40))
    assert many - few < 80


def _child_peak(path: Path, indices: list[int]) -> int:
    program = f"""
        import resource
        from videoanchor_triton.app.video.reader import read_video
        read_video({str(path)!r}, indices={indices}, max_pixels=10_000)
        print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss // 1024)
    """
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-c", textwrap.dedent(program)]
    return int(subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout)


def test_the_memory_of_the_reading_process_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A library that asks for 6 GiB gets none of it."""
    greedy = """
        import PIL.Image
        PIL.Image.open = lambda path: bytes(6 << 30)
    """
    (tmp_path / "sitecustomize.py").write_text(textwrap.dedent(greedy))
    (tmp_path / "view.png").touch()
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(InputError, match=r"view\.png: reading it takes more than the 4\.0 GiB that it may"):
        read_video(tmp_path / "view.png")
    assert resource.getrlimit(resource.RLIMIT_DATA)[0] != 2**32, "not of this process"


@pytest.mark.parametrize(
    ("pixels", "bits", "held"), [(3840 * 2160, 12, 663), (3840 * 2160, 24, 897), (7680 * 4320, 12, 813)], ids=str
)
def test_the_bound_leaves_room_for_normal_video(pixels: int, bits: int, held: int) -> None:
    """MiB of RLIMIT_DATA that 16 threads held for H.264 in 4K, HEVC with 10 bits in 4K, H.264 in 8K."""
    assert limits.memory_bytes(pixels * bits // 8) > 1.5 * held * 2**20
    assert limits.memory_bytes(pixels * bits // 8) <= 2**32


def test_large_frames_get_fewer_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: set(range(64)))
    assert limits.threads(3840 * 2160 * 3) == 16
    assert limits.threads(8192 * 8192 * 3 // 2) == 5
    assert limits.threads(2**31) == 1
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: {0})
    assert limits.threads(1000) == 1


def test_max_pixels_is_checked(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="max_pixels: expected 1 or more, got 0"):
        read_video(tmp_path, max_pixels=0)


URLS = [
    "https://example.org/a/b.mp4",
    "s3://bucket/a.mp4",
    "gs://bucket/a.mp4",
    "hf://datasets/a/b.mp4",
    "file:///tmp/a.mp4",
    "rtsp://camera:554/stream",
]


@pytest.mark.parametrize("url", URLS)
def test_a_url(url: str, tmp_path: Path) -> None:
    """That lost a slash."""
    shown = re.escape(url.replace(":///", "://"))
    for path in (Path(url), tmp_path / url, [url, url]):
        with pytest.raises(InputError, match=rf"^{shown}: a URL goes in as text, alone and not as a Path"):
            read_video(path)


def test_a_folder_named_like_a_scheme(tmp_path: Path) -> None:
    (tmp_path / "https:").mkdir()
    write_video(tmp_path / "https:" / "a.mp4", halves(16, 16), fps=4)
    assert len(read_video(tmp_path / "https:" / "a.mp4").frames) == 2


def test_run_refuses_a_url_before_it_loads_anything(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    where = ("--video", URLS[-1], "--out", str(tmp_path / "out"), "--model", "no/such-model")
    assert cli.main(["run", *where, "--question", "?", "--alpha-k", "1", "--alpha-v", "1"]) == 2
    assert f"{URLS[-1]}: fsspec knows no such protocol" in capsys.readouterr().err


@pytest.mark.parametrize("suffix", ["mp4", "mov", "mkv", "avi", "webm"])
def test_tags_that_are_not_utf_8(suffix: str, tmp_path: Path) -> None:
    """As a camera of 2005 writes them; of the file, and where there are such, of the stream."""
    path = tmp_path / f"a.{suffix}"
    codec = {"webm": "libvpx", "avi": "mpeg4"}.get(suffix, "libx264")
    with av.open(str(path), "w") as container:
        container.metadata["title"] = "CAFqq"
        stream: Any = container.add_stream(codec, rate=5)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        stream.metadata.update({"title": "CAFqq", "handler_name": "CAFqq"})
        for picture in halves(48, 64):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))
    data = path.read_bytes()
    assert data.count(b"CAFqq") >= 1
    path.write_bytes(data.replace(b"CAFqq", b"CAF\xc9\xff"))
    clip = read_video(path, strict=True)
    assert (len(clip.frames), clip.notes) == (2, ())


def test_a_name_that_is_not_utf_8(tmp_path: Path) -> None:
    path = tmp_path / os.fsdecode(b"caf\xe9.mp4")
    write_video(tmp_path / "a.mp4", halves(16, 16), fps=4)
    (tmp_path / "a.mp4").rename(path)
    assert len(read_video(path).frames) == 2
