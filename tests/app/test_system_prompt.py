"""A system prompt stands before video and question in every command, or is refused."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from batch_runs import arguments, results
from cli_runs import run_arguments
from eval_runs import OPTIONS, STRENGTHS, run
from tiny_models_checkpoint import save_checkpoint

import videoanchor_triton as va
from videoanchor_triton.app import cli, demo, pipeline
from videoanchor_triton.app.batch.rows import read_rows
from videoanchor_triton.app.evaluation.protocol import compare_protocols
from videoanchor_triton.app.evaluation.readers.result import Result
from videoanchor_triton.app.prompt import build_inputs
from videoanchor_triton.app.text import asked
from videoanchor_triton.app.video.reader import VideoClip, read_video
from videoanchor_triton.app.viz import prefill
from videoanchor_triton.app.viz.finished_run import read_run
from videoanchor_triton.integrations.errors import InputError

SYSTEM = "word11 word12"
CONFIG = va.VideoAnchorConfig(alpha_k=2, alpha_v=1, scorer="kmeans", n_clusters=3, pca_rank=8)


def clip() -> VideoClip:
    frames = np.random.default_rng(0).integers(0, 255, (4, 56, 84, 3), dtype=np.uint8)
    return VideoClip(frames, np.arange(4) / 2, np.arange(4), 4, 2.0)


@pytest.fixture(scope="module", params=["qwen2_5_vl", "internvl", "llava_onevision"])
def loaded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    folder = tmp_path_factory.mktemp("checkpoint")
    if request.param == "qwen2_5_vl":
        demo.make_checkpoint(folder)
    else:
        save_checkpoint(request.param, folder)
    return pipeline.load(str(folder), "cpu")


def test_it_stands_before_the_video(loaded: tuple[Any, Any]) -> None:
    model, processor = loaded
    ids = [build_inputs(processor, model.config, clip(), asked("word5", one))[0]["input_ids"][0].tolist()
           for one in (None, SYSTEM)]  # fmt: skip
    words = processor.tokenizer(SYSTEM, add_special_tokens=False)["input_ids"]
    places = [n for n in range(len(ids[1])) if ids[1][n : n + len(words)] == words]
    assert len(places) == 1
    first_visual = next(n for n in range(len(ids[1])) if ids[1][n] == max(set(ids[1]), key=ids[1].count))
    assert places[0] < first_visual
    assert len(ids[1]) >= len(ids[0]) + len(words)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for m in messages if m['role'] == 'user' %} <video> {% endfor %}", "takes no system prompt"),
        ("{{ raise_exception('System role not supported') }}", "refuses the messages: System role not supported"),
    ],
)
def test_a_template_without_one_is_refused(tmp_path: Path, template: str, message: str) -> None:
    save_checkpoint("internvl", tmp_path)
    model, processor = pipeline.load(str(tmp_path), "cpu")
    processor.chat_template = template
    with pytest.raises(InputError, match=message):
        build_inputs(processor, model.config, clip(), asked("word5", SYSTEM))


def test_run_and_its_pictures(demo: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, options in (("with", ("--system", SYSTEM)), ("without", ())):
        assert cli.main(run_arguments(demo[0], tmp_path / name, *options)) == 0
    found, plain = (json.loads((tmp_path / name / "result.json").read_text()) for name in ("with", "without"))
    assert (found["system"], plain["system"]) == (SYSTEM, None)
    assert found["tokens"]["prompt"] > plain["tokens"]["prompt"]
    assert found["budget"]["n_prompt_tokens"] == found["tokens"]["prompt"]
    assert SYSTEM in (tmp_path / "with" / "viz.html").read_text()
    seen, prepare = [], pipeline.prepare

    def spied(*given: Any) -> Any:
        seen.append(given[3])
        return prepare(*given)

    monkeypatch.setattr(pipeline, "prepare", spied)
    model, processor = pipeline.load(str(demo[0] / "checkpoint"), "cpu")
    video = read_video(demo[0] / "clip.mp4", max_frames=2)
    prefill.prefill(model, processor, video, read_run(tmp_path / "with"), with_shares=False)
    assert seen == [asked("?", SYSTEM)]


@pytest.mark.parametrize("command", ["run", "batch", "eval", "tune"])
def test_an_empty_one_is_refused(
    command: str, demo: tuple[Path, str], job: Path, clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(pipeline, "load", lambda *_: pytest.fail("loads"))
    if command == "run":
        code = cli.main(run_arguments(demo[0], tmp_path, "--system", " "))
    elif command == "batch":
        code = cli.main(arguments(job, tmp_path, "--system", " "))
    else:
        code = run(command, clips, tmp_path, *(STRENGTHS if command == "eval" else ()), "--system", " ")
    assert code == 2
    assert "the system prompt is empty" in capsys.readouterr().err


def test_batch_takes_that_of_the_row_first(job: Path, tmp_path: Path) -> None:
    rows = [
        {"video": "clips/a.mp4", "question": "word5 word6"},
        {"video": "clips/a.mp4", "question": "word5 word6", "system": "word20 word21 word22"},
        {"video": "clips/a.mp4", "question": "word7", "system": ""},
    ]
    (job / "systems.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = [str(job / "systems.jsonl") if one.endswith("questions.jsonl") else one for one in
               arguments(job, tmp_path / "out", "--system", SYSTEM)]  # fmt: skip
    assert cli.main(command) == 0
    found = sorted(results(tmp_path / "out"), key=lambda one: one["line"])
    assert [one["system"] for one in found] == [SYSTEM, "word20 word21 word22", SYSTEM]
    assert [one["input"] for one in found] == [{}, {}, {}]
    assert len({one["key"] for one in found}) == 3
    model, processor = pipeline.load(str(job / "checkpoint"), "cpu")
    video = read_video(job / "clips" / "a.mp4", max_frames=4)
    for one in found:
        alone = pipeline.answer(
            model, processor, video, asked(one["question"], one["system"]), CONFIG, max_new_tokens=3
        )
        assert (one["answer"], one["tokens"]["prompt"]) == (alone.text, alone.n_prompt_tokens)
    before = (tmp_path / "out" / "results.jsonl").read_bytes()
    assert cli.main(command) == 0
    assert (tmp_path / "out" / "results.jsonl").read_bytes() == before
    assert cli.main([*command, "--system", "word30"]) == 0
    found = [one for one in results(tmp_path / "out") if one["line"] is not None]
    assert sorted(one["system"] for one in found) == ["word20 word21 word22", "word30", "word30"]


def test_a_system_prompt_that_is_no_text_names_its_line(tmp_path: Path) -> None:
    (tmp_path / "q.jsonl").write_text('{"video": "a.mp4", "question": "?", "system": 3}\n')
    with pytest.raises(InputError, match="line 1: system: expected text, got 3"):
        read_rows(tmp_path / "q.jsonl")


def test_eval_and_its_card(clips: Path, tmp_path: Path) -> None:
    prompts = {}
    for name, options in (("with", ("--system", SYSTEM)), ("without", ())):
        assert run("eval", clips, tmp_path, *OPTIONS, *STRENGTHS, *options) == 0
        record = json.loads((tmp_path / "eval.json").read_text())
        prompts[name] = record["card"]["prompt"]
        assert {one["system"] for one in record["answered"]} == {SYSTEM if options else None}
    replies = [json.loads(line) for line in (tmp_path / "replies.jsonl").read_text().splitlines()]
    assert [one["system"] for one in replies] == [SYSTEM] * 8 + [None] * 8
    assert len({one["key"] for one in replies}) == 16
    assert (prompts["with"]["systems"], prompts["without"]["systems"]) == ([SYSTEM], [])
    assert len([*tmp_path.glob("eval-*.md")]) == 2
    one, other = (Result("file", "eval", "its own", {}, {"prompt": prompts[name]}) for name in ("with", "without"))
    assert {"what": "prompt.systems", "a": [SYSTEM], "b": []} in compare_protocols(one, other).flags
