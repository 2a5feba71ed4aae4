"""Videos that lie elsewhere, by URL: fetched through fsspec into a folder of this machine, once for each content."""

import base64
import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import unquote, urlsplit

from ...integrations.errors import InputError
from ..atomic_write import replacing, write_whole
from .sampling import Progress

MAX_DOWNLOAD = 2**33
"""Default of `read_video`, bytes of a file."""
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_SECRET = re.compile(r"//[^/?#\s]*@")
"""User and password, also of a URL within another."""
_CHUNK = 2**20
_VALIDATORS = (
    *("ETag", "etag", "Content-MD5", "Digest", "Last-Modified", "LastModified", "last_modified", "mtime", "created"),
    *("md5Hash", "crc32c", "generation", "updated", "blob_id", "VersionId"),
)
"""Of what fsspec's file systems say of a file: what changes with its content."""


@dataclass(frozen=True)
class _Copy:
    """What is kept beside a copy.

    Args:
        version: the validators of the file that it is of.
        sha256: of its content.
    """

    n_bytes: int
    version: dict[str, str]
    sha256: str


def is_url(video: object) -> bool:
    """Whether a video is named by a URL; a `Path` never is, it would have lost a slash."""
    return isinstance(video, str) and _URL.match(video) is not None


def path_or_url(text: str) -> Path | str:
    """Of an option."""
    return text if is_url(text) else Path(text)


def shown_url(video: Path | str) -> str:
    """The name of a video in results, logs and pages: of a URL without user and password, and with eight digits that
    stand for its query and fragment, which may hold a signature."""
    if not is_url(video):
        return str(video)
    name, *rest = re.split(r"[?#]", _SECRET.sub("//", str(video)), maxsplit=1)
    return name + "".join(f"?{_digest(one)[:8]}" for one in rest if one)


def url_fingerprint(url: str) -> str | None:
    """32 hexadecimal digits that change where the file says that its content has; None where it does not say, or cannot
    be reached."""
    try:
        n_bytes, version, *_ = _about(url)
    except InputError:
        return None
    return _digest(json.dumps([n_bytes, version], sort_keys=True))[:32] if version else None


def located(video: Path | str, max_download: int = MAX_DOWNLOAD, progress: Progress | None = None) -> Path:
    """Where a video lies on this machine: a path as it is; a URL's copy, fetched unless there is one of this content.

    Copies stay in the folder VIDEOANCHOR_CACHE, by default videoanchor-triton/videos of the user's cache folder. One is
    used again where the file's size and one of its validators (ETag, time of change, checksum) are as they were; a
    file without any is fetched each time.

    Args:
        video: a path, or a URL of a protocol that fsspec knows.
        max_download: bytes that a file may have.
        progress: called with ("fetch", MiB so far, MiB in all or 0).

    Raises:
        InputError: the URL cannot be read, what it gives is too large or cut short or has another checksum than the
            server says, or a package for the protocol is missing.
    """
    if not is_url(video):
        return Path(video)
    url, name = str(video), shown_url(video)
    target, about = _target(url), _target(url).with_name("about.json")
    copy = _copy(target, about)
    try:
        n_bytes, version, promised, filesystem, path = _about(url)
    except InputError as error:
        if copy is None:
            raise
        raise InputError(f"{error}; a copy of before is {target}: give that path to use it") from error
    if copy is not None and version and (copy.version, copy.n_bytes) == (version, n_bytes or copy.n_bytes):
        return target
    _check_size(name, n_bytes or 0, max_download)
    target.parent.mkdir(parents=True, exist_ok=True)
    sums = {"md5": hashlib.md5(usedforsecurity=False), "sha256": hashlib.sha256()}
    count = 0
    with replacing(target) as scratch, scratch.open("wb") as out:
        try:
            # one answer of a web server, where pieces could be of two versions of a file
            options = {"block_size": 0} if url.lower().startswith("http") else {}
            with filesystem.open(path, "rb", **options) as file:
                while piece := file.read(_CHUNK):
                    count += len(piece)
                    _check_size(name, count, max_download)
                    for one in sums.values():
                        one.update(piece)
                    out.write(piece)
                    if progress is not None:
                        progress("fetch", count >> 20, (n_bytes or 0) >> 20)
        except InputError:
            raise
        except Exception as error:  # each file system has its own
            raise InputError(f"{name}: the download failed after {count:,} bytes: {_said(error, url)}") from error
        if n_bytes is not None and count != n_bytes:
            raise InputError(f"{name}: {count:,} bytes came of {n_bytes:,}: try again")
        for kind, value in promised.items():
            if (found := sums[kind].hexdigest()) != value:
                raise InputError(f"{name}: its {kind} is {found}, the server says {value}: try again")
    found = _Copy(count, version, sums["sha256"].hexdigest())
    write_whole(about, json.dumps(asdict(found)).encode())
    return target


def sha256_of(video: Path | str) -> str | None:
    """Of the content of a URL's copy; None of a path."""
    if not is_url(video):
        return None
    target = _target(str(video))
    copy = _copy(target, target.with_name("about.json"))
    return None if copy is None else copy.sha256


def _about(url: str) -> tuple[int | None, dict[str, str], dict[str, str], Any, str]:
    """Bytes, validators, checksums by kind, file system and its path."""
    name = shown_url(url)
    try:
        import fsspec
        from fsspec.core import url_to_fs
    except ImportError as error:
        raise InputError(f"{name}: URLs need fsspec: pip install 'videoanchor-triton[remote]'") from error
    try:
        filesystem, path = url_to_fs(url)
        filesystem.invalidate_cache()  # of what it was told before
        info: Mapping[str, Any] = filesystem.info(path)
    except ImportError as error:
        raise InputError(f"{name}: {error}: pip install 'videoanchor-triton[remote]'") from error
    except FileNotFoundError as error:
        why = "" if error.__cause__ is None else f": {_said(error.__cause__, url)}"  # as of a host that is not there
        raise InputError(f"{name}: not found{why}") from error
    except Exception as error:
        unknown = urlsplit(url).scheme not in fsspec.available_protocols()
        why = "fsspec knows no such protocol" if unknown else f"cannot be reached: {_said(error, url)}"
        raise InputError(f"{name}: {why}") from error
    if info.get("type") == "directory":
        raise InputError(f"{name}: is a folder; give the URL of a file")
    version = {key: str(info[key]) for key in _VALIDATORS if info.get(key) is not None}
    promised = {}
    for key in ("Content-MD5", "md5Hash"):
        if info.get(key):
            promised["md5"] = base64.b64decode(info[key]).hex()
    lfs = info.get("lfs")
    if lfs:
        promised["sha256"] = lfs["sha256"] if isinstance(lfs, Mapping) else lfs.sha256
    return info.get("size"), version, promised, filesystem, path


def _said(error: BaseException, url: str) -> str:
    """The first line of what an exception says, without what `shown_url` leaves out."""
    text = (str(error).strip() or type(error).__name__).splitlines()[0]
    for one in (url, unquote(url)):
        text = text.replace(one, shown_url(url))
    return _SECRET.sub("//", text)


def _check_size(name: str, n_bytes: int, most: int) -> None:
    if n_bytes > most:
        raise InputError(f"{name}: more than {most / 2**30:g} GiB: raise --max-download (max_download) to fetch it")


def _target(url: str) -> Path:
    home = os.environ.get("VIDEOANCHOR_CACHE")
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "videoanchor-triton" / "videos"
    name = re.sub(r"[^\w.-]", "_", unquote(PurePosixPath(urlsplit(url).path).name))[-80:].lstrip(".") or "video"
    return (Path(home) if home else base) / _digest(url)[:32] / name


def _copy(target: Path, about: Path) -> _Copy | None:
    """What is known of a copy that is there and whole."""
    try:
        found = _Copy(**json.loads(about.read_bytes()))
        return found if target.stat().st_size == found.n_bytes else None
    except (OSError, ValueError, TypeError):
        return None


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()
