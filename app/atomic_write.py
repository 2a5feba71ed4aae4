"""Files that are whole or not there: the one way in which this package replaces a file."""

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A new, empty file beside `path`, with its suffix, to be written within the block.

    At the end of the block it is synced to the disk and becomes `path`; on an error it goes, and `path` is as it was.
    Its name cannot be guessed and no link is followed, neither there nor at `path`, which is replaced. Its mode is that
    of any new file, whatever the block does.

    Raises:
        OSError: it could not be written, as on a full disk, with `path` in the message.
    """
    scratch = path.with_name(f".writing-{secrets.token_hex(8)}{path.suffix}")
    with naming(path, scratch):
        file = os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666)
        mode = os.fstat(file).st_mode & 0o777
        os.close(file)
        try:
            yield scratch
            _finish(scratch, mode)
            os.replace(scratch, path)
        except BaseException:
            scratch.unlink(missing_ok=True)
            raise


def _finish(scratch: Path, mode: int) -> None:
    file = os.open(scratch, os.O_RDONLY | os.O_NOFOLLOW)
    try:
        os.fchmod(file, mode)
        os.fsync(file)
    finally:
        os.close(file)


@contextmanager
def naming(path: Path, scratch: Path | None = None) -> Iterator[None]:
    """Puts `path` into the message of an OSError within the block that names no file, or only `scratch`."""
    try:
        yield
    except OSError as error:
        if error.filename is not None and str(error.filename) != str(scratch):
            raise
        if error.errno is None:
            raise OSError(f"{path}: {error}") from error
        raise OSError(error.errno, error.strerror, str(path)) from error


def write_whole(path: Path, content: bytes) -> None:
    """Writes a file by `replacing`.

    Raises:
        OSError: see `replacing`.
    """
    with replacing(path) as scratch:
        scratch.write_bytes(content)
