"""Images as views of a scene: one file, or a folder of them; runs in the child process of process.py."""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import ExifTags, Image, ImageOps

from ..errors import InputError
from . import sampling

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".ppm"})


def is_views(path: Path) -> bool:
    """A folder, or a file with the name of an image."""
    return path.is_dir() or path.suffix.lower() in SUFFIXES


def images_of(path: Path) -> tuple[list[Path], int]:
    """The images of a folder in natural order of their names, or the file `path` itself; and how many files of the
    folder are no images. Hidden files do not count."""
    files = [path] if path.is_file() else [f for f in path.iterdir() if f.is_file() and not f.name.startswith(".")]
    images = sorted((f for f in files if f.suffix.lower() in SUFFIXES), key=lambda f: natural_key(f.name))
    return images, len(files) - len(images)


def natural_key(name: str) -> list[tuple[bool, int, str]]:
    """Sorts view2 before view10."""
    return [(part.isdecimal(), int(part) if part.isdecimal() else 0, part) for part in re.split(r"(\d+)", name)]


def read_views(
    path: Path,
    choice: sampling.Choice,
    report: Callable[[str, int, int], None],
    send: Callable[[np.ndarray, float, int], None],
) -> dict[str, Any]:
    """Calls `send` with each kept view, its time and how many there will be; returns the other fields of `VideoClip`.

    Views count as one a second. Images of several sizes are scaled into that of the largest, with black bars.

    Raises:
        InputError: there is no image, or one cannot be read.
    """
    names, n_others = images_of(path)
    if not names:
        raise InputError(f"{path} holds no image ({', '.join(sorted(SUFFIXES))}): give a video, an image or a folder")
    seconds = np.arange(len(names), dtype=np.float64)
    if choice.sampling == "scene":
        raise InputError(f"{path}: scenes are found in videos only: use uniform sampling for images")
    choice.check_known_times(seconds, path)
    if choice.indices is not None:
        indices = sampling.check_indices(choice.indices, len(names))
    else:
        indices = sampling.uniform(seconds, choice.count(seconds))
    sizes = [_size(names[index]) for index in indices]
    width, height = max(sizes, key=lambda size: (size[0] * size[1], size))
    for n, index in enumerate(indices):
        report("read", n, len(indices))
        send(letterbox(_pixels(names[index]), height, width), float(seconds[index]), len(indices))
    others = sum(size != (width, height) for size in sizes)
    notes = [f"{others} of {len(sizes)} images scaled into {width} x {height} pixels with black bars"] if others else []
    if n_others:
        notes.append(f"{n_others} files that are no images passed over")
    return {
        "timestamps": seconds[indices].tolist(),
        "indices": indices.tolist(),
        "n_source_frames": len(names),
        "source_fps": 1.0,
        "n_decoded": len(indices),
        "notes": notes,
        "names": [names[index].name for index in indices],
    }


def letterbox(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
    """(h, w, 3) uint8 -> (height, width, 3): scaled to fit, in the middle, the rest black."""
    if pixels.shape[:2] == (height, width):
        return pixels
    return np.asarray(ImageOps.pad(Image.fromarray(pixels), (width, height), Image.Resampling.BICUBIC))


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    try:
        with Image.open(path) as image:
            yield image
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise InputError(f"{path} cannot be read as an image ({error}): check the file") from error


def _size(path: Path) -> tuple[int, int]:
    """Width and height in pixels when upright."""
    with _opened(path) as image:
        lies = image.getexif().get(ExifTags.Base.Orientation, 1) in (5, 6, 7, 8)
        return (image.height, image.width) if lies else image.size


def _pixels(path: Path) -> np.ndarray:
    """(H, W, 3) uint8 RGB, upright; what is transparent becomes white."""
    with _opened(path) as image:
        upright = ImageOps.exif_transpose(image)
        if upright.mode.startswith("I;16"):
            return np.repeat((np.asarray(upright) >> 8).astype(np.uint8)[:, :, None], 3, axis=2)
        if upright.mode in ("I", "F"):
            raise ValueError(f"pixels of more than 16 bits, mode {upright.mode}")
        layers = upright.convert("RGBA")
        return np.asarray(Image.alpha_composite(Image.new("RGBA", layers.size, "white"), layers).convert("RGB"))
