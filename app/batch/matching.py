"""Which results are whose: a row has those of its video's path and content, its question and the settings, whatever
line it stands on now."""

import hashlib
import json
import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..video.names import Video, each, name_of
from ..video.remote import is_url, url_fingerprint
from .results import Record
from .rows import BatchRow

_END = 2**20
_ASKED_AT_ONCE = 16
_IMAGE_END = 2**14
"""Bytes of each end of a file that a fingerprint reads; of an image in a folder fewer, as there may be many."""


def fingerprint(video: Video) -> str | None:
    """32 hexadecimal digits that differ where the size, the first or the last MiB of a file do; of a folder of views
    the names and sizes of its images, or the first or last 16 KiB of one. None for what is not there or cannot be read.

    Nothing else is read: a change in the middle of a file that keeps its size is not seen. Of a URL that of what its
    server says of the content, see `url_fingerprint`.
    """
    if is_url(video):
        return url_fingerprint(str(video))
    video = Path(video)
    try:
        if video.is_dir():
            from ..video.views import images_of

            parts = [(image.name, *_size_and_ends(image, _IMAGE_END)) for image in images_of(video)[0]]
        elif video.is_file():
            parts = [_size_and_ends(video, _END)]
        else:
            return None
    except OSError:
        return None
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


def _size_and_ends(path: Path, n_bytes: int) -> tuple[int, str]:
    with path.open("rb") as file:
        digest = hashlib.sha256(file.read(n_bytes))
        size = file.seek(0, os.SEEK_END)
        file.seek(max(size - n_bytes, 0))
        digest.update(file.read(n_bytes))
    return size, digest.hexdigest()


def with_fingerprints(rows: Sequence[BatchRow]) -> list[BatchRow]:
    """The rows with the fingerprints of their videos, each read once; of several one of all, None where one lacks."""
    videos = [*dict.fromkeys(video for row in rows for video in each(row.video))]
    with ThreadPoolExecutor(_ASKED_AT_ONCE) as pool:
        fingerprints = dict(zip(videos, pool.map(fingerprint, videos), strict=True))
    return [replace(row, fingerprint=_together([fingerprints[one] for one in each(row.video)])) for row in rows]


def _together(fingerprints: Sequence[str | None]) -> str | None:
    if len(fingerprints) == 1 or None in fingerprints:
        return None if None in fingerprints else fingerprints[0]
    return hashlib.sha256(json.dumps(fingerprints).encode()).hexdigest()[:32]


def matched(
    rows: Sequence[BatchRow], records: Mapping[str, Record], settings_hash: str
) -> tuple[list[BatchRow], dict[str, str]]:
    """The rows as their results in one setting know them, and what those replace.

    A video that is not there (any more) gets the fingerprint of the result it has: that stays its result.

    Args:
        rows: with fingerprints.
        records: results by key.

    Returns:
        the rows; and of each result of one of them (by path, question, system prompt and settings) that was made from
        other content its key, with the key of the row.
    """
    results: defaultdict[tuple[str, str, str | None], list[Record]] = defaultdict(list)
    for record in records.values():
        if record["settings"] == settings_hash:
            results[name_of(record["video"]), record["question"], record.get("system")].append(record)
    current, replaced = [], {}
    for row in rows:
        earlier = results[row.asked]
        if row.fingerprint is None and earlier:
            row = replace(row, fingerprint=earlier[-1].get("fingerprint"))
        current.append(row)
        key = row.key(settings_hash)
        replaced |= {
            record["key"]: key for record in earlier if record.get("copy", 0) == row.copy and record["key"] != key
        }
    return current, replaced


def refreshed(
    rows: Sequence[BatchRow], records: Mapping[str, Record], settings: Mapping[str, Mapping[str, Any]]
) -> dict[str, Record]:
    """The results, each with the line and the columns of the row that it belongs to now.

    Args:
        rows: with fingerprints.
        records: results by key.
        settings: columns of each settings' hash, for results that lack them.

    Returns:
        results by key; "line" is None where none of the rows, with the video that it has now, has this result.
    """
    current: dict[str, BatchRow] = {}
    for settings_hash in dict.fromkeys(record["settings"] for record in records.values()):
        current |= {row.key(settings_hash): row for row in matched(rows, records, settings_hash)[0]}
    found = {}
    for key, record in records.items():
        record = {**settings.get(record["settings"], {}), **record, "line": None}
        if key in current:
            record |= {"line": current[key].number, "input": current[key].columns}
        found[key] = record
    return found
