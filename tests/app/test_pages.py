"""eval.html and compare.html: what is on them, and what a hostile name cannot do there."""

import json
import re
from base64 import b64decode, b64encode
from html.parser import HTMLParser
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browser import chromium, needs_browser
from compare_files import write_lines
from eval_runs import STRENGTHS, run
from hostile_texts import HOSTILE
from PIL import Image

from videoanchor_triton.app import cli, pipeline
from videoanchor_triton.app.evaluation import page, thumbnails
from videoanchor_triton.app.evaluation.comparison_page import comparison_page
from videoanchor_triton.app.evaluation.eval_page import eval_page
from videoanchor_triton.app.evaluation.head_to_head import head_to_head
from videoanchor_triton.app.evaluation.readers.result import Answered, Result
from videoanchor_triton.app.evaluation.thumbnails import Thumbnails
from videoanchor_triton.app.pages import html
from videoanchor_triton.app.video.reader import VideoClip, read_video
from videoanchor_triton.integrations.errors import InputError

TAGS = {
    *("html", "head", "meta", "title", "style", "body", "header", "section", "h1", "h2", "p", "br", "div", "strong"),
    *("ul", "li", "table", "caption", "thead", "tbody", "tr", "th", "td", "details", "summary", "span", "pre"),
    *("svg", "line", "circle", "img"),
}
ATTRIBUTES = {
    *("lang", "charset", "name", "content", "http-equiv", "class", "id", "role", "tabindex", "aria-label", "scope"),
    *("open", "width", "height", "x1", "x2", "y1", "y2", "cx", "cy", "r", "src", "alt"),
}
VOID = {"meta", "br", "line", "circle", "img"}


class Parsed(HTMLParser):
    """Tags, attributes and text of a page that a browser need not mend."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: set[str] = set()
        self.text, self.ids = "", []
        self.sources: list[str] = []
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert not self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes |= {name for name, _ in attrs}
        self.sources += [value or "" for name, value in attrs if name == "src"]
        self.ids += [value for name, value in attrs if name == "id"]
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def checked(text: str) -> Parsed:
    """No script, no request, nothing that was not meant to be there."""
    found = Parsed(text)
    assert set(found.tags) <= TAGS
    assert found.attributes <= ATTRIBUTES
    assert len(found.ids) == len({*found.ids})
    assert (found.tags.count("title"), found.tags.count("style"), found.tags.count("h1")) == (1, 1, 1)
    assert "default-src 'none'" in text
    assert all(source.startswith("data:image/webp;base64,") for source in found.sources)
    assert not re.search(r"url\(|@import", text)
    text.encode()
    return found


def hostile_result(seed: int) -> Result:
    """Each of the hostile texts as id, video, type, question, option, answer, reply, error, and in the card."""
    rng, rows = np.random.default_rng(seed), {}
    for n in range(4 * len(HOSTILE)):
        text = HOSTILE[n % len(HOSTILE)]
        fails = rng.random() < 0.2
        rows[f"{text}{n}"] = Answered(
            id=f"{text}{n}",
            score=None if fails else float(rng.integers(0, 2)),
            **{"video": text, "type": text, "question": text, "options": (text, "other"), "answer": text},
            **{
                "prompt": f"{text}{seed}",
                "reply": text,
                "read": "" if n % 3 else text,
                "error": text if fails else None,
            },
        )
    card = {"model": HOSTILE[0], HOSTILE[1]: HOSTILE[2], "frames": {HOSTILE[3]: seed}, "seeds": {HOSTILE[4]: HOSTILE}}
    return Result(HOSTILE[5], HOSTILE[seed], f"{HOSTILE[6]}{seed}", rows, card, HOSTILE[7])


def hostile_page() -> str:
    record = head_to_head(hostile_result(0), hostile_result(1))
    return comparison_page({**record, "date": HOSTILE[0], "version": HOSTILE[1]})


def test_hostile_names_are_text_in_a_comparison() -> None:
    found = checked(hostile_page())
    for text in HOSTILE[:8]:
        assert text in found.text
    for text in ("\x1b", "\x00", "\u202e", "\ud800"):
        assert text not in found.text
    assert r"\x1b[31m\x00\u202egnp.exe" in found.text


@needs_browser
def test_hostile_names_run_nothing_in_a_browser(tmp_path: Path) -> None:
    """Nor do they without the page's policy, which would stop them by itself."""
    text = hostile_page()
    title = re.search("<title>.*?</title>", text, re.DOTALL)
    assert title is not None
    (tmp_path / "compare.html").write_text(re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", text))
    (tmp_path / "owned.html").write_text(f"<title>before</title>{HOSTILE[0]}")
    for name, expected in (("compare.html", title[0]), ("owned.html", "<title>owned</title>")):
        assert expected in chromium(tmp_path / name, "--dump-dom").stdout, "the check can fail"


def test_the_page_of_a_comparison(tmp_path: Path) -> None:
    rows = [
        {"id": n, "video": f"/data/set/{n // 2}.mp4", "type": "ab"[n % 2], "question": f"Where is {n}?", "answer": "A"}
        for n in range(8)
    ]
    a = [{**row, "prediction": "AB"[n % 2], "prompt": "?"} for n, row in enumerate(rows)]
    b = [{**row, "prediction": "BA"[n % 2] if n < 7 else "zzz word", "prompt": "!"} for n, row in enumerate(rows)]
    write_lines(tmp_path / "a.jsonl", {"card": {"frames": {"max_frames": 8}}}, *a)
    write_lines(tmp_path / "b.jsonl", {"card": {"frames": {"max_frames": 9}, "model": "m"}}, *b)
    arguments = ["compare", str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl"), "--out", str(tmp_path / "out")]
    assert cli.main(arguments) == 0
    found = checked((tmp_path / "out" / "compare.html").read_text(encoding="utf-8"))
    for text in (
        "The protocols differ",
        "frames.max_frames: 8 in A, 9 in B",
        "prompt of 8 of 8 questions: ? in A, ! in B",
        "B higher in 3, A in 4",
        "Right answer: A",
        "score 0, read as B",
        "Videos: 4,",
        "Replies: 1",
        "resolution: neither card says it",
        "not said",
    ):
        assert text in found.text
    assert "/data/set/" not in found.text.replace(str(tmp_path), ""), "the folder that all share"
    assert found.tags.count("svg") == 4
    assert found.ids == ["table", "flipped", "videos", "unreadable", "cards"]


def test_the_page_of_an_evaluation(
    clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A gate that answers otherwise than its baseline, a reply that nobody can read, and one that failed."""

    def answer(*arguments: Any, **_: Any) -> Any:
        prompt, config = arguments[3], arguments[4]
        if "How many" in prompt and not config.alpha_k:
            raise InputError("no <such> frame")
        return type("Answer", (), {"text": "A" if config.alpha_k else "neither <b> of them"})

    monkeypatch.setattr(pipeline, "answer", answer)
    assert run("eval", clips, tmp_path, *STRENGTHS, "--ablate", "terms=K") == 1
    assert f"wrote     {tmp_path / 'eval.html'}" in capsys.readouterr().out
    text = (tmp_path / "eval.html").read_text(encoding="utf-8")
    record = json.loads((tmp_path / "eval.json").read_text())
    assert (tmp_path / f"eval-{record['tag']}.html").read_text(encoding="utf-8") == text
    found = checked(text)
    for shown in (
        "gate, against baseline, 2 frames",
        "terms K, against baseline, 2 frames",
        "2 replies failed and are left out",
        "no <such> frame",
        "with gate higher in 1, without in 0",
        "score 0, no answer could be read from it",
        "neither <b> of them",
        "Videos: 2,",
        record["card"]["prompt"]["sha256"],
        record["card"]["questions"]["sha256"],
        "processor_size",
    ):
        assert shown in found.text
    assert "frames of a video.\nLeft?" not in found.text
    assert len(found.sources) == 2, "the frames of each question that flipped, in each setting"
    clip = read_video(clips / "0.mp4", max_frames=2)
    with Image.open(BytesIO(b64decode(found.sources[0].split(",")[1]))) as strip:
        assert strip.size == (2 * 90 + 4, 70)
        halves = np.split(np.delete(np.asarray(strip).astype(float), np.s_[90:94], 1), 2, 1)
    assert np.abs(np.stack(halves) - clip.frames).mean() < 20
    monkeypatch.setattr(thumbnails, "_MOST_CHARACTERS", len(found.sources[0]))
    assert run("eval", clips, tmp_path, *STRENGTHS, "--ablate", "terms=K") == 1, "answered, but for what failed"
    again = checked((tmp_path / "eval.html").read_text(encoding="utf-8"))
    assert again.sources == found.sources[:1]
    assert "the frames of 1 are left out" in again.text


def test_a_comparison_shows_the_frames_of_an_evaluation(clips: Path, tmp_path: Path) -> None:
    out, compared = tmp_path / "eval", tmp_path / "compared"
    assert run("eval", clips, out, *STRENGTHS) == 0
    strips = {b64encode(path.read_bytes()).decode() for path in (out / "frames").iterdir()}
    evaluation = json.loads((out / "eval.json").read_text())
    for question, score in zip(evaluation["answered"], (0.0, 1.0, 0.0, 1.0), strict=True):
        question["replies"]["gate"]["score"] = score
        question["replies"]["baseline, 2 frames"]["score"] = 0.5
    (out / "eval.json").write_text(json.dumps(evaluation))
    command = ["compare", out, out, "--setting-a", "baseline, 2 frames", "--out", compared]
    assert cli.main([*map(str, command)]) == 0
    record = json.loads((compared / "compare.json").read_text())
    assert all(Path(flip["frames"]).parent == out / "frames" for flip in record["flipped"])
    found = checked((compared / "compare.html").read_text(encoding="utf-8"))
    assert [source.split(",")[1] in strips for source in found.sources] == [True] * 4
    (tmp_path / "other.webp").write_bytes(next((out / "frames").iterdir()).read_bytes())
    (out / "frames" / "text.webp").write_text("no picture")
    for name in ("../../other.webp", str(tmp_path / "other.webp"), "text.webp", "gone.webp"):  # as somebody may send it
        text = (out / "eval.json").read_text()
        (out / "eval.json").write_text(re.sub(r'("frames": )"[^"]*"', rf"\1{json.dumps(name)}", text))
        assert cli.main([*map(str, command)]) == 0
        assert not checked((compared / "compare.html").read_text(encoding="utf-8")).sources


def test_some_frames_of_each_of_many_videos(tmp_path: Path) -> None:
    frames = [np.full((3, 50, 90, 3), 6 * n, dtype=np.uint8) for n in range(40)]
    clips = [VideoClip(some, np.arange(3.0), np.arange(3), 3, 1.0) for some in frames]
    kept = Thumbnails(tmp_path, {"fps": None, "sampling": "uniform", "max_pixels": 1})
    for n in (1, 3, 40):
        kept.keep("a.mp4", 8, clips[:n])
        (path,) = (tmp_path / "frames").iterdir()
        with Image.open(path) as strip:
            assert (strip.width + 4) / 94 == {1: 3, 3: 6, 40: 32}[n]


def test_an_evaluation_without_a_reply_has_a_page(clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise InputError(HOSTILE[0])

    monkeypatch.setattr(pipeline, "answer", fail)
    assert run("eval", clips, tmp_path, *STRENGTHS) == 1
    found = checked((tmp_path / "eval.html").read_text(encoding="utf-8"))
    assert "Nothing could be judged" in found.text
    assert HOSTILE[0] in found.text


def test_hostile_names_are_text_in_an_evaluation(clips: Path, tmp_path: Path) -> None:
    assert run("eval", clips, tmp_path, *STRENGTHS) == 0
    text = (tmp_path / "eval.json").read_text().replace('"gate"', json.dumps(HOSTILE[2]))  # the name of the setting
    record = json.loads(text)
    question = record["answered"][0]
    question |= {
        "id": HOSTILE[0],
        "video": HOSTILE[1],
        "type": HOSTILE[2],
        "question": HOSTILE[3],
        "options": [HOSTILE[4]],
    }
    question |= {"answer": HOSTILE[5], "prompt": HOSTILE[6]}
    for n, (name, score) in enumerate(((HOSTILE[2], 1.0), ("baseline, 2 frames", 0.0))):
        question["replies"][name] = {"reply": HOSTILE[7 + n], "read": HOSTILE[0], "score": score}
    record["card"]["model"] = record["stopped"] = HOSTILE[0]
    record["results"][0]["type"] = HOSTILE[1]
    record["failures"] = [{"id": HOSTILE[0], "setting": HOSTILE[1], "error": HOSTILE[2]}]
    found = checked(eval_page(record, str(tmp_path / "eval.json")))
    for text in HOSTILE[:6]:
        assert text in found.text


def test_data_for_a_script_cannot_end_its_block() -> None:
    text = html.page(HOSTILE[0], [], script="1 < 2", data=list(HOSTILE))
    (found,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', text)
    assert json.loads(found) == list(HOSTILE)
    assert text.count("<script") == text.count("</script") == 2
    assert "<!--" not in text


def test_long_lists_are_cut_and_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page, "MOST_ENTRIES", 3)
    found = checked(hostile_page())
    assert found.text.count("Right answer") == 3
    assert "the first 3 are here, all in the JSON" in found.text


def test_pictures_of_intervals() -> None:
    row = {"low": -0.1, "difference": 0.0, "high": 0.05}
    cell = page.interval_cell(row, page.reach_of([row]), False)
    x1, x2, cx = (float(found) for found in re.findall(r'(?:class="interval" x1|x2|cx)="([\d.]+)"', cell)[1:])
    assert (x1, x2, cx) == (3.5, 103.2, 70.0)
    assert page.reach_of([]) == 0.05


@pytest.mark.parametrize(
    ("names", "short"),
    [
        (["/a/b/c.mp4", "/a/b/d.mp4"], ["c.mp4", "d.mp4"]),
        (["/a/b/c.mp4", "/a/x/c.mp4"], ["b/c.mp4", "x/c.mp4"]),
        (["/a/b/c.mp4"], ["c.mp4"]),
        (["a", "a/b"], ["a", "a/b"]),
        ([], []),
    ],
)
def test_names_without_the_folders_that_all_share(names: list[str], short: list[str]) -> None:
    assert list(page.short_names(names).values()) == short


def test_the_page_of_a_result_that_says_little() -> None:
    rows = {"1": Answered("1", 1.0), "2": Answered("2", 0.0)}
    a = Result("a", "JSONL", "its own", rows)
    b = Result("b", "JSONL", "its own", {**rows, "2": Answered("2", 1.0)})
    found = checked(comparison_page({**head_to_head(a, b), "date": "", "version": ""}))
    for text in ("Neither result carries a card", "neither result names the videos", "its text is not known"):
        assert text in found.text


@needs_browser
def test_tables_fit_a_usual_window(clips: Path, tmp_path: Path) -> None:
    assert run("eval", clips, tmp_path, *STRENGTHS) == 0
    text = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", (tmp_path / "eval.html").read_text())
    row = "<td class='short'>nothing could be judged</td>"
    measure = (
        f'<script>document.querySelector("td.short").outerHTML = "{row}";'
        'document.body.append([...document.querySelectorAll(".scroll")].map(one => one.scrollWidth > one.clientWidth))'
        "</script></body>"
    )
    page = tmp_path / "wide.html"
    page.write_text(text.replace("</body>", measure), encoding="utf-8")
    (said,) = re.findall(
        r"((?:true|false)(?:,(?:true|false))*)\s*</body>", chromium(page, "--dump-dom", "--window-size=1280,900").stdout
    )
    assert "true" not in said
