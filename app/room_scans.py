"""Room scans: made-up clips whose questions need several frames, and whose answers are known.

A camera pans over a wide textured wall, dark at one end and light at the other, with 1 to 6 objects; a frame shows a
part of it, and an object stays in view for some frames. Two objects of one colour and shape happen. In half of the
clips a grey blob, which is never asked for, crosses one frame. Everything follows from the seed.

The checkpoint beside this file, a Qwen2.5-VL of 1.1 million parameters, was trained on them: `benchmarks/room_scans`.

Example:
    >>> from videoanchor_triton.app.room_scans import RoomScan
    >>> scan = RoomScan(7)
    >>> scan.frames.shape
    (8, 32, 96, 3)
    >>> [(one.text, one.answer) for one in scan.questions() if one.kind == "objects"]
    [('How many objects are there?', '4')]
"""

import json
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from .atomic_write import replacing, write_whole
from .video.reader import VideoClip, write_video

COLOURS = {"red": (220, 40, 40), "green": (40, 190, 60), "blue": (50, 80, 230), "yellow": (235, 215, 40)}
SHAPES = ("square", "ring", "cross", "triangle")
PLURALS = ("squares", "rings", "crosses", "triangles")
HEIGHT, WIDTH, FPS = 32, 96, 2
CELL = 16
"""Side of what becomes one visual token, in pixels: 12 tokens a frame."""
CHECKPOINT = Path(__file__).with_name("room_scan_checkpoint")
"""Of the model that answers about them."""
TEST_SEED = 2 * 10**9
"""Scans of this seed and above were in no training."""
QUESTIONS = {
    "colour": "what color is the {a}",
    "exists": "is there a {a}",
    "first": "which appears first , the {a} or the {b}",
    "side": "is the {a} left or right of the {b}",
    "turn": "which way does the camera turn",
    "objects": "how many objects are there",
    "of_colour": "how many {a} objects are there",
    "of_shape": "how many {a} are there",
    "of_both": "how many {a} are there",
    "colours": "how many colors are there",
}
"""Kinds of questions; those about an order or a turn are asked of videos only."""
_SIZE = 13


ANSWERS = {
    **dict.fromkeys(("colour", "first"), tuple(COLOURS)),
    **{"exists": ("yes", "no"), "side": ("left", "right"), "turn": ("left", "right", "both")},
    **dict.fromkeys(("objects", "of_colour", "of_shape", "of_both", "colours"), tuple("0123456")),
}
"""What may be right, by kind."""


class Asked(NamedTuple):
    """A question about a scan: its kind, its text and the right answer, one word."""

    kind: str
    text: str
    answer: str


class RoomScan:
    """One clip, or a picture.

    Args:
        seed: what everything follows from.
        n_frames: 6 or more, or 1 for a picture, which shows the whole scene.
        travel: how far the camera goes, in pixels; None for what the model was trained on.

    Raises:
        ValueError: the camera would go faster than objects can be seen.

    Attributes:
        frames: (n_frames, 32, 96, 3) uint8, to be shown at 2 a second.
        objects: (N, 2) int64: the colour and the shape of each object, in the order of `COLOURS` and `SHAPES`.
        x: (N,) int64: where the middle of an object is in the scene, in pixels.
        row: (N,) int64: 0 above, 1 below.
        left: (n_frames,) int64: where the left edge of each frame is in the scene.
        turn: "left", "right" or "both": where the camera goes.
    """

    def __init__(self, seed: int, n_frames: int = 8, travel: int | None = None) -> None:
        self._rng = rng = np.random.default_rng(seed)
        back = n_frames > 1 and rng.random() < 0.2
        self.turn = "both" if back else ("left", "right")[int(rng.integers(2))]
        if n_frames == 1:
            travel = 0
        elif travel is None:
            travel = int(rng.integers(100, 130) if back else rng.integers(150, 200))
        if n_frames > 1 and not 100 <= travel <= 40 * (n_frames - 1):
            raise ValueError(f"travel: expected 100 to 40 pixels a step of {n_frames} frames, got {travel}")
        self.width = WIDTH + travel
        self.objects = self._objects(int(rng.integers(1, 7 if travel else 5)))
        self.left = self._path(n_frames, travel, back)
        self.x, self.row = self._places()
        self.frames = self._render()

    def _objects(self, n: int) -> np.ndarray:
        """All different, but for one in a quarter of the scenes, which is there twice."""
        rng = self._rng
        n_colours = int(rng.integers(max(1, -(-n // 4)), min(n, 4) + 1))
        chosen = rng.permutation(4)[:n_colours]
        pool = np.array([(colour, shape) for colour in chosen for shape in range(4)])
        while True:
            picked = pool[rng.permutation(len(pool))[:n]]
            if n > 2 and rng.random() < 0.25:
                picked[0] = picked[1]
            if len(set(picked[:, 0])) == n_colours:
                return picked

    def _path(self, n_frames: int, travel: int, back: bool) -> np.ndarray:
        rng = self._rng
        if n_frames == 1:
            return np.zeros(1, dtype=np.int64)
        while True:
            speed = rng.uniform(0.25, 1.75, n_frames - 1)
            done = np.concatenate([[0], np.cumsum(speed)]) / speed.sum()
            if back:  # there in the first half of the way, back in the second
                done = 1 - abs(1 - 2 * done)
            left = np.round(done * travel).astype(np.int64)
            if self.turn == "left" or (back and rng.random() < 0.5):
                left = travel - left
            if abs(np.diff(left)).max() <= WIDTH - CELL and np.ptp(left) >= 0.8 * travel:
                return left

    def _places(self) -> tuple[np.ndarray, np.ndarray]:
        """Objects of one row do not touch, each is seen whole in a frame; two of a video are never seen together."""
        rng, n, margin = self._rng, len(self.objects), _SIZE // 2 + 2
        while True:
            x, row = rng.integers(margin, self.width - margin, n), rng.integers(0, 2, n)
            gap = abs(x[:, None] - x) + 100 * (row[:, None] != row) + 1000 * np.eye(n)
            apart = len(self.left) == 1 or n == 1 or np.ptp(x) > WIDTH + 4
            if apart and gap.min() > _SIZE + 3 and self._seen(x, margin).any(1).all():
                return x, row

    def _seen(self, x: np.ndarray, margin: float) -> np.ndarray:
        """(N, T) bool: the middle of an object is at least `margin` pixels inside a frame."""
        at = x[:, None] - self.left
        return (at >= margin) & (at < WIDTH - margin)

    def _render(self) -> np.ndarray:
        rng, width = self._rng, self.width
        y, x = np.arange(HEIGHT)[:, None], np.arange(width)[None]
        waves = rng.uniform((4, 0.05, -0.6, 0), (9, 0.9, 0.6, 7), (3, 4))
        texture = sum(size * np.sin(x * across + y * down + phase) for size, across, down, phase in waves)
        wall = ((55 + 110 * x / width + texture)[..., None] * rng.uniform(0.85, 1.1, 3)).astype(np.float32)
        wall += 5 * self._noise(wall.shape)
        half = _SIZE // 2
        for (colour, shape), middle, row in zip(self.objects, self.x, self.row, strict=True):
            top = (8, 24)[row] + int(rng.integers(-1, 2)) - half
            view = wall[top : top + _SIZE, middle - half : middle + half + 1]
            mask = _masks()[shape][: len(view), :, None]
            view += mask * (_RGB[colour] * rng.uniform(0.85, 1.1) - view)
        frames = np.stack([wall[:, left : left + WIDTH] for left in self.left])
        if rng.random() < 0.5:
            t, x0, y0 = rng.integers(len(frames)), rng.integers(2, WIDTH - 14), rng.integers(2, HEIGHT - 14)
            if len(frames) > 1:
                frames[t, y0 : y0 + 13, x0 : x0 + 13] = 200
        frames = frames * np.float32(rng.uniform(0.9, 1.1)) + 3 * self._noise(frames.shape)
        if rng.random() < 0.5:  # colours at half the resolution, as in a compressed video
            grey = frames.mean(-1, keepdims=True)
            colour = (frames - grey).reshape(len(frames), HEIGHT // 2, 2, WIDTH // 2, 2, 3).mean((2, 4))
            frames = grey + colour.repeat(2, 1).repeat(2, 2)
        return np.clip(frames, 0, 255).astype(np.uint8)

    def _noise(self, shape: tuple[int, ...]) -> np.ndarray:
        noise, n = _noise(), int(np.prod(shape))
        start = int(self._rng.integers(len(noise) - n))
        return noise[start : start + n].reshape(shape)

    def clip(self) -> VideoClip:
        """The frames as `read_video` would return them, without the losses of a file."""
        n = len(self.frames)
        return VideoClip(self.frames, np.arange(n) / FPS, np.arange(n), n, float(FPS))

    def objects_of_tokens(self) -> np.ndarray:
        """(T, 2, 6) int64: for each visual token 0, or 1 + 4 colour + shape of the object whose middle it shows."""
        out = np.zeros((len(self.left), HEIGHT // CELL, WIDTH // CELL), dtype=np.int64)
        seen = self._seen(self.x, 3)
        for n, (colour, shape) in enumerate(self.objects):
            t = np.flatnonzero(seen[n])
            out[t, self.row[n], (self.x[n] - self.left[t]) // CELL] = 1 + 4 * colour + shape
        return out

    def first_sights(self) -> tuple[np.ndarray, np.ndarray]:
        """(T, 2, 6) int64: 1 where a token shows an object for the first time; (T,) int64: objects seen so far."""
        new = np.zeros((len(self.left), HEIGHT // CELL, WIDTH // CELL), dtype=np.int64)
        seen = self._seen(self.x, 3)
        for n, t in enumerate(seen.argmax(1)):
            if seen[n, t]:
                new[t, self.row[n], (self.x[n] - self.left[t]) // CELL] = 1
        return new, np.maximum.accumulate(seen, 1).sum(0)

    def eighths(self) -> np.ndarray:
        """(T, 2, 6) int64: in which eighth of the scene a token lies."""
        middle = self.left[:, None, None] + CELL * np.arange(WIDTH // CELL) + CELL // 2
        return np.broadcast_to(middle * 8 // self.width, (len(self.left), HEIGHT // CELL, WIDTH // CELL))

    def questions(self) -> list[Asked]:
        """One of each kind that this scan allows, in the order of `QUESTIONS`; drawn anew in each call."""
        rng, video = self._rng, len(self.left) > 1
        pairs = [tuple(pair) for pair in self.objects.tolist()]
        names = [f"{list(COLOURS)[colour]} {SHAPES[shape]}" for colour, shape in pairs]
        of_colour, of_shape = (np.bincount(self.objects[:, k], minlength=4) for k in (0, 1))
        alone = [n for n, pair in enumerate(pairs) if pairs.count(pair) == 1]
        found: dict[str, tuple[str, dict[str, str]]] = {}

        single = np.flatnonzero([len({c for c, s in pairs if s == shape}) == 1 for shape in range(4)])
        if len(single):
            shape = int(rng.choice(single))
            found["colour"] = list(COLOURS)[next(c for c, s in pairs if s == shape)], {"a": SHAPES[shape]}
        absent = [(c, s) for c in range(4) for s in range(4) if (c, s) not in pairs]
        missing = absent[rng.integers(len(absent))]
        missing_name = f"{list(COLOURS)[missing[0]]} {SHAPES[missing[1]]}"
        yes = bool(rng.random() < 0.5)
        found["exists"] = ("yes", {"a": names[rng.integers(len(names))]}) if yes else ("no", {"a": missing_name})
        two = [(i, j) for i in alone for j in alone if i != j]
        if video:
            seen, whole = self._seen(self.x, 2 - _SIZE // 2), self._seen(self.x, 8)
            first_seen, first_whole = seen.argmax(1), np.where(whole.any(1), whole.argmax(1), 99)
            order = [
                (i, j)
                for i, j in two
                if pairs[i][0] != pairs[j][0]
                and (first_seen[i] - first_seen[j]) * (first_whole[i] - first_whole[j]) > 0
            ]
            if order:
                i, j = order[rng.integers(len(order))]
                earlier = i if first_seen[i] < first_seen[j] else j
                found["first"] = list(COLOURS)[pairs[earlier][0]], {"a": names[i], "b": names[j]}
            far = WIDTH + _SIZE // 2
            sides = [(i, j) for i, j in two if abs(self.x[i] - self.x[j]) > far and not (seen[i] & seen[j]).any()]
            found["turn"] = self.turn, {}
        else:
            sides = [(i, j) for i, j in two if abs(self.x[i] - self.x[j]) > _SIZE]
        if sides:
            i, j = sides[rng.integers(len(sides))]
            found["side"] = "left" if self.x[i] < self.x[j] else "right", {"a": names[i], "b": names[j]}
        found["objects"] = str(len(pairs)), {}
        colour, shape = self._one_of_each_count(of_colour), self._one_of_each_count(of_shape)
        found["of_colour"] = str(of_colour[colour]), {"a": list(COLOURS)[colour]}
        found["of_shape"] = str(of_shape[shape]), {"a": PLURALS[shape]}
        twice = [pair for pair in pairs if pairs.count(pair) > 1]
        c, s = twice[0] if twice and rng.random() < 0.8 else pairs[0] if rng.random() < 0.6 else missing
        found["of_both"] = str(pairs.count((c, s))), {"a": f"{list(COLOURS)[c]} {PLURALS[s]}"}
        found["colours"] = str(int((of_colour > 0).sum())), {}
        return [
            Asked(kind, f"{text.format(**found[kind][1]).replace(' ,', ',').capitalize()}?", found[kind][0])
            for kind, text in QUESTIONS.items()
            if kind in found
        ]

    def _one_of_each_count(self, counts: np.ndarray) -> int:
        wanted = self._rng.choice(np.unique(counts))
        return int(self._rng.choice(np.flatnonzero(counts == wanted)))


def write_scans(folder: Path, scans: Sequence[RoomScan], asked: Sequence[Sequence[Asked]] | None = None) -> Path:
    """Writes scans as MP4, pictures as PNG, and `questions.jsonl` about them, as `videoanchor eval`, `tune` and `batch`
    read it. Counts are to be scored by exact match.

    Args:
        folder: is made if it is missing.
        asked: the questions of each scan; None draws them.

    Returns:
        the path of the questions.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for n, scan in enumerate(scans):
        name = f"scan{n:03d}.{'mp4' if len(scan.frames) > 1 else 'png'}"
        with replacing(folder / name) as scratch:
            if len(scan.frames) > 1:
                write_video(scratch, scan.frames, FPS)
            else:
                Image.fromarray(scan.frames[0]).save(scratch, "png")
        for one in scan.questions() if asked is None else asked[n]:
            row = {"video": name, "question": one.text, "answer": one.answer, "type": one.kind}
            rows.append({**row, "metric": "exact"} if one.answer.isdigit() else row)
    path = folder / "questions.jsonl"
    write_whole(path, "".join(f"{json.dumps(row)}\n" for row in rows).encode())
    return path


def words() -> list[str]:
    """Everything that questions and answers are made of."""
    fixed = {word for text in QUESTIONS.values() for word in text.format(a="", b="").split()}
    answers = {"left", "right", "both", "yes", "no", *map(str, range(10))}
    return [*sorted(fixed | answers), *COLOURS, *SHAPES, *PLURALS]


_RGB = np.array(list(COLOURS.values()), dtype=np.float32)


@lru_cache
def _masks() -> np.ndarray:
    y, x = np.mgrid[:_SIZE, :_SIZE] - (_SIZE - 1) / 2
    radius = np.hypot(x, y)
    square = np.maximum(abs(x), abs(y)) <= 5.2
    ring = (radius <= 6.4) & (radius >= 3.4)
    cross = (np.minimum(abs(x), abs(y)) <= 1.6) & (radius <= 6.5)
    triangle = (y <= 5.5) & (abs(x) <= (y + 6.2) * 0.56)
    return np.stack([square, ring, cross, triangle]).astype(np.float32)


@lru_cache
def _noise() -> np.ndarray:
    return np.random.default_rng(0).standard_normal(1_000_003, dtype=np.float32)
