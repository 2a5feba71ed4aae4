"""Files are replaced whole: through no link, with the mode of any new file, and a failure names them."""

import errno
import os
import subprocess
from pathlib import Path

import pytest

from videoanchor_triton.app import atomic_write
from videoanchor_triton.app.atomic_write import replacing, write_whole

ROOT = Path(__file__).resolve().parents[2]
AREAS = ("kernels", "anchor", "integrations", "app")


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_mode_by_umask_whatever_the_writer_does(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        with replacing(tmp_path / "a.bin") as scratch:
            scratch.unlink()  # as safetensors does: another file, for its owner alone
            os.close(os.open(scratch, os.O_CREAT | os.O_WRONLY, 0o600))
        write_whole(tmp_path / "b.txt", b"b")
    finally:
        os.umask(before)
    assert {path.name: path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {
        "a.bin": 0o666 & ~umask,
        "b.txt": 0o666 & ~umask,
    }


def test_links_are_replaced_and_not_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = tmp_path / "theirs"
    theirs.write_text("precious")
    out = tmp_path / "out"
    out.mkdir()
    (out / "results.csv").symlink_to(theirs)
    write_whole(out / "results.csv", b"new")
    assert theirs.read_text() == "precious"
    assert (out / "results.csv").read_text() == "new"
    assert not (out / "results.csv").is_symlink()
    monkeypatch.setattr(atomic_write.secrets, "token_hex", lambda _: "guessed")  # pyright: ignore
    (out / ".writing-guessed.csv").symlink_to(theirs)
    with pytest.raises(FileExistsError):
        write_whole(out / "results.csv", b"newer")
    assert theirs.read_text() == "precious"


def _fail_half_way(path: Path, error: BaseException) -> None:
    path.write_text("half")
    raise error


def test_an_error_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text("old")
    for error in (RuntimeError("x"), KeyboardInterrupt(), OSError("x")):
        with pytest.raises(type(error)), replacing(path) as scratch:
            _fail_half_way(scratch, error)
    assert [one.name for one in tmp_path.iterdir()] == ["a.json"]
    assert path.read_text() == "old"


def test_a_full_disk_is_named(tmp_path: Path) -> None:
    for error in (OSError(errno.ENOSPC, "No space left on device"), OSError("short write")):
        with pytest.raises(OSError, match=str(tmp_path / "a.json")) as caught, replacing(tmp_path / "a.json"):
            raise error
        assert caught.value.errno == error.errno
    other = FileNotFoundError(errno.ENOENT, "No such file", "other")
    with pytest.raises(FileNotFoundError, match="other"), replacing(tmp_path / "a.json"):
        raise other


def test_there_is_one_way_to_replace_a_file() -> None:
    """No temporary name that can be guessed: nothing else in the package renames over a file."""
    found = subprocess.run(
        ["grep", "-rlE", r"os\.replace|os\.rename|\.writing", "--include=*.py", *AREAS],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert set(found.stdout.split()) == {"app/atomic_write.py", "app/score_cache.py"}
