"""Images as views of a scene: one file, or a folder of them; runs in the child process of process.py."""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import ExifTags, Image, ImageOps

from ...integrations.errors import InputError
from . import limits, sampling

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".ppm"})
_STRIP = 512
"""Rows of pixels that are made opaque at once."""


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
    max_pixels: int,
    report: Callable[[str, int, int], None],
    send: Callable[[np.ndarray, float, int], None],
) -> dict[str, Any]:
    """Calls `send` with each kept view, its time and how many there will be; returns the other fields of `VideoClip`.

    Views count as one a second. Images of more than `max_pixels` are scaled down; those of several sizes are then
    scaled into that of the largest, with black bars.

    Raises:
        InputError: there is no image, or one cannot be read or is too large.
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
    source = [_size(names[index]) for index in indices]
    sizes = [limits.bounded(*size, max_pixels) for size in source]
    width, height = max(sizes, key=lambda size: (size[0] * size[1], size))
    for n, (index, size) in enumerate(zip(indices, sizes, strict=True)):
        report("read", n, len(indices))
        send(letterbox(_pixels(names[index], *size), height, width), float(seconds[index]), len(indices))
    notes = []
    if n_large := sum(size != new for size, new in zip(source, sizes, strict=True)):
        notes.append(f"{n_large} of {len(sizes)} images scaled down (--max-pixels {max_pixels})")
    if others := sum(size != (width, height) for size in sizes):
        notes.append(f"{others} of {len(sizes)} images scaled into {width} x {height} pixels with black bars")
    if n_others:
        notes.append(f"{n_others} files that are no images passed over")
    return {
        "timestamps": seconds[indices].tolist(),
        "indices": indices.tolist(),
        "n_source_frames": len(names),
        "source_fps": 1.0,
        "n_decoded": len(indices),
        "damage": [],
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
    except InputError:
        raise
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise InputError(f"{path} cannot be read as an image ({error}): check the file") from error


def _size(path: Path) -> tuple[int, int]:
    """Width and height in pixels when upright."""
    with _opened(path) as image:
        limits.check_size(path, *image.size)
        return (image.height, image.width) if _lies(image) else image.size


def _lies(image: Image.Image) -> bool:
    """Whether it has to be turned by 90 degrees."""
    return image.getexif().get(ExifTags.Base.Orientation, 1) in (5, 6, 7, 8)


def _pixels(path: Path, width: int, height: int) -> np.ndarray:
    """(H, W, 3) uint8 RGB, upright, scaled to the size given; what is transparent becomes white."""
    with _opened(path) as image:
        image.draft(None, (height, width) if _lies(image) else (width, height))  # a large JPEG is decoded smaller
        ImageOps.exif_transpose(image, in_place=True)
        return np.asarray(_scaled(_rgb(image), width, height))


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise ValueError(f"pixels of more than 16 bits, mode {image.mode}")
    if not image.has_transparency_data:
        return image.convert("RGB")
    opaque = Image.new("RGB", image.size)
    for top in range(0, image.height, _STRIP):  # a large image does not lie in the memory four times over
        strip = image.crop((0, top, image.width, min(top + _STRIP, image.height))).convert("RGBA")
        opaque.paste(Image.alpha_composite(Image.new("RGBA", strip.size, "white"), strip).convert("RGB"), (0, top))
    return opaque


def _scaled(image: Image.Image, width: int, height: int) -> Image.Image:
    return image if image.size == (width, height) else image.resize((width, height), Image.Resampling.BICUBIC)
