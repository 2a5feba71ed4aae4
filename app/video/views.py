"""Images as views of a scene: files, or a folder of them; runs in the child of process.py."""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from PIL import ExifTags, Image, ImageOps

from ...integrations.errors import InputError
from . import limits
from .sampling import Progress, Request

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".ppm"})


def is_views(source: Path | list[Path]) -> bool:
    """A folder, a file with the name of an image, or several files."""
    return isinstance(source, list) or source.is_dir() or source.suffix.lower() in SUFFIXES


def images_of(path: Path) -> tuple[list[Path], int]:
    """The images of a folder in natural order of their names, or the file `path` itself; and how many files of the
    folder are no images. Hidden files do not count."""
    files = [path] if path.is_file() else [f for f in path.iterdir() if f.is_file() and not f.name.startswith(".")]
    images = sorted((f for f in files if f.suffix.lower() in SUFFIXES), key=lambda f: natural_key(f.name))
    return images, len(files) - len(images)


def natural_key(name: str) -> list[tuple[bool, int, str]]:
    """Sorts view2 before view10."""
    return [(part.isdecimal(), int(part) if part.isdecimal() else 0, part) for part in re.split(r"(\d+)", name)]


def read_views(request: Request, report: Progress, send: Callable[..., None]) -> dict[str, Any]:
    """Calls `send` with "frame", each kept view, its time and how many there will be; returns the other fields of the
    clip.

    Views count as one a second. Images of more than `max_pixels` are scaled down; those of several sizes are then
    scaled into that of the largest, with black bars.

    Raises:
        InputError: there is no image, or one cannot be read or is too large.
    """

    def scene_cuts(_count: int) -> NoReturn:
        raise InputError(f"{request.name}: scenes are found in videos only: use uniform sampling for images")

    source = request.source
    images, n_others = (source, 0) if isinstance(source, list) else images_of(source)
    if not images:
        raise InputError(f"{source} holds no image ({', '.join(sorted(SUFFIXES))}): give a video, an image or a folder")
    seconds = np.arange(len(images), dtype=np.float64)
    indices = request.frames(seconds, scene_cuts)
    images = [images[index] for index in indices]
    sizes = [_size(image) for image in images]
    kept = [limits.bounded(*size, request.max_pixels) for size in sizes]
    width, height = max(kept, key=lambda size: (size[0] * size[1], size))
    for n, (image, size) in enumerate(zip(images, kept, strict=True)):
        report("read", n, len(images))
        send("frame", letterbox(_pixels(image, size), height, width), float(seconds[indices[n]]), len(images))
    n_large = sum(size != new for size, new in zip(sizes, kept, strict=True))
    n_small = sum(size != (width, height) for size in kept)
    notes = {
        f"{n_large} of {len(images)} images scaled down (--max-pixels {request.max_pixels})": n_large,
        f"{n_small} of {len(images)} images scaled into {width} x {height} pixels with black bars": n_small,
        f"{n_others} files that are no images passed over": n_others,
    }
    return {
        "timestamps": seconds[indices],
        "indices": indices,
        "n_source_frames": len(seconds),
        "source_fps": 1.0,
        "n_decoded": len(images),
        "notes": tuple(note for note, number in notes.items() if number),
        "names": tuple(image.name for image in images),
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


def _pixels(path: Path, size: tuple[int, int]) -> np.ndarray:
    """(H, W, 3) uint8 RGB, upright, scaled to the width and height given; what is transparent becomes white."""
    with _opened(path) as image:
        image.draft(None, (size[1], size[0]) if _lies(image) else size)  # a large JPEG is decoded smaller
        ImageOps.exif_transpose(image, in_place=True)
        image = _rgb(image)
        return np.asarray(image if image.size == size else image.resize(size, Image.Resampling.BICUBIC))


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise ValueError(f"pixels of more than 16 bits, mode {image.mode}")
    if not image.has_transparency_data:
        return image.convert("RGB")
    layer = image if image.mode == "RGBA" else image.convert("RGBA")
    opaque = Image.new("RGB", image.size, "white")
    opaque.paste(layer, mask=layer)
    return opaque
