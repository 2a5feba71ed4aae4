"""Images and folders of images as views of a scene."""

from pathlib import Path

import numpy as np
import pytest
from PIL import ExifTags, Image

from videoanchor_triton.app.video.reader import read_video, stream_video, write_video
from videoanchor_triton.integrations.errors import InputError


def save(path: Path, value: int, height: int = 30, width: int = 41) -> None:
    Image.fromarray(np.full((height, width, 3), value, np.uint8)).save(path)


def test_a_folder_is_read_in_natural_order(tmp_path: Path) -> None:
    for n in (1, 2, 9, 10, 11, 100):
        save(tmp_path / f"view{n}.png", n)
    (tmp_path / "notes.txt").write_text("not a view")
    (tmp_path / ".hidden.png").write_text("nor this")
    (tmp_path / "folder.png").mkdir()
    clip = read_video(tmp_path)
    assert clip.frames.shape == (6, 30, 41, 3)
    assert clip.frames[:, 0, 0, 0].tolist() == [1, 2, 9, 10, 11, 100]
    assert clip.names == ("view1.png", "view2.png", "view9.png", "view10.png", "view11.png", "view100.png")
    assert clip.timestamps.tolist() == [0, 1, 2, 3, 4, 5]
    assert (clip.source_fps, clip.n_source_frames) == (1.0, 6)
    assert clip.notes == ("1 files that are no images passed over",)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        pytest.param({"max_frames": 3}, [1, 4, 7], id="count"),
        pytest.param({"fps": 0.5}, [1, 3, 5, 7], id="fps"),
        pytest.param({"indices": [0, 5]}, [0, 5], id="indices"),
    ],
)
def test_some_views(tmp_path: Path, options: dict, expected: list[int]) -> None:
    for n in range(8 if "fps" in options else 9):
        save(tmp_path / f"{n}.png", n)
    clip = read_video(tmp_path, **options)
    assert clip.indices.tolist() == expected
    assert clip.frames[:, 0, 0, 0].tolist() == expected


def test_one_image(tmp_path: Path) -> None:
    save(tmp_path / "photo.PNG", 77)
    clip = read_video(tmp_path / "photo.PNG")
    assert clip.frames.shape == (1, 30, 41, 3)
    assert (clip.frames == 77).all()


def test_a_list_of_images_is_one_scene(tmp_path: Path) -> None:
    """In the order given; one of them alone is an image."""
    paths = [tmp_path / "b" / "2.png", tmp_path / "a" / "10.JPG", tmp_path / "b" / "1.png"]
    for n, path in enumerate(paths):
        path.parent.mkdir(exist_ok=True)
        save(path, 10 * n)
    clip = read_video([str(paths[0]), *paths[1:]])
    assert clip.frames[:, 0, 0, 0].tolist() == [0, 10, 20]
    assert clip.names == ("2.png", "10.JPG", "1.png")
    assert clip.notes == ()
    assert read_video(paths, indices=[1]).names == ("10.JPG",)
    assert read_video(paths[1:2]).names == ("10.JPG",)
    assert [seconds for seconds, _ in stream_video(paths)] == [0.0, 1.0, 2.0]
    with pytest.raises(InputError, match=r"2\.png and 2 other images has no frame 3 at 3\.000 s"):
        read_video(paths, known_times={3: 3.0})


def test_a_list_of_anything_else(tmp_path: Path) -> None:
    save(tmp_path / "1.png", 1)
    write_video(tmp_path / "clip.mp4", np.zeros((2, 16, 16, 3), np.uint8), fps=1)
    for other in (tmp_path / "clip.mp4", tmp_path):
        with pytest.raises(InputError, match=r"is no image .*: a list is one scene; read each video by itself"):
            read_video([tmp_path / "1.png", other])
    assert len(read_video([tmp_path / "clip.mp4"]).frames) == 2
    with pytest.raises(InputError, match="got an empty list"):
        read_video([])
    with pytest.raises(InputError, match=r"no video file at .*2\.png"):
        read_video([tmp_path / "1.png", tmp_path / "2.png"])


def test_transparent_pixels_lie_on_white(tmp_path: Path) -> None:
    """Every grey with every opacity, blended as Pillow blends layers."""
    grey, opacity = np.meshgrid(np.arange(256), np.arange(256))
    layer = Image.fromarray(np.stack([grey, 255 - grey, grey // 2, opacity], -1).astype(np.uint8))
    layer.save(tmp_path / "a.png")
    expected = np.asarray(Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer))[..., :3]
    np.testing.assert_array_equal(read_video(tmp_path / "a.png").frames[0], expected)


def test_sizes_are_mixed_with_black_bars(tmp_path: Path) -> None:
    """The largest gives the size; a tall and a small image keep their shape in it."""
    save(tmp_path / "1.png", 200, height=20, width=20)
    save(tmp_path / "2.png", 200, height=40, width=80)
    save(tmp_path / "3.png", 200, height=60, width=15)
    clip = read_video(tmp_path)
    assert clip.frames.shape == (3, 40, 80, 3)
    assert clip.notes == ("2 of 3 images scaled into 80 x 40 pixels with black bars",)
    lit = clip.frames[..., 0] > 100
    assert np.flatnonzero(lit[0].all(0)).tolist() == list(range(20, 60))
    assert lit[1].all()
    assert np.flatnonzero(lit[2].all(0)).tolist() == list(range(35, 45))


def test_an_image_comes_out_upright(tmp_path: Path) -> None:
    """EXIF orientation 6: the camera was turned, the right side of the pixels is the bottom of the picture."""
    picture = np.zeros((20, 30, 3), np.uint8)
    picture[:, :15] = 255
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    Image.fromarray(picture).save(tmp_path / "photo.png", exif=exif)
    clip = read_video(tmp_path / "photo.png")
    assert clip.frames.shape == (1, 30, 20, 3)
    assert clip.frames[0, :15].min() == 255
    assert clip.frames[0, 15:].max() == 0
    assert clip.notes == ()


def test_pixels_of_other_kinds(tmp_path: Path) -> None:
    Image.fromarray(np.full((4, 6), 0x8000, np.uint16)).save(tmp_path / "deep.png")
    assert (read_video(tmp_path / "deep.png").frames == 0x80).all()
    Image.new("L", (6, 4), 9).save(tmp_path / "grey.png")
    assert (read_video(tmp_path / "grey.png").frames == 9).all()
    Image.new("RGBA", (6, 4), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    assert (read_video(tmp_path / "clear.png").frames == 255).all()
    Image.new("F", (6, 4), 0.5).save(tmp_path / "float.tif")
    with pytest.raises(InputError, match=r"float\.tif .* mode F"):
        read_video(tmp_path / "float.tif")


def test_views_one_at_a_time(tmp_path: Path) -> None:
    for n, height in enumerate((30, 20, 40)):
        save(tmp_path / f"view{n}.png", 50 + n, height=height)
    found = list(stream_video(tmp_path, known_times={2: 2.0}))
    assert [(seconds, frame.shape, frame[20, 20, 0]) for seconds, frame in found] == [
        (float(n), (40, 41, 3), 50 + n) for n in range(3)
    ]
    with pytest.raises(InputError, match=r"has no frame 3 at 3\.000 s"):
        next(stream_video(tmp_path, known_times={3: 3.0}))


def test_one_broken_image_names_itself(tmp_path: Path) -> None:
    save(tmp_path / "1.png", 1)
    save(tmp_path / "2.png", 2, height=500, width=500)
    whole = (tmp_path / "2.png").read_bytes()
    for broken in (b"", b"not an image", whole[: len(whole) // 2]):
        (tmp_path / "2.png").write_bytes(broken)
        with pytest.raises(InputError, match=r"2\.png cannot be read as an image"):
            read_video(tmp_path)


def test_an_image_bomb_is_refused(tmp_path: Path) -> None:
    Image.new("1", (40_000, 10_000)).save(tmp_path / "bomb.png")
    with pytest.raises(InputError, match=r"bomb\.png cannot be read as an image .*decompression bomb"):
        read_video(tmp_path / "bomb.png")


def test_views_have_no_scenes(tmp_path: Path) -> None:
    save(tmp_path / "1.png", 1)
    with pytest.raises(InputError, match="scenes are found in videos only"):
        read_video(tmp_path, sampling="scene")


def test_a_folder_of_videos_is_no_folder_of_views(tmp_path: Path) -> None:
    write_video(tmp_path / "clip.mp4", np.zeros((2, 16, 16, 3), np.uint8), fps=1)
    with pytest.raises(InputError, match="holds no image"):
        read_video(tmp_path)
