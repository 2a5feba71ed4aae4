"""The protocol card of an evaluation, where it stands, and `videoanchor compare` on what `eval` has left."""

import csv
import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from eval_runs import STRENGTHS, run

from videoanchor_triton.app import cli
from videoanchor_triton.app.evaluation.card import checkpoint_card
from videoanchor_triton.app.evaluation.readers.reading import read_result
from videoanchor_triton.app.evaluation.wording import PLAIN
from videoanchor_triton.integrations.errors import InputError

OPTIONS = (*STRENGTHS, "--scorer", "kmeans", "--json")


@pytest.fixture(scope="module")
def evaluated(clips: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An evaluation of two frames, and one of four in a folder of its own."""
    folder = tmp_path_factory.mktemp("evaluated")
    for name, options in (("two", ()), ("four", ("--max-frames", "4", "--max-new-tokens", "2"))):
        assert run("eval", clips, folder / name, *OPTIONS, *options) == 0
    return folder


def card_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "eval.json").read_text())["card"]


def test_the_card_says_what_the_numbers_depend_on(clips: Path, evaluated: Path) -> None:
    card = card_of(evaluated / "two")
    sha256 = hashlib.sha256((clips / "questions.jsonl").read_bytes()).hexdigest()
    assert (card["model"], card["revision"], card["device"]) == (str(clips / "checkpoint"), None, "cpu")
    assert card["questions"] == {"file": str(clips / "questions.jsonl"), "sha256": sha256, "n": 4, "n_videos": 2}
    templates = sorted(PLAIN.values())
    prompts = hashlib.sha256(json.dumps(templates).encode()).hexdigest()
    assert card["prompt"] == {"asked": "auto", "templates": templates, "sha256": prompts, "systems": []}
    template = json.loads((clips / "checkpoint" / "tokenizer_config.json").read_text()).get("chat_template")
    if template is None:
        template = (clips / "checkpoint" / "chat_template.jinja").read_text()
    assert card["chat_template_sha256"] == hashlib.sha256(template.encode()).hexdigest()
    assert card["frames"] == {"fps": None, "sampling": "uniform", "fit": False, "strict": False}
    assert card["resolution"]["max_frame_pixels"] == 2**24
    assert card["resolution"]["processor_size"]["longest_edge"] > 0
    assert card["generation"]["max_new_tokens"] == 1
    assert card["seeds"] == {"bootstrap": 0}
    assert {"torch", "transformers", "videoanchor-triton"} <= card["versions"].keys()
    assert {name: (one["max_frames"], one["alpha_k"]) for name, one in card["settings"].items()} == {
        "baseline, 2 frames": (2, 0.0),
        "gate": (2, 400.0),
    }


def test_the_same_card_stands_in_each_file(evaluated: Path) -> None:
    card, text = card_of(evaluated / "two"), (evaluated / "two" / "eval.md").read_text()
    with (evaluated / "two" / "eval.csv").open(newline="") as file:
        row = next(csv.DictReader(file))
    for fact in (card["prompt"]["sha256"], card["chat_template_sha256"], card["class"]):
        assert fact in text
        assert fact in row.values()
    assert PLAIN["choice"].replace("\n", "\\n") in text
    for name in ("resolution", "generation", "seeds", "frames", "versions"):
        assert json.loads(row[name]) == card[name]
    for number in ("max_frame_pixels 16777216", "max_new_tokens 1", "bootstrap 0"):
        assert number in text


def test_another_prompt_or_processor_is_another_card() -> None:
    class Processor:
        chat_template = "{{ messages }}"
        size = 100

        def to_dict(self) -> dict[str, Any]:
            return {"size": {"longest_edge": self.size}, "image_mean": [0.5]}

    class Model:
        class generation_config:  # noqa: N801
            @staticmethod
            def to_dict() -> dict[str, Any]:
                return {"repetition_penalty": 1.05, "temperature": 0.1}

    processor: Any = Processor()
    processor.video_processor = Processor()
    first = checkpoint_card(Model(), processor, 9, 16)
    assert first["resolution"] == {"max_frame_pixels": 9, "processor_size": {"longest_edge": 100}}
    assert first["generation"] == {"max_new_tokens": 16, "do_sample": False, "repetition_penalty": 1.05}
    processor.video_processor.size, processor.chat_template = 50, "{{ message }}"
    second = checkpoint_card(Model(), processor, 9, 16)
    assert second["resolution"] != first["resolution"]
    assert second["chat_template_sha256"] != first["chat_template_sha256"]


def test_eval_holds_each_reply(evaluated: Path) -> None:
    record = json.loads((evaluated / "two" / "eval.json").read_text())
    log = [json.loads(line) for line in (evaluated / "two" / "replies.jsonl").read_text().splitlines()]
    said = {(one["id"], one["setting"]): (one["reply"], one["score"]) for one in log}
    found = {
        (question["id"], name): (reply["reply"], reply["score"])
        for question in record["answered"]
        for name, reply in question["replies"].items()
    }
    assert found == said


def compared(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, Any]:
    capsys.readouterr()
    assert cli.main(["compare", *map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_compare_says_what_eval_says(evaluated: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The baseline and the gate of one evaluation: the rows of its own table, and no protocol that differs."""
    two = evaluated / "two"
    record = compared(capsys, two, two / "eval.json", "--setting-a", "baseline, 2 frames")
    assert (record["flags"], record["unchecked"]) == ([], [])
    assert {"what": "gate.alpha_k", "a": 0.0, "b": 400.0} in record["others"]
    own = json.loads((two / "eval.json").read_text())["results"]
    for mine, theirs in zip(record["table"], own, strict=True):
        assert [mine[name] for name in ("type", "n", "n_videos", "a", "b", "difference", "low", "high")] == [
            theirs[name] for name in ("type", "n", "n_videos", "baseline", "mean", "difference", "low", "high")
        ]
    tagged = next(two.glob("eval-*.json"))
    assert compared(capsys, tagged, two)["table"][0]["n_changed"] == 0


def test_other_frames_are_found(evaluated: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = compared(capsys, evaluated / "two", evaluated / "four")
    assert [(flag["what"], flag["a"], flag["b"]) for flag in record["flags"]] == [
        ("frames.max_frames", 2, 4),
        ("generation.max_new_tokens", 1, 2),
    ]


def test_settings_that_are_not_there(evaluated: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no setting 'x': give one of 'baseline, 2 frames', 'gate'"):
        read_result(evaluated / "two", "x")
    record = json.loads((evaluated / "two" / "eval.json").read_text())
    del record["answered"]
    (tmp_path / "eval.json").write_text(json.dumps(record))
    with pytest.raises(InputError, match="of a version that kept no replies"):
        read_result(tmp_path)
