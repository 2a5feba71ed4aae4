"""How the videos and images of a question are named: one by its path or URL, several by those in their order."""

import json
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from .remote import sha256_of, shown_url

if TYPE_CHECKING:
    from .reader import VideoClip

Video: TypeAlias = Path | str
"""A path, or a URL."""
Videos: TypeAlias = Video | tuple[Video, ...]
"""What a question is about: one, or two and more in the order of the prompt."""


def each(videos: Videos | Sequence[Video]) -> tuple[Video, ...]:
    """All of them, also where there is one."""
    return (videos,) if isinstance(videos, Path | str) else tuple(videos)


def shown(videos: Videos | Sequence[Video]) -> str | list[str]:
    """As results name them: text, of several a list of texts; of URLs see `shown_url`."""
    names = [shown_url(video) for video in each(videos)]
    return names[0] if len(names) == 1 else names


def name_of(videos: str | Sequence[str]) -> str:
    """One text that tells what `shown` gives from others: of several the JSON of the list."""
    return videos if isinstance(videos, str) else json.dumps(list(videos), ensure_ascii=False)


def names_in(name: str) -> list[str]:
    """The texts that `name_of` was made of."""
    if name.lstrip().startswith("["):
        with suppress(ValueError, RecursionError):
            found = json.loads(name)
            if found and all(isinstance(one, str) for one in found):
                return found
    return [name]


def sha256s_of(videos: Videos | Sequence[Video]) -> str | list[str | None] | None:
    """See `sha256_of`; of several a list."""
    found = [sha256_of(video) for video in each(videos)]
    return found[0] if len(found) == 1 else found


def notes_of(videos: Videos | Sequence[Video], clips: "Sequence[VideoClip]") -> list[str]:
    """What the user should know of the clips, of several with their names."""
    pairs = zip(each(videos), clips, strict=True)
    return [f"{shown_url(video)}: {note}" if len(clips) > 1 else note for video, clip in pairs for note in clip.notes]
