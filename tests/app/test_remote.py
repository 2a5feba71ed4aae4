"""Videos by URL: fetched once, checked, named without secrets, in every command that reads videos."""

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from batch_runs import arguments, results
from cli_runs import run_arguments
from eval_runs import OPTIONS, STRENGTHS, run

from videoanchor_triton.app import cli
from videoanchor_triton.app.batch.matching import fingerprint
from videoanchor_triton.app.batch.rows import BatchRow
from videoanchor_triton.app.video import remote
from videoanchor_triton.app.video.reader import read_video, write_video
from videoanchor_triton.app.video.remote import located, sha256_of, shown_url, url_fingerprint
from videoanchor_triton.integrations.errors import InputError


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("VIDEOANCHOR_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


class Site:
    """A web server: `files` by path, `headers` of all answers, what was `asked`, `cut` bytes that answers lack."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.headers: dict[str, str] = {}
        self.asked: list[tuple[str, str]] = []
        self.cut, self.sized = 0, True
        site = self

        class Handler(BaseHTTPRequestHandler):
            def do_HEAD(self) -> None:
                site.asked.append((self.command, self.path))
                content = site.files.get(self.path.partition("?")[0])
                self.send_response(404 if content is None else 200)
                for name, value in site.headers.items():
                    self.send_header(name, value)
                if site.sized:
                    self.send_header("Content-Length", str(len(content or b"")))
                self.end_headers()
                if content is not None and self.command == "GET":
                    self.wfile.write(content[: len(content) - site.cut])

            do_GET = do_HEAD  # noqa: N815

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def downloads(self) -> int:
        return sum(method == "GET" for method, _ in self.asked)


@pytest.fixture
def site() -> Iterator[Site]:
    found = Site()
    found.files["/a.mp4"], found.headers["ETag"] = b"first" * 1000, '"1"'
    yield found
    found.server.shutdown()


def test_a_file_is_fetched_once_for_each_content(site: Site) -> None:
    url = f"{site.url}/a.mp4"
    seen: list[tuple[str, int, int]] = []
    path = located(url, progress=lambda *said: seen.append(said))
    assert (path.name, path.read_bytes()) == ("a.mp4", site.files["/a.mp4"])
    assert sha256_of(url) == hashlib.sha256(site.files["/a.mp4"]).hexdigest()
    assert seen == [("fetch", 0, 0)]
    assert located(url) == path
    assert site.downloads() == 1
    before = url_fingerprint(url)
    site.files["/a.mp4"], site.headers["ETag"] = b"other" * 1000, '"2"'  # as large as before
    assert located(url).read_bytes() == b"other" * 1000
    assert site.downloads() == 2
    assert before != url_fingerprint(url) == fingerprint(url)  # pyright: ignore[reportArgumentType]
    path.write_bytes(b"cut")  # by whoever
    assert located(url).read_bytes() == b"other" * 1000


def test_a_server_that_tells_nothing_of_its_files_is_asked_each_time(site: Site) -> None:
    site.headers, site.sized = {}, False
    url = f"{site.url}/a.mp4"
    for n in (1, 2):
        assert located(url).read_bytes() == site.files["/a.mp4"]
        assert site.downloads() >= n
    assert url_fingerprint(url) is None
    with pytest.raises(InputError, match=r"a.mp4: more than .* GiB: raise --max-download"):
        located(url, max_download=4999)


def test_what_is_not_what_was_promised_is_not_kept(site: Site, cache: Path) -> None:
    url = f"{site.url}/a.mp4"
    with pytest.raises(InputError, match=r"more than .* GiB: raise --max-download"):
        located(url, max_download=4999)
    assert site.downloads() == 0
    site.cut = 1
    with pytest.raises(InputError, match=r"a.mp4: (the download failed after|4,999 bytes came of 5,000)"):
        located(url)
    site.cut, site.headers["Content-MD5"] = 0, base64.b64encode(bytes(16)).decode()
    with pytest.raises(InputError, match=r"its md5 is .*, the server says 0000"):
        located(url)
    assert not [path for path in cache.rglob("*") if path.is_file()]
    site.headers["Content-MD5"] = base64.b64encode(hashlib.md5(site.files["/a.mp4"]).digest()).decode()
    assert located(url).read_bytes() == site.files["/a.mp4"]


def test_processes_at_once_leave_a_whole_file(site: Site) -> None:
    with ThreadPoolExecutor(6) as pool:
        paths = {*pool.map(located, [f"{site.url}/a.mp4"] * 6)}
    assert [path.read_bytes() for path in paths] == [site.files["/a.mp4"]]


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("{site}/gone.mp4", "gone.mp4: not found"),
        ("http://127.0.0.1:1/a.mp4", "a.mp4: not found: Cannot connect to host"),
        ("nope://a/b.mp4", "nope://a/b.mp4: fsspec knows no such protocol"),
    ],
)
def test_what_cannot_be_read_is_one_sentence(site: Site, url: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        located(url.format(site=site.url))
    assert "\n" not in str(caught.value)


def test_a_package_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(_: str) -> Any:
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr("fsspec.core.url_to_fs", missing)
    with pytest.raises(InputError, match=r"Install s3fs to access S3: pip install 'videoanchor-triton\[remote\]'"):
        located("s3://bucket/a.mp4")


def test_a_copy_is_named_where_the_server_is_gone(site: Site) -> None:
    url = f"{site.url}/a.mp4"
    path = located(url)
    del site.files["/a.mp4"]
    fsspec.filesystem("http").invalidate_cache()
    with pytest.raises(InputError, match=f"not found.*; a copy of before is {path}: give that path"):
        located(url)


def test_names_tell_nothing_that_is_private() -> None:
    url = "https://me:secret@host/a/b.mp4?X-Signature=secret#t=3"
    assert shown_url(url).startswith("https://host/a/b.mp4?")
    assert "secret" not in shown_url(url) + str(remote._target(url))
    assert shown_url(url) != shown_url(url.replace("t=3", "t=4")) != shown_url(url.replace("X-S", "Y-S"))
    assert shown_url("s3://bucket/b.mp4") == "s3://bucket/b.mp4"
    assert shown_url("zip://b.mp4::https://me:secret@host/a.zip") == "zip://b.mp4::https://host/a.zip"
    rows = [BatchRow(1, one, "?") for one in (url, url.replace("me:secret@", ""))]
    assert rows[0].key("") == rows[1].key("")


@pytest.fixture
def clip(site: Site, tmp_path: Path) -> Path:
    frames = np.random.default_rng(0).integers(0, 255, (8, 32, 48, 3), dtype=np.uint8)
    write_video(tmp_path / "b.mp4", frames, fps=4)
    site.files["/b.mp4"] = (tmp_path / "b.mp4").read_bytes()
    return tmp_path / "b.mp4"


def test_a_clip_is_that_of_the_file(site: Site, clip: Path) -> None:
    memory = fsspec.filesystem("memory")
    memory.pipe("/in memory/b.mp4", clip.read_bytes())
    expected = read_video(clip, max_frames=3)
    for url in (f"{site.url}/b.mp4", "memory://in memory/b.mp4", clip.as_uri()):
        assert np.array_equal(read_video(url, max_frames=3).frames, expected.frames)
    with pytest.raises(InputError, match="raise --max-download"):
        read_video(f"{site.url}/b.mp4?again", max_download=10)


def test_run_and_viz(demo: tuple[Path, str], site: Site, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    site.files["/clip.mp4"] = (demo[0] / "clip.mp4").read_bytes()
    url = f"{site.url}/clip.mp4"
    options = ("--video", url.replace("http://", "http://me:secret@"))
    assert cli.main(run_arguments(demo[0], tmp_path / "out", *options)) == 0
    assert cli.main(run_arguments(demo[0], tmp_path / "file")) == 0
    found, expected = (json.loads((tmp_path / name / "result.json").read_text()) for name in ("out", "file"))
    assert (found["video"], expected["sha256"]) == (url, None)
    assert found["sha256"] == hashlib.sha256(site.files["/clip.mp4"]).hexdigest()
    assert found["answer"] == expected["answer"]
    assert found["sha256"] in (tmp_path / "out" / "viz.html").read_text()
    assert cli.main(["viz", str(tmp_path / "out"), "--what", "sheet"]) == 0
    (tmp_path / "out" / "viz" / "anchors.png").unlink()
    content = site.files["/clip.mp4"]
    site.files["/clip.mp4"], site.headers["ETag"] = b"another", '"2"'
    assert cli.main(["viz", str(tmp_path / "out"), "--what", "sheet"]) == 2
    site.files["/clip.mp4"] = content
    shown = capsys.readouterr()
    assert f"the video at {url} is not the one of this run: give --video FILE" in shown.err
    assert "secret" not in shown.out + shown.err
    assert not [path for path in (tmp_path / "out").rglob("*") if path.is_file() and b"secret" in path.read_bytes()]
    assert cli.main(run_arguments(demo[0], tmp_path / "small", "--video", f"{url}?2", "--max-download", "0.00001")) == 2
    assert "raise --max-download" in capsys.readouterr().err


def test_batch(job: Path, site: Site, clip: Path, tmp_path: Path) -> None:
    rows = [{"video": f"{site.url}/{name}.mp4", "question": "word5"} for name in ("b", "gone")]
    (job / "urls.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = [str(job / "urls.jsonl") if one.endswith("questions.jsonl") else one for one in
               arguments(job, tmp_path / "out")]  # fmt: skip
    assert cli.main(command) == 1
    done, failed = sorted(results(tmp_path / "out"), key=lambda one: one["line"])
    assert (done["video"], done["sha256"]) == (f"{site.url}/b.mp4", hashlib.sha256(clip.read_bytes()).hexdigest())
    assert (failed["status"], failed["failure"]) == ("failed", "input")
    assert "gone.mp4: not found" in failed["reason"]
    site.headers["ETag"] = '"2"'  # another content, by its own account
    assert cli.main(command) == 1
    again = [one for one in results(tmp_path / "out") if one["status"] == "done"]
    assert again[-1]["fingerprint"] != done["fingerprint"]


def test_eval(clips: Path, site: Site, tmp_path: Path) -> None:
    folder = tmp_path / "questions"
    folder.mkdir()
    (folder / "checkpoint").symlink_to(clips / "checkpoint")
    rows = [json.loads(line) for line in (clips / "questions.jsonl").read_text().splitlines()]
    for row in rows:
        site.files[f"/{row['video']}"] = (clips / row["video"]).read_bytes()
        row["video"] = f"{site.url}/{row['video']}"
    (folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert run("eval", folder, tmp_path / "out", *OPTIONS, *STRENGTHS) == 0
    assert run("eval", clips, tmp_path / "files", *OPTIONS, *STRENGTHS) == 0
    found, expected = (json.loads((tmp_path / name / "eval.json").read_text()) for name in ("out", "files"))
    for name in ("mean", "baseline", "n", "n_videos", "unreadable"):
        assert [row[name] for row in found["results"]] == [row[name] for row in expected["results"]]
    assert {one["video"] for one in found["answered"]} == {f"{site.url}/{n}.mp4" for n in range(2)}
