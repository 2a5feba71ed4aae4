"""Questions, settings, replies that survive, and the tables of an evaluation."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from eval_runs import NUMBER, ROW, write_rows

from videoanchor_triton.anchor.config import VideoAnchorConfig
from videoanchor_triton.app.batch.results import ResultsLog
from videoanchor_triton.app.batch.stopping import StoppedError
from videoanchor_triton.app.evaluation.evaluate import Judged, evaluate, judge, refresh
from videoanchor_triton.app.evaluation.paired import ALL, MEAN_OF_TYPES, compare
from videoanchor_triton.app.evaluation.questions import Question, read_questions
from videoanchor_triton.app.evaluation.report import NO_REPLY, compared, eval_markdown
from videoanchor_triton.app.evaluation.settings import Setting, ablations
from videoanchor_triton.integrations.errors import InputError

GATE = VideoAnchorConfig(alpha_k=4.0, alpha_v=2.0, alpha_q=1.0)


def compare_both(questions: list[Question], setting: Setting, after: Any, before: Any) -> list[dict[str, Any]]:
    scores = np.array([before, after], dtype=float)
    return compared(questions, [setting.baseline(), setting], Judged(scores, *np.zeros((2, *scores.shape), dtype=bool)))


def question(number: int, kind: str = "all", answer: str = "A", video: str = "a.mp4") -> Question:
    return Question(str(number), Path(video), f"question {number}", answer, "choice", ("x", "y"), kind)


@pytest.mark.parametrize(
    ("row", "answer", "metric", "options"),
    [
        (ROW, "B", "choice", ("sofa", "lamp", "bed")),
        ({**ROW, "answer": "lamp"}, "B", "choice", ("sofa", "lamp", "bed")),
        ({**ROW, "answer": "(c)"}, "C", "choice", ("sofa", "lamp", "bed")),
        ({**ROW, "options": ["A. sofa", "B. lamp"], "answer": "B. lamp"}, "B", "choice", ("sofa", "lamp")),
        ({**ROW, "options": ["(A) sofa", "(B) lamp"]}, "B", "choice", ("sofa", "lamp")),
        ({**ROW, "options": [1, 2, 3], "answer": 3}, "C", "choice", ("1", "2", "3")),
        (NUMBER, 4.0, "mra", ()),
        ({**NUMBER, "answer": "3.5"}, 3.5, "mra", ()),
        ({**NUMBER, "answer": 0, "metric": "exact"}, "0", "exact", ()),
        ({**NUMBER, "answer": 0}, "0", "exact", ()),
        ({**NUMBER, "answer": "0.0"}, "0.0", "exact", ()),
        ({**NUMBER, "answer": "kitchen", "options": []}, "kitchen", "exact", ()),
        ({**NUMBER, "answer": "nan"}, "nan", "exact", ()),
        ({**NUMBER, "answer": 10**400}, str(10**400), "exact", ()),
    ],
)
def test_rows(row: dict[str, Any], answer: str | float, metric: str, options: tuple[str, ...], tmp_path: Path) -> None:
    (read,) = read_questions(write_rows(tmp_path, row))
    assert (read.answer, read.metric, read.options) == (answer, metric, options)
    assert read.video == tmp_path / "a.mp4"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({**NUMBER, "answer": 0, "metric": "mra"}, "above 0"),
        ({**NUMBER, "answer": -3}, "above 0"),
        ({**NUMBER, "answer": "kitchen", "metric": "mra"}, "above 0"),
        ({**NUMBER, "answer": None}, "answer: expected"),
        ({**NUMBER, "answer": True}, "answer: expected"),
        ({**NUMBER, "answer": " "}, "answer: expected"),
        ({"video": "a.mp4", "question": "How many?"}, "answer: expected a letter, a number or text, got None"),
        ({**ROW, "answer": "D"}, "from A to C"),
        ({**ROW, "answer": "chair"}, "from A to C"),
        ({**ROW, "options": ["B", "A"], "answer": "A"}, "from A to B"),
        ({**ROW, "options": ["sofa", "Sofa"]}, "different"),
        ({**ROW, "options": ["sofa"]}, "2 to 26"),
        ({**ROW, "options": "sofa,lamp"}, "a list"),
        ({**ROW, "metric": "mra"}, '"choice"'),
        ({**NUMBER, "metric": "bleu"}, '"exact"'),
        ({**NUMBER, "type": 3}, "type: expected text"),
    ],
)
def test_rows_that_are_refused(row: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        read_questions(write_rows(tmp_path, {**ROW, "id": "first"}, row))


def test_repeated_rows_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no video at .*b.mp4, nor at any other path"):
        read_questions(write_rows(tmp_path, {**ROW, "video": "b.mp4"}))
    assert len(read_questions(write_rows(tmp_path, {**ROW, "video": "b.mp4"}, ROW))) == 2, "one is there"
    with pytest.raises(InputError, match="line 2: repeats"):
        read_questions(write_rows(tmp_path, ROW, ROW))
    with pytest.raises(InputError, match="line 2: repeats"):
        read_questions(write_rows(tmp_path, {**ROW, "id": 1}, {**NUMBER, "id": 1}))


VSI_BENCH_PROMPTS = (
    "These are frames of a video.\nWhich is nearer?\nOptions:\nA. sofa\nB. lamp\nC. bed\n"
    "Answer with the option's letter from the given choices directly.",
    "These are frames of a video.\nHow many?\nPlease answer the question using a single word or phrase.",
)
PLAIN_PROMPTS = ("Which is nearer?\nA. sofa\nB. lamp\nC. bed", "How many?")


def prompts(path: Path, *prompt: str) -> tuple[str, ...]:
    return tuple(question.prompt() for question in read_questions(path, *prompt))


def test_prompts(tmp_path: Path) -> None:
    """VSI-Bench's own types of questions in its words, others as they stand; or all as is asked."""
    rows = write_rows(tmp_path, ROW, NUMBER)
    assert prompts(rows) == prompts(rows, "auto") == prompts(rows, "plain") == PLAIN_PROMPTS
    assert prompts(rows, "vsi-bench") == VSI_BENCH_PROMPTS
    typed = write_rows(tmp_path, {**ROW, "type": "route_planning"}, {**NUMBER, "question_type": "object_counting"})
    assert prompts(typed) == VSI_BENCH_PROMPTS
    assert prompts(typed, "plain") == PLAIN_PROMPTS
    half = write_rows(tmp_path, {**ROW, "type": "route_planning"}, NUMBER)
    assert prompts(half) == (VSI_BENCH_PROMPTS[0], PLAIN_PROMPTS[1])


def test_a_prompt_of_ones_own(tmp_path: Path) -> None:
    rows, template = write_rows(tmp_path, ROW, {**NUMBER, "question": "{options} {0}?"}), tmp_path / "prompt.txt"
    template.write_text("Look {closely}.\n{options}\n{question} Now:\n")
    assert prompts(rows, str(template)) == (
        "Look {closely}.\nA. sofa\nB. lamp\nC. bed\nWhich is nearer? Now:",
        "Look {closely}.\n{options} {0}? Now:",
    )
    template.write_text("Q: {question}")
    with pytest.raises(InputError, match="line 1: the question has options, and the text of --prompt no line"):
        prompts(rows, str(template))
    for text in ("nothing", "{question} {question}", "{question} {options}", "{question}\n{options}\n{options}"):
        template.write_text(text)
        with pytest.raises(InputError, match=r"expected \{question\} once"):
            prompts(rows, str(template))
    with pytest.raises(InputError, match=r"--prompt none.txt: expected auto, plain, vsi-bench or a text file"):
        prompts(rows, "none.txt")


@pytest.mark.parametrize(
    ("answer", "reply", "right"),
    [("0", "zero", 1), ("0", "0 chairs", 1), ("0", "3", 0), ("4", "four.", 1), ("room 3", "3", 0), ("3", "room 3", 1)],
)
def test_exact_numbers_are_equal_in_any_form(answer: str, reply: str, right: float) -> None:
    assert Question("1", Path("a.mp4"), "?", answer, "exact", (), "all").score(reply) == right


def test_keys_change_with_what_replies_depend_on() -> None:
    setting, asked = Setting("gate", GATE, 8, (("model", "m"),)), question(1)
    others = [
        (Setting("gate", VideoAnchorConfig(alpha_k=4.0, alpha_v=2.5, alpha_q=1.0), 8, (("model", "m"),)), asked),
        (Setting("gate", GATE, 9, (("model", "m"),)), asked),
        (Setting("gate", GATE, 8, (("model", "n"),)), asked),
        (setting, question(2)),
        (setting, question(1, video="b.mp4")),
        (setting, replace(asked, fingerprint="of another file of this name")),
    ]
    assert len({setting.key(asked), *(one.key(other) for one, other in others)}) == 7
    assert Setting("another name", GATE, 8, (("model", "m"),)).key(asked) == setting.key(asked)
    assert setting.key(question(1, answer="B")) == setting.key(asked)  # replies do not depend on the right answer


def test_ablations_change_one_thing_at_a_time() -> None:
    setting = Setting("gate", GATE, 16)
    found = ablations(setting, ["scorer", "score", "clusters=8,24,auto", "terms=K,V,QK", "frames=8,16"])
    names = [one.name for one in found]
    assert names == [
        *("gate", "scorer kmeans", "scorer uniform", "score size", "score row_sum", "clusters 8", "clusters auto"),
        *("terms K", "terms V", "terms QK", "frames 8"),
    ]
    by_name = dict(zip(names, found, strict=True))
    terms = {name: (one.config.alpha_q, one.config.alpha_k, one.config.alpha_v) for name, one in by_name.items()}
    assert terms["terms K"] == (0, 4, 0)
    assert terms["terms V"] == (0, 0, 2)
    assert terms["terms QK"] == (1, 4, 0)
    assert by_name["scorer kmeans"].config.scorer == "kmeans"
    assert by_name["score size"].config.score == "size"
    assert by_name["frames 8"].max_frames == 8
    assert by_name["frames 8"].baseline().max_frames == 8
    baseline = by_name["frames 8"].baseline().config
    assert (baseline.alpha_q, baseline.alpha_k, baseline.alpha_v) == (0, 0, 0)


def test_ablations_of_nearest_neighbours() -> None:
    """They have the same scores as self-expression, and keep the one that was asked for."""
    setting = Setting("gate", replace(GATE, scorer="knn", score="projector"), 16)
    found = {one.name: one.config for one in ablations(setting, ["scorer=ssc,kmeans", "score=size"])}
    assert [(one.scorer, one.score) for one in found.values()] == [
        *(("knn", "projector"), ("ssc", "projector"), ("kmeans", "published"), ("knn", "size")),
    ]


@pytest.mark.parametrize(
    "wanted",
    ["colour", "scorer=best", "score=median", "clusters=0", "clusters=x", "terms=KX", "terms=", "frames=0", "keep=2.5"],
)
def test_ablations_that_are_refused(wanted: str) -> None:
    if wanted == "terms=":
        wanted = "terms=,"
    with pytest.raises(InputError, match="--ablate"):
        ablations(Setting("gate", GATE, 16), [wanted])


def test_an_ablation_of_a_term_without_strength_is_refused() -> None:
    with pytest.raises(InputError, match="strength of Q is 0"):
        ablations(Setting("gate", VideoAnchorConfig(alpha_k=1.0, alpha_v=1.0), 16), ["terms=Q"])


def test_evaluation_goes_on_where_it_stopped(tmp_path: Path) -> None:
    questions = [question(n, video=f"{n % 2}.mp4", answer="AB"[n % 2]) for n in range(6)]
    setting = Setting("gate", GATE, 8)
    settings = [setting.baseline(), setting]
    asked: list[tuple[str, str, str]] = []

    def ask(one: Question, how: Setting) -> str:
        if len(asked) == 5:
            raise KeyboardInterrupt
        asked.append((Path(one.video_name).name, one.id, how.name))
        return "A" if how == setting else "(B)."

    with ResultsLog(tmp_path / "replies.jsonl") as log, pytest.raises(KeyboardInterrupt):
        evaluate(questions, settings, ask, log)
    with (tmp_path / "replies.jsonl").open("a") as file:
        file.write('{"key": "torn by a ki')
    first, asked = asked, []
    with ResultsLog(tmp_path / "replies.jsonl") as log:
        with pytest.raises(KeyboardInterrupt):
            evaluate(questions, settings, ask, log)
        first, asked = first + asked, []
        scores = evaluate(questions, settings, ask, log).scores
    everything = first + asked
    assert len(everything) == len({*everything}) == 12
    assert [video for video, _, _ in everything] == ["0.mp4"] * 6 + ["1.mp4"] * 6
    np.testing.assert_array_equal(scores, [[0, 1] * 3, [1, 0] * 3])


def test_failures_are_kept_left_out_and_asked_again(tmp_path: Path) -> None:
    questions = [question(n) for n in range(3)]
    setting, broken = Setting("gate", GATE, 8), True

    def ask(one: Question, how: Setting) -> str:
        if broken and one.id == "1" and how == setting:
            raise InputError("no such frame")
        return "A" if how == setting else "B"

    with ResultsLog(tmp_path / "replies.jsonl") as log:
        settings = [setting.baseline(), setting]
        judged = evaluate(questions, settings, ask, log)
        assert np.isnan(judged.scores[1]).tolist() == [False, True, False]
        assert not judged.unreadable.any()
        table = compared(questions, settings, judged)
        assert [(row["type"], row["n"], row["n_failed"], row["difference"]) for row in table] == [(ALL, 2, 1, 1.0)]
        assert "no such frame" in log.path.read_text()
        broken = False
        assert np.isnan(evaluate(questions, [setting], ask, log).scores).sum() == 1
        again = refresh(questions, log)
        assert again == {setting.key(questions[1])}
        assert evaluate(questions, [setting], ask, log, again=again).scores.tolist() == [[1, 1, 1]]
        assert again == set()


def test_replies_are_judged_by_the_questions_as_they_are_now(tmp_path: Path) -> None:
    setting, other = Setting("gate", GATE, 8), Setting("another", replace(GATE, alpha_k=1.0), 8)
    asked = [question(1, answer="A"), question(2, answer="B")]
    with ResultsLog(tmp_path / "replies.jsonl") as log:
        assert evaluate(asked, [setting, other], lambda *_: "A", log).scores.tolist() == [[1, 0], [1, 0]]
        edited = [replace(asked[0], answer="B", id="new", type="near")]
        refresh(edited, log)
        assert judge(edited, [setting, other], log).scores.tolist() == [[0], [0]]
        found = [[record[name] for name in ("id", "type", "answer", "score")] for record in log.records.values()]
        assert sorted(found) == [["2", "all", "B", 0.0]] * 2 + [["new", "near", "B", 0.0]] * 2
        assert [record["settings"]["alpha_k"] for record in log.records.values()] == [4.0, 1.0] * 2
        records, written = log.records, log.path.stat().st_mtime_ns
        refresh(edited, log)
        assert (log.records, log.path.stat().st_mtime_ns) == (records, written)


@pytest.mark.parametrize(("garbage", "verdict"), [("both", NO_REPLY), ("gate", "loss"), ("none", "no gain shown")])
def test_replies_that_nobody_can_read_are_counted(tmp_path: Path, garbage: str, verdict: str) -> None:
    asked = [question(n, video=f"{n}.mp4") for n in range(20)]
    setting = Setting("gate", GATE, 8)
    settings = [setting, setting.baseline()]

    def ask(_: Question, how: Setting) -> str:
        return "zzz word" if garbage == "both" or (garbage == "gate" and how == setting) else "A"

    with ResultsLog(tmp_path / "replies.jsonl") as log:
        (row,) = compared(asked, settings, evaluate(asked, settings, ask, log))
    assert row["verdict"] == verdict
    counts = {"both": (20, 20), "gate": (20, 0), "none": (0, 0)}[garbage]
    assert (row["unreadable"], row["baseline_unreadable"]) == counts
    text = eval_markdown({}, [row])
    assert f"| {counts[1]} / {counts[0]} | 0 | {verdict} |" in text
    assert ("no letter or number could be read from any reply" in text) == (garbage == "both")


@pytest.mark.parametrize(("n_foreign", "warned"), [(0, False), (10, False), (11, True), (20, True)])
def test_replies_that_are_the_answer_of_nothing_are_told(tmp_path: Path, n_foreign: int, warned: bool) -> None:
    """A model that does not know the wording answers with words that answer no question; wrong answers are others."""
    asked = [
        Question(str(n), Path(f"{n}.mp4"), f"which {n}?", ("Red", "blue")[n % 2], "exact", (), "colour")
        for n in range(20)
    ]
    counted = Question("count", Path("count.mp4"), "how many?", 4.0, "mra", (), "count")
    setting = Setting("gate", GATE, 8)
    settings = [setting, setting.baseline()]

    def ask(one: Question, how: Setting) -> str:
        if one is counted:
            return "17"
        return "of a video" if how == setting and int(one.id) < n_foreign else "red."

    with ResultsLog(tmp_path / "replies.jsonl") as log:
        table = compared([*asked, counted], settings, evaluate([*asked, counted], settings, ask, log))
    row = table[0]
    assert (row["foreign"], row["baseline_foreign"], row["unreadable"]) == (n_foreign, 0, 0)
    text = eval_markdown({}, table)
    said = f"Most replies are no answers: {n_foreign} of 21 in gate are what no question of their type has"
    assert (said in text) == warned
    assert ("Most replies" in text) == warned


def test_the_control_is_the_same_gate_with_other_scores() -> None:
    """Scores on tokens at random and a score of 1 on all, everything else as it is."""
    gate = Setting("gate", GATE, 8)
    assert [(one.name, one.config) for one in ablations(gate, ["control"])[1:]] == [
        ("control permuted", replace(GATE, score="permuted")),
        ("control uniform", replace(GATE, scorer="uniform")),
    ]
    frames = Setting("gate", replace(GATE, score="cross_frame"), 8)
    assert ablations(frames, ["control=permuted"])[1].config.score == "cross_frame_permuted"
    with pytest.raises(InputError, match="--ablate group: ward: all visual tokens are kept: give --keep as well"):
        ablations(gate, ["group"])
    merged = Setting("gate", replace(GATE, keep=0.5), 8)
    found = [(one.config.keep, one.config.group) for one in ablations(merged, ["keep=0.25,64", "group=ward,random"])]
    assert found == [(0.5, "ward"), (0.25, "ward"), (64, "ward"), (0.5, "random")]
    assert [one.config.merge for one in ablations(merged, ["merge"])] == ["counts", "mean", "drop"]
    with pytest.raises(InputError, match="expected permuted or uniform"):
        ablations(gate, ["control=ssc"])


@pytest.mark.parametrize(
    ("error", "n_asked"),
    [(RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered"), 4), (RuntimeError("odd"), 8)],
    ids=["lost", "equal"],
)
def test_an_evaluation_stops_and_goes_on(tmp_path: Path, error: Exception, n_asked: int) -> None:
    """Everything before it stays; the rerun asks what failed after all others."""
    asked = [question(n, video=f"{n}.mp4") for n in range(20)]
    setting, order = Setting("gate", GATE, 8), []

    def ask(one: Question, _: Setting) -> str:
        order.append(one.id)
        if len(order) > 3:
            raise error
        return "A"

    with ResultsLog(tmp_path / "replies.jsonl") as log:
        with pytest.raises(StoppedError):
            evaluate(asked, [setting], ask, log)
        assert len(order) == len(log.records) == n_asked
        failed, order, error = order[3:], [], KeyboardInterrupt()  # pyright: ignore[reportAssignmentType]
        assert np.isfinite(judge(asked, [setting], log).scores).sum() == 3
        again = refresh(asked, log)
        everything = evaluate(asked, [setting], lambda one, _: order.append(one.id) or "A", log, again=again)
        assert everything.scores.tolist() == [[1] * 20]
    assert order[-len(failed) :] == failed
    assert len(order) == 17


def test_table_by_type() -> None:
    questions = [question(n, "far" if n < 9 else "near") for n in range(12)]
    setting = Setting("gate", GATE, 8)
    table = compare_both(questions, setting, np.r_[np.zeros(9), np.ones(3)], np.zeros(12))
    found = {row["type"]: (row["n"], row["difference"]) for row in table}
    assert found == {ALL: (12, 0.25), MEAN_OF_TYPES: (12, 0.5), "far": (9, 0.0), "near": (3, 1.0)}
    row = "| gate | near | 3 | 1 | 0.0 | 100.0 | +100.0 | ? (one video) | 3 | 1 | 0 / 0 | 0 | no gain shown |"
    assert row in eval_markdown({}, table)


def test_table_draws_whole_videos(tmp_path: Path) -> None:
    """Ten videos, eight questions each, all or none of which change: 80 questions are as good as ten. A video is one
    however rows spell its path."""
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "folder")
    spellings = ("folder", "link", "folder/../folder")
    videos = [str(tmp_path / spellings[n % 3] / f"{n // 8}.mp4") for n in range(80)]
    questions = [question(n, "ab"[n % 2], video=video) for n, video in enumerate(videos)]
    setting = Setting("gate", GATE, 8)
    after, before = (np.arange(80) // 8 < 7).astype(float), (np.arange(80) // 8 >= 7).astype(float)
    table = compare_both(questions, setting, after, before)
    assert [row["n_videos"] for row in table] == [10] * 4
    few = compare(after[::8], before[::8], np.arange(10))
    for row in table:
        assert (row["low"], row["high"], row["n_videos_changed"]) == (few.low, few.high, 10)
        assert row["verdict"] == "no gain shown"
    assert compare(after, before, np.arange(80)).verdict == "gain"  # what asking a video eight times pretends
