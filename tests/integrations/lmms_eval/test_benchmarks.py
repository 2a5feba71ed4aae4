"""The benchmarks' tasks: values as lmms-eval's own, standard errors by video; and a run of the harness."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from videoanchor_triton.app import cli
from videoanchor_triton.app.room_scans import CHECKPOINT, FPS, TEST_SEED, RoomScan
from videoanchor_triton.app.video.reader import write_video
from videoanchor_triton.integrations.lmms_eval.tasks_folder import TASKS_FOLDER

try:
    metadata.version("lmms-eval")
except metadata.PackageNotFoundError:
    pytest.skip("lmms-eval is not installed: make test-lmms", allow_module_level=True)

Doc = dict[str, Any]
N = 400


def vsibench(rng: np.random.Generator) -> tuple[Doc, str]:
    own = import_module("lmms_eval.tasks.vsibench.utils")
    kind = str(rng.choice([*own.MCA_QUESTION_TYPES, *own.NA_QUESTION_TYPES]))
    where = {"dataset": "scannet", "scene_name": f"scene{rng.integers(30)}"}
    if kind in own.NA_QUESTION_TYPES:
        return {**where, "question_type": kind, "ground_truth": "4"}, str(rng.integers(2, 7))
    return {**where, "question_type": kind, "ground_truth": "A"}, str(rng.choice(["A", "B."]))


def revsi(rng: np.random.Generator) -> tuple[Doc, str]:
    own = import_module("lmms_eval.tasks.revsi.utils")
    kind = str(rng.choice([*own.MCQ_QUESTION_TYPES, *own.NQ_QUESTION_TYPES]))
    truth, reply = ("5", str(rng.integers(2, 9))) if kind in own.NQ_QUESTION_TYPES else ("C", str(rng.choice([*"ABC"])))
    return {"scene_id": f"s{rng.integers(30)}", "question_type": kind, "ground_truth": truth}, reply


def sparbench(rng: np.random.Generator) -> tuple[Doc, str]:
    own = import_module("lmms_eval.tasks.sparbench.utils")
    kind = str(rng.choice([*own.MCA_QUESTION_TYPES, *own.NA_QUESTION_TYPES, *own.SPECIAL_QUESTION_TYPES]))
    if kind in own.SPECIAL_QUESTION_TYPES:
        return {"task": kind, "answer": "move_right:0.5,move_up:0.2"}, f"move_right:{rng.random():.2f},move_up:0.2"
    return ({"task": kind, "answer": "4"}, str(rng.integers(2, 7))) if kind in own.NA_QUESTION_TYPES else (
        {"task": kind, "answer": "A"}, str(rng.choice(["A", "B"]))
    )  # fmt: skip


def videomme(rng: np.random.Generator) -> tuple[Doc, str]:
    about = {"domain": "Knowledge", "sub_category": "Geography", "task_type": "Spatial Reasoning", "duration": "short"}
    return {**about, "question_id": "1", "videoID": f"v{rng.integers(30)}", "answer": "B"}, str(rng.choice([*"AB"]))


def mmsi_video(rng: np.random.Generator) -> tuple[Doc, str]:
    own = import_module("lmms_eval.tasks.mmsi_video.utils")
    kind = str(rng.choice([*own.CATEGORY_TO_METRIC]))
    videos = [{"path": f"v{rng.integers(6)}.mp4"} for _ in range(rng.integers(1, 3))]
    return {"type": kind, "video_list": videos, "ground_truth": "B"}, str(rng.choice([*"AB"]))


MADE: dict[str, Callable[[np.random.Generator], tuple[Doc, str]]] = {
    "vsibench/vsibench.yaml": vsibench,
    "revsi/revsi_16_frame.yaml": revsi,
    "sparbench/sparbench.yaml": sparbench,
    "videomme/videomme.yaml": videomme,
    "mmsi_video/mmsi_video.yaml": mmsi_video,
}


@pytest.fixture
def no_data(monkeypatch: pytest.MonkeyPatch) -> list[Doc]:
    """What `ByVideo` gives to lmms-eval's class, which would fetch the data."""
    from lmms_eval.api.task import ConfigurableMessagesTask  # pyright: ignore[reportMissingImports]

    given: list[Doc] = []

    def kept(_: object, config: Doc) -> None:
        given.append(config)

    monkeypatch.setattr(ConfigurableMessagesTask, "__init__", kept)
    return given


@pytest.mark.parametrize("own", MADE)
def test_values_are_lmms_evals_and_terms_belong_to_them(own: str, no_data: list[Doc]) -> None:
    import lmms_eval.tasks  # pyright: ignore[reportMissingImports]
    from lmms_eval.utils import load_yaml_config  # pyright: ignore[reportMissingImports]

    from videoanchor_triton.integrations.lmms_eval.benchmarks import ByVideo

    ByVideo({"task": "t", "class": ByVideo, "own": own})
    (config,) = no_data
    theirs = load_yaml_config(str(Path(lmms_eval.tasks.__file__).parent / own))
    for name in ("dataset_path", "generation_kwargs", "lmms_eval_specific_kwargs"):
        assert config[name] == theirs[name]
    assert config["doc_to_text"].__name__ == theirs["doc_to_text"].__name__
    rng = np.random.default_rng(0)
    asked = [MADE[own](rng) for _ in range(N)]
    found: dict[str, list[Doc]] = {}
    expected: dict[str, list[Any]] = {}
    for doc, reply in asked:
        before = dict(doc)
        for name, item in config["process_results"](doc, [reply]).items():
            found.setdefault(name, []).append(item)
        assert doc == before
        for name, item in theirs["process_results"](dict(doc), [reply]).items():
            expected.setdefault(name, []).append(item)
    assert sorted(one["metric"] for one in config["metric_list"]) == sorted(
        one["metric"] for one in theirs["metric_list"]
    )
    aggregations = {one["metric"]: one["aggregation"] for one in theirs["metric_list"]}
    for one in config["metric_list"]:
        value = one["aggregation"](found[one["metric"]])
        assert value == pytest.approx(
            aggregations[one["metric"]](expected[one["metric"]]), abs=6e-3 if value > 1 else 1e-6
        )
        terms = [item[config["score_key"]] for item in found[one["metric"]]]
        assert np.mean(terms) == pytest.approx(value)
        clusters = {item.get(config["cluster_key"]) for item in found[one["metric"]]}
        assert (clusters == {None}) == (own.startswith("sparbench")), "its rows name no scene"
    assert 0.2 < np.mean([item["score"] for item in found[config["metric_list"][0]["metric"]]]) < 0.9


def test_each_task_is_one_of_lmms_evals() -> None:
    import lmms_eval.tasks  # pyright: ignore[reportMissingImports]
    from lmms_eval.tasks import TaskManager  # pyright: ignore[reportMissingImports]

    files = sorted((TASKS_FOLDER / "by_video").glob("*.yaml"))
    names = [path.stem for path in files]
    assert len(names) == 12
    known = TaskManager(include_path=str(TASKS_FOLDER), include_defaults=False).all_tasks
    assert {*names, "all_angles_bench"} <= {*known}
    for path in files:
        (own,) = [line.split(": ")[1] for line in path.read_text().splitlines() if line.startswith("own: ")]
        assert (Path(lmms_eval.tasks.__file__).parent / own).is_file()
        assert f"task: {path.stem}\n" in path.read_text()
        assert own.split("/")[0] in {name.split("/")[0] for name in MADE}


TASK = """
task: three_rooms
class: !function videoanchor_triton.integrations.lmms_eval.benchmarks.ByVideo
own: vsibench/vsibench.yaml
dataset_path: json
dataset_name: null
dataset_kwargs: {data_files: {test: questions.jsonl}}
doc_to_text: question
doc_to_messages: null
"""


@pytest.fixture(scope="module")
def rooms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three clips where VSI-Bench's task looks for them, and questions in its form: counts and choices."""
    folder = tmp_path_factory.mktemp("rooms")
    rows = []
    for number in range(3):
        scan = RoomScan(TEST_SEED + 40 + number)
        (folder / "hf" / "vsibench" / "rooms").mkdir(parents=True, exist_ok=True)
        write_video(folder / "hf" / "vsibench" / "rooms" / f"scene{number}.mp4", scan.frames, FPS)
        for one in scan.questions():
            if one.answer.isdigit() and one.answer != "0":
                row = {"question_type": "object_counting", "ground_truth": one.answer, "options": []}
            elif one.kind in ("exists", "turn"):
                row = {"question_type": "route_planning", "ground_truth": one.answer, "options": []}
            else:
                continue
            rows.append(
                {"id": len(rows), "dataset": "rooms", "scene_name": f"scene{number}", "question": one.text, **row}
            )
    (folder / "questions.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    (folder / "three_rooms.yaml").write_text(TASK)
    return folder


def run_harness(rooms: Path, out: Path, gate: str) -> Doc:
    """`python -m lmms_eval` with the trained model; the results."""
    arguments = f"pretrained={CHECKPOINT},device_map=cpu,max_num_frames=8,min_pixels=784,max_pixels=12544,{gate}"
    command = [sys.executable, "-m", "lmms_eval", "--model", "videoanchor_qwen2_5_vl", "--model_args", arguments]
    command += ["--device", "cpu", "--tasks", "three_rooms", "--include_path", str(rooms), "--log_samples"]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(rooms / "hf"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "--output_path", str(out)], capture_output=True, text=True, timeout=280, env=environment | offline
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (written,) = out.rglob("*_results.json")
    return json.loads(written.read_text())


def test_the_harness_on_three_clips_and_compare(
    rooms: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    baseline = run_harness(rooms, tmp_path / "baseline", "alpha_k=0,alpha_v=0")
    run_harness(rooms, tmp_path / "gated", "alpha_k=9.5,alpha_v=2.5,n_clusters=6,scorer=kmeans")
    found = baseline["results"]["three_rooms"]
    (samples,) = (tmp_path / "baseline").rglob("*_samples_three_rooms.jsonl")
    items = [json.loads(line)["vsibench_overall"] for line in samples.read_text().splitlines()]
    by_type = {kind: np.mean([item["score"] for item in items if item["type"] == kind]) for kind in
               ("object_counting", "route_planning")}  # fmt: skip
    assert found["vsibench_overall,none"] == pytest.approx(np.mean([*by_type.values()]))
    assert found["object_counting_mra,none"] == pytest.approx(by_type["object_counting"])
    often = {kind: sum(item["type"] == kind for item in items) for kind in by_type}
    off = dict.fromkeys(("rooms/scene0", "rooms/scene1", "rooms/scene2"), 0.0)
    squares = 0.0
    for item in items:
        part = (item["score"] - by_type[item["type"]]) / 2 / often[item["type"]]
        off[item["video"]] += part
        squares += part**2
    n = len(items)
    variance = squares * n / (n - 1) + sum(one**2 for one in off.values()) - squares
    assert variance > 0
    assert found["vsibench_overall_stderr_clustered,none"] == pytest.approx(np.sqrt(variance))

    capsys.readouterr()
    assert cli.main(["compare", str(tmp_path / "baseline"), str(tmp_path / "gated"), "--json"]) == 0
    compared = json.loads(capsys.readouterr().out)
    overall = compared["table"][0]
    assert (overall["n"], overall["n_videos"], compared["flags"], compared["unchecked"]) == (n, 3, [], [])
    assert overall["a"] == pytest.approx(np.mean([item["score"] for item in items]))
    assert overall["a"] > 0.8, "the trained model answers in this harness, too"
    assert overall["b"] < overall["a"], "which the published strengths cost half of its answers"
