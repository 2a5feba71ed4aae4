"""Two results against each other: what is refused, flagged and counted."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from compare_files import vsi_sample, write_lmms

from videoanchor_triton.app.evaluation.comparison_report import comparison_markdown, comparison_text
from videoanchor_triton.app.evaluation.head_to_head import head_to_head
from videoanchor_triton.app.evaluation.paired import ALL, MEAN_OF_TYPES, compare
from videoanchor_triton.app.evaluation.readers.reading import read_result
from videoanchor_triton.app.evaluation.readers.result import Answered, Result
from videoanchor_triton.integrations.errors import InputError

CARD = {
    "model": "m",
    "frames": {"max_frames": 32, "fps": None},
    "resolution": {"max_pixels": 12544},
    "prompt": {"template_sha256": "ab"},
    "generation": {"max_new_tokens": 16},
    "seeds": {"scores": 0},
}


def result(scores: Any, videos: Any = None, types: Any = None, card: Any = CARD, **more: Any) -> Result:
    rows = {
        str(n): Answered(
            id=str(n),
            score=None if score is None else float(score),
            video=None if videos is None else str(videos[n]),
            type="all" if types is None else str(types[n]),
            **{name: values[n] for name, values in more.items()},
        )
        for n, score in enumerate(scores)
    }
    return Result("file", "JSONL", "its own", rows, card)


def test_numbers_are_those_of_the_paired_bootstrap() -> None:
    rng = np.random.default_rng(0)
    before, after = rng.integers(0, 2, (2, 120))
    videos, types = np.arange(120) // 4, np.where(rng.random(120) < 0.3, "far", "near")
    record = head_to_head(result(before, videos, types), result(after, videos, types))
    found = {row["type"]: row for row in record["table"]}
    assert [*found] == [ALL, MEAN_OF_TYPES, "far", "near"]
    expected = compare(after, before, videos)
    row = found[ALL]
    assert (row["a"], row["b"], row["difference"]) == (expected.baseline, expected.mean, expected.difference)
    assert (row["low"], row["high"], row["n_videos"]) == (expected.low, expected.high, 30)
    by_type = compare(after, before, videos, types)
    assert (found[MEAN_OF_TYPES]["low"], found[MEAN_OF_TYPES]["mcnemar"]) == (by_type.low, None)
    far = types == "far"
    assert found["far"]["difference"] == compare(after[far], before[far], videos[far]).difference
    assert row["mcnemar"]["only_second"] == int(((after == 1) & (before == 0)).sum())
    assert len(record["flipped"]) == int((after != before).sum())
    differences = [abs(video["difference"]) for video in record["videos"]]
    assert differences == sorted(differences, reverse=True)
    assert sum(video["n"] for video in record["videos"]) == 120
    mirrored = head_to_head(result(after, videos, types), result(before, videos, types))["table"][0]
    assert mirrored["difference"] == -row["difference"]


@pytest.mark.parametrize(("gain", "verdict"), [(1, "B higher"), (-1, "A higher"), (0, "no difference shown")])
def test_verdicts(gain: int, verdict: str) -> None:
    before = np.full(20, 0.5)
    record = head_to_head(result(before, range(20)), result(before + 0.5 * gain, range(20)))
    assert record["table"][0]["verdict"] == verdict
    assert record["conclusion"].lower().startswith(verdict.lower())
    assert verdict in comparison_text(record)
    assert verdict in comparison_markdown(record)


@pytest.mark.parametrize(
    ("section", "name", "value"),
    [
        ("frames", "max_frames", 16),
        ("frames", "fps", 2.5),
        ("resolution", "max_pixels", 3136),
        ("prompt", "template_sha256", "cd"),
        ("generation", "max_new_tokens", 17),
        ("seeds", "scores", 1),
    ],
)
def test_protocols_that_differ_are_flagged_everywhere(section: str, name: str, value: Any) -> None:
    other = {**CARD, section: {**CARD[section], name: value}, "model": "n"}
    record = head_to_head(result([1, 0], "vw"), result([1, 1], "vw", card=other))
    assert record["flags"] == [{"what": f"{section}.{name}", "a": CARD[section][name], "b": value}]
    assert record["others"] == [{"what": "model", "a": "m", "b": "n"}]
    assert record["unchecked"] == []
    assert f"The protocols differ ({section}.{name})" in record["conclusion"]
    assert "THE PROTOCOLS DIFFER" in comparison_text(record)
    for text in (comparison_text(record), comparison_markdown(record)):
        assert f"{section}.{name}: {CARD[section][name]} in A, {value} in B" in text


def test_equal_protocols_are_not_flagged() -> None:
    other = {**CARD, "frames": {"max_frames": "32", "fps": None}, "date": "later"}
    record = head_to_head(result([1, 0], "vw"), result([1, 1], "vw", card=other))
    assert (record["flags"], record["others"], record["unchecked"], record["warnings"]) == ([], [], [], [])
    assert "differ (" not in record["conclusion"]
    assert "DIFFER" not in comparison_text(record)


def test_what_could_not_be_checked_is_said() -> None:
    without = head_to_head(result([1, 0], "vw"), result([1, 1], "vw", card={}))
    assert without["unchecked"][0] == "frames: the card of B does not say it"
    assert len(without["unchecked"]) == 5
    assert head_to_head(result([1], "v", card={}), result([1], "v"))["unchecked"][0].endswith("of A does not say it")
    neither = head_to_head(result([1, 0], "vw", card={}), result([1, 1], "vw", card={}))
    assert neither["unchecked"][4] == "seeds: neither card says it"
    partly = {**CARD, "frames": {"max_frames": 32, "sampling": "uniform"}}
    record = head_to_head(result([1, 0], "vw"), result([1, 1], "vw", card=partly))
    assert record["unchecked"] == [
        "frames.fps: only the card of A has it (None)",
        "frames.sampling: only the card of B has it (uniform)",
    ]
    for text in (comparison_text(record), comparison_markdown(record)):
        assert "frames.sampling: only the card of B" in text


def test_prompts_are_compared_themselves_where_both_have_them() -> None:
    """Then the card's word about them is not needed."""
    a = result([1, 0], "vw", prompt=["One?", "Two?"])
    record = head_to_head(a, result([1, 0], "vw", prompt=["One?", "Two? Answer briefly."], card={}))
    assert record["flags"] == [{"what": "prompt of 1 of 2 questions", "a": "Two?", "b": "Two? Answer briefly."}]
    assert not [line for line in record["unchecked"] if line.startswith("prompt")]
    assert head_to_head(a, a)["flags"] == []


def test_scores_by_other_rules_are_flagged() -> None:
    other = replace(result([1, 1], "vw"), scoring="lmms-eval's")
    assert head_to_head(result([1, 0], "vw"), other)["flags"] == [
        {"what": "scoring", "a": "its own", "b": "lmms-eval's"}
    ]


def test_other_questions_are_refused() -> None:
    a = result([1, 0, 1], "vvw")
    with pytest.raises(InputError, match="A has 1 that B lacks and B has 0 that A lacks, such as the id '2'"):
        head_to_head(a, result([1, 0], "vv"))
    for name, one, two in (
        ("question", "Where is it?", "Who is it?"),
        ("answer", "A", "B"),
        ("answer", "4", "5"),
        ("answer", "A", "4"),
        ("answer", "sofa", "lamp"),
    ):
        with pytest.raises(InputError, match=f"the {name} of the id '0' is .* in A and .* in B"):
            head_to_head(result([1], "v", **{name: [one]}), result([1], "v", **{name: [two]}))
    for name, one, two in (
        ("question", "Where  is it?", "where is it?"),
        ("question", "Where is it?", "Where is it? Options: A. here"),
        ("answer", "(A).", "a"),
        ("answer", "4", "4.0"),
        ("answer", "A", "sofa"),
        ("answer", "A", None),
    ):
        head_to_head(result([1], "v", **{name: [one]}), result([1], "v", **{name: [two]}))


def test_failures_are_left_out_and_unreadable_replies_counted() -> None:
    a = result([1, None, 0, 1], "vvww", error=[None, "no frame", None, None], read=["A", None, "", "B"])
    b = result([1, 1, None, 0], "vvww", reply=["A", "B", None, "C"], read=["A", "B", None, "C"])
    record = head_to_head(a, b)
    assert (record["n_questions"], record["n_compared"], record["table"][0]["n"]) == (4, 2, 2)
    assert record["failures"] == [
        {"id": "1", "side": "A", "error": "no frame"},
        {"id": "2", "side": "B", "error": "no score"},
    ]
    assert record["unreadable"] == [{"id": "2", "side": "A", "reply": None}]
    assert "2 of 4 questions are left out" in comparison_text(record)
    with pytest.raises(InputError, match="no question has a score in both"):
        head_to_head(result([None, 1], "vw"), result([1, None], "vw"))


def test_videos_come_from_whoever_names_them() -> None:
    scores = np.arange(12) % 2
    named, unnamed = result(scores, np.arange(12) // 3), result(scores)
    for pair in ((named, unnamed), (unnamed, named), (named, result(scores, np.array(list("aaabbbcccddd"))))):
        record = head_to_head(*pair)
        assert (record["table"][0]["n_videos"], record["warnings"]) == (4, [])
    other = head_to_head(named, result(scores, np.arange(12) // 4))
    assert (other["table"][0]["n_videos"], len(other["warnings"])) == (4, 1)
    nobody = head_to_head(unnamed, unnamed)
    assert nobody["table"][0]["n_videos"] == 12
    assert "neither result names the videos" in nobody["warnings"][0]
    assert "neither result names the videos" in comparison_text(nobody)


def test_replies_that_nobody_can_read_are_no_comparison() -> None:
    a, b = result([0, 0, None], "vwx", read=["", "", None]), result([0, 1, 1], "vwx", read=["", "B", "B"])
    assert head_to_head(a, b)["warnings"] == ["no answer could be read from any reply of A: its scores say nothing"]
    assert head_to_head(b, b)["warnings"] == []


def test_scores_that_are_no_shares() -> None:
    record = head_to_head(result([3, 1], "vw"), result([2, 5], "vw"))
    assert (record["percent"], record["table"][0]["mcnemar"], record["warnings"]) == (False, None, [])
    assert "+1.5000" in comparison_text(record)
    mixed = head_to_head(result([1, 0], "vw"), result([100, 0], "vw"))
    assert "same scale" in mixed["warnings"][0]


def test_two_runs_of_lmms_eval(tmp_path: Path) -> None:
    """Frames differ by the model's arguments, and questions by their prompts."""
    rows = [vsi_sample(n, "A", float(n % 2)) for n in range(8)]
    write_lmms(tmp_path / "a", "vsibench", rows)
    write_lmms(tmp_path / "b", "vsibench", rows, model_args="pretrained=m,max_num_frames=16,max_pixels=12544")
    record = head_to_head(read_result(tmp_path / "a"), read_result(tmp_path / "b"))
    assert [flag["what"] for flag in record["flags"]] == ["frames.max_frames"]
    assert (record["table"][0]["n_videos"], record["unchecked"], record["warnings"]) == (4, [], [])
    rows[3]["input"] += " Think first."
    write_lmms(tmp_path / "c", "vsibench", rows)
    record = head_to_head(read_result(tmp_path / "a"), read_result(tmp_path / "c"))
    assert [flag["what"] for flag in record["flags"]] == ["prompt of 1 of 8 questions"]
