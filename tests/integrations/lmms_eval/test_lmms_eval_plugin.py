"""The lmms-eval plug-in: its settings anywhere, the rest where lmms-eval is installed (`make test-lmms`)."""

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from videoanchor_triton import VideoAnchorConfig
from videoanchor_triton.app import demo
from videoanchor_triton.app.evaluation.readers.reading import read_result
from videoanchor_triton.app.video.reader import write_video
from videoanchor_triton.integrations.lmms_eval.frames import sample_evenly, set_frame_sampling
from videoanchor_triton.integrations.lmms_eval.settings import split_settings
from videoanchor_triton.integrations.lmms_eval.tasks_folder import TASKS_FOLDER

try:
    metadata.version("lmms-eval")
    LMMS_EVAL = True
except metadata.PackageNotFoundError:
    LMMS_EVAL = False
needs_lmms_eval = pytest.mark.skipif(not LMMS_EVAL, reason="lmms-eval is not installed: make test-lmms")

MODELS = ("qwen2_5_vl_videoanchor", "internvl_videoanchor", "llava_onevision_videoanchor")
SMALL = "device_map=cpu,max_num_frames=4,min_pixels=3136,max_pixels=12544"
GATE = "alpha_k=9,alpha_v=2,n_clusters=3,scorer=kmeans"

TEMPLATE = (
    "{% for message in messages %}{% for part in message['content'] %}"
    "{% if part['type'] == 'text' %} {{ part['text'] }} {% else %} <{{ part['type'] }}> {% endif %}"
    "{% endfor %}{% endfor %}"
)

TASK = """
task: three_clips
dataset_path: json
dataset_kwargs: {data_files: {test: clips.jsonl}}
test_split: test
output_type: generate_until
doc_to_visual: !function utils.doc_to_visual
doc_to_text: question
doc_to_target: answer
generation_kwargs: {max_new_tokens: 6}
process_results: !function utils.process_results
metric_list:
  - {metric: accuracy, aggregation: mean, higher_is_better: true}
"""

TASK_FUNCTIONS = """
def doc_to_visual(doc):
    return [doc["video"]]

def process_results(doc, results):
    return {"accuracy": float(results[0] == doc["answer"])}
"""


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    demo.make_checkpoint(folder)
    return folder


@pytest.fixture(scope="session")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A task of three clips of 8, 9 and 4 frames."""
    folder = tmp_path_factory.mktemp("tasks")
    generator = np.random.default_rng(0)
    documents = []
    for number, n_frames in enumerate((8, 9, 4)):
        blocks = generator.integers(0, 255, (n_frames, 8 + 4 * number, 12, 3), dtype=np.uint8)
        clip = folder / f"clip{number}.mp4"
        write_video(clip, blocks.repeat(7, 1).repeat(7, 2), 4)
        documents.append({"video": str(clip), "question": f"What moves in clip {number}?", "answer": "A"})
    (folder / "clips.jsonl").write_text("\n".join(map(json.dumps, documents)))
    (folder / "three_clips.yaml").write_text(TASK)
    (folder / "utils.py").write_text(TASK_FUNCTIONS)
    return folder


def load_model(name: str, arguments: str, batch_size: int = 1) -> Any:
    from lmms_eval.models import get_model  # pyright: ignore[reportMissingImports, reportAttributeAccessIssue]

    model = get_model(name).create_from_arg_string(arguments, {"batch_size": batch_size, "device": "cpu"})
    model.model.float()  # in bfloat16, rounding decides between the close logits of a random model
    return model


def evaluate(model: Any, tasks: Path, name: str = "three_clips") -> dict[str, Any]:
    from lmms_eval.evaluator import simple_evaluate  # pyright: ignore[reportMissingImports]
    from lmms_eval.tasks import TaskManager  # pyright: ignore[reportMissingImports]

    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    results = simple_evaluate(model=model, tasks=[name], task_manager=manager, log_samples=True, bootstrap_iters=0)
    assert results is not None
    return results


def answers(model: Any, tasks: Path) -> list[str]:
    samples = evaluate(model, tasks)["samples"]["three_clips"]
    return [sample["filtered_resps"][0] for sample in sorted(samples, key=lambda sample: sample["doc_id"])]


def save_other_checkpoint(name: str, folder: Path) -> None:
    from tiny_models_checkpoint import save_checkpoint

    save_checkpoint(name, folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)


def test_settings_are_taken_out_of_the_model_arguments() -> None:
    arguments = {"pretrained": "x", "device": "cpu", "fps": 2.0}
    settings = {"alpha_k": 2, "alpha_v": 0.5, "pca_rank": "none", "n_clusters": "auto", "decode": "prefill"}
    config, rest = split_settings(arguments | settings)
    assert config == VideoAnchorConfig(alpha_k=2, alpha_v=0.5, pca_rank=None, n_clusters="auto", decode="prefill")
    assert rest == arguments


def test_each_setting_of_the_scores_may_be_given() -> None:
    """Those that it has from the solver's settings, too."""
    scores: dict[str, Any] = {"scorer": "knn", "score": "projector", "assign_labels": "kmeans", "random_state": 3}
    solver: dict[str, Any] = {"affine": False, "alpha_e": 1.0, "alpha_z": 2.0, "tol": 0.1, "memory_budget": 2**20}
    gate = {"alpha_k": 2, "alpha_v": 0.5}
    config, rest = split_settings(gate | scores | solver)
    assert (config, rest) == (VideoAnchorConfig(**gate, **scores, **solver), {})


def test_preset_and_reproduce() -> None:
    config, rest = split_settings({"preset": "internvl2-8b", "alpha_v": 1, "reproduce": True})
    assert config == VideoAnchorConfig.preset("internvl2-8b", alpha_v=1).reproduce()
    assert rest == {}
    assert split_settings({"preset": "internvl2-8b", "reproduce": False})[0] == VideoAnchorConfig.preset("internvl2-8b")


@pytest.mark.parametrize(
    ("arguments", "error", "named"),
    [
        ({}, ValueError, "alpha_k"),
        ({"alpha_k": 1}, ValueError, "alpha_v"),
        ({"alpha_k": -1, "alpha_v": 1}, ValueError, "alpha_k"),
        ({"alpha_k": "much", "alpha_v": 1}, TypeError, "alpha_k"),
        ({"alpha_k": 1, "alpha_v": 1, "scorer": "best"}, ValueError, "scorer"),
        ({"alpha_k": 1, "alpha_v": 1, "reproduce": "yes"}, TypeError, "reproduce"),
        ({"preset": "gpt"}, ValueError, "gpt"),
    ],
)
def test_wrong_settings_are_named(arguments: dict[str, Any], error: type[Exception], named: str) -> None:
    with pytest.raises(error, match=named):
        split_settings(arguments)


@needs_lmms_eval
def test_entry_point_imports_nothing_heavy() -> None:
    program = (
        "import sys; from importlib.metadata import entry_points\n"
        "(point,) = [p for p in entry_points(group='lmms_eval.models') if p.value.startswith('videoanchor_triton')]\n"
        "point.load()\n"
        "print([name for name in ('torch', 'transformers', 'triton', 'numpy', 'sklearn') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "[]"


@needs_lmms_eval
@pytest.mark.parametrize("name", MODELS)
def test_models_are_found_by_entry_point(name: str) -> None:
    from lmms_eval.models import get_model  # pyright: ignore[reportMissingImports, reportAttributeAccessIssue]

    assert get_model(name).__module__.startswith("videoanchor_triton.integrations.lmms_eval")
    assert not get_model(name).is_simple


def run_command_line(model: str, arguments: str, tasks: Path, folder: Path) -> "subprocess.CompletedProcess[str]":
    """`python -m lmms_eval`, with the results in `folder / "out"`."""
    command = [sys.executable, "-m", "lmms_eval", "--model", model, "--model_args", arguments, "--device", "cpu"]
    command += ["--tasks", "three_clips", "--include_path", str(tasks)]
    command += ["--output_path", str(folder / "out"), "--log_samples"]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "hf"), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, timeout=240, cwd=folder, env=environment | offline)


@needs_lmms_eval
def test_command_line_to_results_file(checkpoint: Path, tasks: Path, tmp_path: Path) -> None:
    arguments = f"pretrained={checkpoint},{SMALL},alpha_k=9,alpha_v=2,n_clusters=3,tol=0.1"
    done = run_command_line(MODELS[0], arguments, tasks, tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    (written,) = (tmp_path / "out").rglob("*_results.json")
    results = json.loads(written.read_text())
    assert results["results"]["three_clips"]["accuracy,none"] in {0, 1 / 3, 2 / 3, 1}
    assert results["n-samples"]["three_clips"]["effective"] == 3
    assert results["config"]["model"] == MODELS[0]
    assert results["config"]["model_args"] == arguments
    (samples,) = (tmp_path / "out").rglob("*_samples_three_clips.jsonl")
    assert len(samples.read_text().splitlines()) == 3
    read = read_result(tmp_path / "out")  # as `videoanchor compare` does
    assert [row.score for row in read.rows.values()].count(None) == 0
    assert (len(read.rows), read.harness, read.card["frames"]) == (3, "lmms-eval", {"max_frames": 4})


@needs_lmms_eval
@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ("pretrained=there_is_none,alpha_k=1,alpha_v=1,scorer=best", 2, "--model_args: scorer"),
        ("pretrained=there_is_none,device_map=cpu,alpha_k=1,alpha_v=1", 1, "the model cannot be loaded"),
    ],
    ids=["setting", "checkpoint"],
)
def test_command_line_fails(arguments: str, code: int, message: str, tasks: Path, tmp_path: Path) -> None:
    done = run_command_line(MODELS[0], arguments, tasks, tmp_path)
    assert (done.returncode, message in done.stderr) == (code, True), done.stderr[-3000:]
    assert not list((tmp_path / "out").rglob("*_results.json"))


@needs_lmms_eval
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ("alpha_k=1", "the strength of the gate is not known"),
        ("alpha_k=1,alpha_v=2,n_cluster=8", "unknown n_cluster: expected "),
        ("alpha_k=-1,alpha_v=2", "alpha_k"),
    ],
    ids=["missing", "misspelt", "out-of-range"],
)
def test_wrong_settings_exit_with_2(name: str, wrong: str, named: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Before anything is loaded; also what lmms-eval's own class would pass over."""
    with pytest.raises(SystemExit) as ended:
        load_model(name, f"pretrained=there_is_none,device_map=cpu,{wrong}")
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith(f"--model_args: {named}")


@needs_lmms_eval
def test_alpha_0_answers_as_lmms_evals_own_class(checkpoint: Path, tasks: Path) -> None:
    plain = answers(load_model("qwen2_5_vl", f"pretrained={checkpoint},{SMALL}"), tasks)
    baseline = load_model(MODELS[0], f"pretrained={checkpoint},{SMALL},alpha_k=0,alpha_v=0")
    assert answers(baseline, tasks) == plain
    assert {result.labels.unique().numel() for result in baseline.handle.last} == {1}, "nothing is scored"
    gated = load_model(MODELS[0], f"pretrained={checkpoint},{SMALL},{GATE}")
    assert answers(gated, tasks) != plain
    assert gated.handle.last[0].labels.unique().numel() == 3


@needs_lmms_eval
def test_batches_answer_as_single_questions(checkpoint: Path, tasks: Path) -> None:
    arguments = f"pretrained={checkpoint},{SMALL},{GATE},attn_implementation=sdpa"
    alone, together = load_model(MODELS[0], arguments), load_model(MODELS[0], arguments, batch_size=3)
    assert answers(together, tasks) == answers(alone, tasks)
    assert len(together.handle.last) == 3


@needs_lmms_eval
@pytest.mark.parametrize(
    ("name", "n_frames"), [("internvl_videoanchor", "num_frames"), ("llava_onevision_videoanchor", "max_frames_num")]
)
def test_other_models(name: str, n_frames: str, tasks: Path, tmp_path: Path) -> None:
    save_other_checkpoint(name.removesuffix("_videoanchor"), tmp_path)
    arguments = f"pretrained={tmp_path},device_map=cpu,{n_frames}=6,"
    gated = load_model(name, arguments + GATE)
    answers_with_gate = answers(gated, tasks)
    n_tokens = len(gated.handle.last[0].scores)
    assert n_tokens // 4 == 4, "4 tokens a frame, and the last clip has 4 frames, fewer than 6"
    baseline = answers(load_model(name, arguments + "alpha_k=0,alpha_v=0"), tasks)
    assert baseline != answers_with_gate
    ungated = load_model(name, arguments + GATE)
    ungated.handle.disable()
    assert answers(ungated, tasks) == baseline


@pytest.mark.parametrize(("clip", "expected"), [(0, [0, 1, 2, 4, 5, 7]), (2, [0, 1, 2, 3])], ids=["longer", "shorter"])
def test_frames_are_sampled_and_short_clips_taken_whole(clip: int, expected: list[int], tasks: Path) -> None:
    processor = SimpleNamespace()
    set_frame_sampling(processor, 6, sample_evenly(6))
    (frames,), (details,) = processor.fetch_videos([str(tasks / f"clip{clip}.mp4")])
    assert list(details.frames_indices) == expected
    assert len(frames) == len(expected)


def test_frames_by_the_processor_itself(tasks: Path) -> None:
    processor = SimpleNamespace()
    set_frame_sampling(processor, 3)
    _, details = processor.fetch_videos(
        str(tasks / "clip0.mp4"), lambda metadata, **_: [1, metadata.total_num_frames - 2]
    )
    assert list(details.frames_indices) == [1, 6]


@needs_lmms_eval
@pytest.mark.parametrize("name", ["internvl_videoanchor", "llava_onevision_videoanchor"])
def test_a_failure_is_no_wrong_answer(name: str, tasks: Path, tmp_path: Path) -> None:
    save_other_checkpoint(name.removesuffix("_videoanchor"), tmp_path)
    model = load_model(name, f"pretrained={tmp_path},device_map=cpu,{GATE}")

    def fail(*_args: Any, **_kwargs: Any) -> None:
        raise MemoryError("too many tokens")

    model.model.generate = fail
    with pytest.raises(SystemExit, match="too many tokens"):
        evaluate(model, tasks)
    assert model.model.generate is fail


@pytest.fixture
def all_angles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Four questions in the data set's format: a pair, one without its twin, one without images and its own twin."""
    from PIL import Image

    generator = np.random.default_rng(0)
    for view in range(3):
        Image.fromarray(generator.integers(0, 255, (48, 64, 3), dtype=np.uint8)).save(tmp_path / f"view{view}.png")
    rows = [
        ("0", "1", "counting", "EgoHumans", ["view0.png", "view1.png"]),
        ("1", "0", "counting", "EgoHumans", ["view1.png", "view0.png", "view2.png"]),
        ("2", "9", "relative_distance", "EgoHumans", ["view2.png", "view0.png"]),
        ("3", "3", "manipulation", "Ego-Exo4D", ["not_there.png"]),
    ]
    names = ("index", "pair_idx", "category", "sourced_dataset", "image_path")
    question = {"question": "How many people are there?", "A": "two", "B": "three", "C": "four"}
    documents = [
        {**dict(zip(names, row, strict=True)), **question, "folder": f"scene{n // 2}", "answer": "B"}
        for n, row in enumerate(rows)
    ]
    (tmp_path / "data.json").write_text(json.dumps(documents))
    monkeypatch.setenv("ALL_ANGLES_BENCH", str(tmp_path))
    return tmp_path


def all_angles_functions() -> Any:
    path = TASKS_FOLDER / "all_angles_bench" / "utils.py"
    spec = importlib.util.spec_from_file_location("all_angles_utils", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_all_angles_metrics(all_angles: Path) -> None:
    functions = all_angles_functions()
    documents: Sequence[dict[str, Any]] = json.loads((all_angles / "data.json").read_text())
    text = functions.doc_to_text(documents[0], {"post_prompt": "Letter?"})
    assert text == "Question: How many people are there?\nOptions:\nA. two\nB. three\nC. four\nLetter?"
    assert [image.size for image in functions.doc_to_visual(documents[1])] == [(64, 48)] * 3
    with pytest.raises(FileNotFoundError, match="not_there"):
        functions.doc_to_visual(documents[3])
    replies = ("(B) three", "A", "The answer is B.", "none")
    scored = [functions.process_results(doc, [reply]) for doc, reply in zip(documents, replies, strict=True)]
    assert [one["accuracy"]["score"] for one in scored] == [1, 0, 1, 0]
    assert [one["counting"]["score"] for one in scored[:2]] == [1, 0]
    assert [entry["aggregation"]([one["accuracy"] for one in scored]) for entry in functions.METRICS[:1]] == [0.5]
    assert "counting" not in scored[2]
    items = [one["pairs_inconsistent"] for one in scored]
    assert (functions.pairs_both_correct(items), functions.pairs_inconsistent(items)) == (0, 1)
    both = [functions.process_results(doc, ["B"])["pairs_both_correct"] for doc in documents]
    assert (functions.pairs_both_correct(both), functions.pairs_inconsistent(both)) == (1, 0)
    assert np.isnan(functions.pairs_both_correct(items[2:]))
    for wrong in ({"answer": "D"}, {"category": "cooking"}):
        with pytest.raises(ValueError, match="question 0"):
            functions.process_results(documents[0] | wrong, ["B"])


def test_all_angles_folder_is_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ALL_ANGLES_BENCH", raising=False)
    with pytest.raises(ValueError, match="ALL_ANGLES_BENCH"):
        all_angles_functions()
    monkeypatch.setenv("ALL_ANGLES_BENCH", str(tmp_path))
    with pytest.raises(ValueError, match="ALL_ANGLES_BENCH"):
        all_angles_functions()


@needs_lmms_eval
@pytest.mark.parametrize("name", ["qwen2_5_vl", "llava_onevision", "internvl"])
@pytest.mark.usefixtures("all_angles")
def test_all_angles_task(name: str, checkpoint: Path, tmp_path: Path) -> None:
    folder, arguments = checkpoint, SMALL
    if name != "qwen2_5_vl":
        folder, arguments = tmp_path / "checkpoint", "device_map=cpu"
        save_other_checkpoint(name, folder)
    model = load_model(f"{name}_videoanchor", f"pretrained={folder},{arguments},{GATE}")
    results = evaluate(model, TASKS_FOLDER, "all_angles_bench_egohumans")
    assert results["n-samples"]["all_angles_bench_egohumans"]["effective"] == 3
    scores = results["results"]["all_angles_bench_egohumans"]
    assert scores["accuracy_stderr_clustered,none"] != "N/A"
    assert {"accuracy,none", "counting,none", "relative_distance,none", "pairs_inconsistent,none"} <= scores.keys()
    assert model.handle.last[0] is not None
