"""What runs decide, and how it is written into kernels/measured.py.

All results here are made up: no GPU printed them.
"""

import importlib
import json
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from videoanchor_triton.kernels import aot, measured
from videoanchor_triton.kernels.dispatch import available_backends
from videoanchor_triton.kernels.tiles import Tile, backward_tiles, paged_tile, prefill_tile, short_queries

apply: Any = importlib.import_module("benchmarks.helpers.apply")
candidates: Any = importlib.import_module("benchmarks.attention.helpers.candidates")
decisions: Any = importlib.import_module("benchmarks.helpers.decisions")
environment: Any = importlib.import_module("benchmarks.helpers.environment")
mixed_tasks: Any = importlib.import_module("benchmarks.attention.helpers.mixed_tasks")
gpu_check: Any = importlib.import_module("benchmarks.gpu_check")
record: Any = importlib.import_module("benchmarks.helpers.record")
resume: Any = importlib.import_module("benchmarks.helpers.resume")
settled: Any = importlib.import_module("benchmarks.attention.helpers.settled")

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
KEY = ("sm_90", 128)
KEYS = {"PAGED": (*KEY, 16)}
ENVIRONMENT = {"device": "NVIDIA Made Up", "driver": "1.2", "torch": "2.13.0", "triton": "3.7.1", "cuda": "13.0"} | {
    "commit": "HEAD", "dirty": "false", "target": "sm_90", "sizes": "full",
}  # fmt: skip
CHECK = record.Row("correctness", "a check", "post-exp", status="ok")
CHECKS = [replace(CHECK, section=section) for section in record.CHECKS]
ALL_FASTER = {
    "PREFILL": (128, 64, 8, 3),
    "PAGED": (16, 64, 2, 4),
    "SHORT_QUERIES": 63,
    "BACKWARD": ((64, 64, 4, 2), (32, 128, 8, 3)),
}


def timed(section: str, contender: str, ms: float, spread: float = 0.02, case: str = "a case", **more: Any) -> Any:
    times = {"ms": ms, "ms_p20": ms * (1 - spread), "ms_p80": ms * (1 + spread)}
    return record.Row(section, case, contender, head_dim=128, status="ok", **times, **more)


def candidate(table: str, value: Any, ms: float, **more: Any) -> list[Any]:
    """What holds now in 1 ms, and a candidate."""
    section = {"PREFILL": "prefill", "BACKWARD": "backward", "PAGED": "mixed"}.get(table, "decode")
    now = timed(section, decisions.AGAINST[table], 1.0)
    return [now, replace(timed(section, decisions.candidate_name(table, value), ms), **more)]


def switches(log_bias: float, hopper: float) -> list[Any]:
    times = {decisions.GATED: 1.0, "ours, gated, log-bias": log_bias, "ours, hopper, gated": hopper}
    return [timed("prefill", name, ms) for name, ms in times.items()]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return Path(shutil.copy(ROOT / "kernels" / "measured.py", tmp_path))


@pytest.fixture
def run(tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[str, dict[str, Any]]]:
    """Apply made-up runs, each (rows, changes of the environment): what is said, and the tables that were written."""
    monkeypatch.setattr(apply, "_is_ancestor", lambda commit: commit == "HEAD")

    def applied(*runs: tuple[list[Any], dict[str, str]]) -> tuple[str, dict[str, Any]]:
        folders = [tmp_path / str(i) for i in range(len(runs))]
        for folder, (rows, changes) in zip(folders, runs, strict=True):
            folder.mkdir(exist_ok=True)
            record.write(folder, ENVIRONMENT | changes, [*CHECKS, *rows])
        said = apply.apply(folders, [CHECK.key], source)
        return said, {name: value for name, value in runpy.run_path(str(source)).items() if name.isupper()}

    return applied


def test_what_is_faster_is_written_and_taken(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [row for table, value in ALL_FASTER.items() for row in candidate(table, value, 0.8)]
    said, tables = run(([*rows, *switches(0.9, 0.7)], {}))
    for table, value in {**ALL_FASTER, "LOG_BIAS": True, "HOPPER": True}.items():
        key = KEYS.get(table, KEY)
        assert tables[table] == {key: value}, table
        assert f"{table}[{key}] = {value}: " in said
        monkeypatch.setitem(getattr(measured, table), key, tables[table][key])
    assert tables["SHOWN_RIGHT"] == {("NVIDIA Made Up", "3.7.1")}
    assert tables["SOURCES"] == (("NVIDIA Made Up", "1.2", "2.13.0", "3.7.1", "HEAD"),)
    # the functions that launches and the compilation ahead of time ask
    assert prefill_tile("sm_90", 128, 2) == Tile(128, 64, 8, 3)
    assert prefill_tile("sm_90", 128, 2, window=True) == prefill_tile("sm_90", 128, 4)._replace(**HOPPER_TILE)
    assert prefill_tile("sm_90", 128, 4) != Tile(128, 64, 8, 3)
    assert paged_tile("sm_90", 128, 2, 7) == Tile(16, 64, 2, 4)
    assert paged_tile("sm_90", 128, 2, 17).queries > 16
    assert paged_tile("sm_90", 128, 4, 7) != Tile(16, 64, 2, 4)
    assert backward_tiles("sm_90", 128, 2) == (Tile(64, 64, 4, 2), Tile(32, 128, 8, 3))
    assert (short_queries("sm_90", 128), short_queries("sm_90", 64), short_queries("interpreter", 16)) == (63, 512, 16)


HOPPER_TILE = {"queries": 128, "keys": 128, "warps": 8, "stages": 2}


def test_the_file_is_the_same_each_time_and_as_ruff_writes_it(run: Any, source: Path) -> None:
    before = source.read_text()
    runs = [(candidate("PREFILL", (128, 64, 8, 3), 0.5), {}), (switches(0.5, 2.0), {"device": "NVIDIA Other"})]
    run(*runs)
    first = source.read_text()
    shutil.copy(ROOT / "kernels" / "measured.py", source)
    assert source.read_text() == before
    run(*reversed(runs))
    assert source.read_text() == first
    assert first.count("\n#") == before.count("\n#")
    if shutil.which("ruff") or (Path(sys.executable).parent / "ruff").exists():
        ruff = shutil.which("ruff") or str(Path(sys.executable).parent / "ruff")
        command = [ruff, "format", "--check", "--config", str(ROOT / "pyproject.toml"), str(source)]
        assert subprocess.run(command, capture_output=True).returncode == 0


def test_a_difference_within_the_spread_decides_nothing(run: Any) -> None:
    _, tables = run((candidate("PREFILL", (128, 64, 8, 3), 0.97), {}))
    assert tables["PREFILL"] == {}
    _, tables = run((candidate("PREFILL", (128, 64, 8, 3), 0.95), {}))
    assert tables["PREFILL"] == {KEY: (128, 64, 8, 3)}


def test_a_candidate_that_is_wrong_anywhere_is_left_out(run: Any) -> None:
    rows = candidate("PREFILL", (128, 64, 8, 3), 0.5)
    wrong = replace(rows[1], case="another case", status="wrong", ms=None)
    said, tables = run(([*rows, wrong], {}))
    assert tables["PREFILL"] == {}
    assert tables["SHOWN_RIGHT"] == {("NVIDIA Made Up", "3.7.1")}  # no kernel of ours is wrong
    assert "not shown right" not in said


@pytest.mark.parametrize("section", record.CHECKS)
def test_a_wrong_row_keeps_the_device_from_being_shown_right(run: Any, section: str) -> None:
    for status in ("wrong", "failed"):
        wrong = replace(CHECK, section=section, case="planted", status=status)
        said, tables = run(([wrong], {}), ([], {"device": "NVIDIA Other"}))
        assert tables["SHOWN_RIGHT"] == {("NVIDIA Other", "3.7.1")}
        assert f"not shown right: NVIDIA Made Up 3.7.1: {section}, planted" in said
    _, tables = run(([replace(CHECK, case="b", status="skipped", reason="needs a GPU of sm_90")], {}))
    assert ("NVIDIA Made Up", "3.7.1") in tables["SHOWN_RIGHT"]


def test_two_devices_of_a_target_decide_together(run: Any) -> None:
    runs = [(candidate("PAGED", (16, 64, 2, 4), ms), {"device": name}) for name, ms in (("A", 0.7), ("B", 1.5))]
    _, tables = run(*runs)
    assert tables["PAGED"] == {}
    assert len(tables["SOURCES"]) == 2
    _, tables = run(runs[0], (candidate("PAGED", (16, 64, 2, 4), 1.2), {"device": "B"}))
    assert tables["PAGED"] == {KEYS["PAGED"]: (16, 64, 2, 4)}


def test_the_paged_kernel_ends_where_prefill_is_first_faster() -> None:
    rows = []
    for queries, ms in ((4, 1.4), (8, 0.8), (16, 0.5)):
        name = decisions.candidate_name("SHORT_QUERIES", queries - 1)
        case = f"Nq={queries}"
        rows += [timed("decode", decisions.FEW_QUERIES, 1.0, case=case), timed("decode", name, ms, case=case)]
    found = decisions.chosen(decisions.trials(ENVIRONMENT, rows))
    trial, faster = found["SHORT_QUERIES", KEY]
    assert (trial.value, faster) == (7, True)


def test_the_summary_says_what_each_figure_decides() -> None:
    rows = [*candidate("PREFILL", (128, 64, 8, 3), 0.8), *candidate("PAGED", (16, 64, 2, 4), 1.1), *switches(1.2, 0.9)]
    text = record.summary(ENVIRONMENT, rows)
    lines = {line.split(" | ")[0]: line for line in text.splitlines() if line.startswith("| ")}
    assert lines["| tile of prefill (query rows, keys, warps, stages)"].endswith("20% faster |")
    paged = lines["| tile of the paged kernel (query rows, keys, warps, stages)"]
    assert " | sm_90, D=128, 16 rows | " in paged
    assert paged.endswith("nothing: within the spread, or slower |")
    assert lines["| prefill by the Hopper kernel"].endswith("10% faster |")
    assert "candidate" not in text


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"dirty": "true"}, "uncommitted changes"),
        ({"device": "cpu, Triton interpreter"}, "run on a GPU"),
        ({"sizes": "small"}, "run on a GPU"),
        ({"commit": "1234567"}, "of commit 1234567, which is not in HEAD"),
        ({"commit": "unknown", "dirty": "unknown", "source": "abc"}, "of other sources than those here"),
    ],
    ids=["dirty", "cpu", "small", "another branch", "other sources"],
)
def test_results_that_cannot_be_applied_are_one_sentence(
    run: Any, source: Path, changes: dict[str, str], said: str
) -> None:
    before = source.read_text()
    with pytest.raises(resume.RefusedError, match=said):
        run(([], changes))
    assert source.read_text() == before


def test_a_copy_without_git_is_known_by_its_sources(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    same = {"commit": "unknown", "dirty": "unknown", "source": environment.source_digest()}
    monkeypatch.setattr(apply, "commit", lambda: {"commit": "HEAD", "dirty": "false"})
    _, tables = run(([], same))
    assert tables["SOURCES"] == ((*(ENVIRONMENT[name] for name in ("device", "driver", "torch", "triton")), "HEAD"),)
    monkeypatch.setattr(apply, "commit", lambda: {"commit": "HEAD", "dirty": "true"})
    with pytest.raises(resume.RefusedError, match="uncommitted changes"):
        run(([], same))


def test_results_that_are_not_complete_are_refused(run: Any, source: Path, tmp_path: Path, monkeypatch: Any) -> None:
    before = source.read_text()
    cut = replace(CHECK, case="cut", status="skipped", reason="time budget")
    with pytest.raises(resume.RefusedError, match=f"the results in {tmp_path}/0 lack 1 checks: run the same gpu_check"):
        run(([cut], {}))
    monkeypatch.setitem(globals(), "CHECKS", [])
    for rows in ([], [CHECK]):
        with pytest.raises(resume.RefusedError, match="checks: run the same"):
            run((rows, {}))
    with pytest.raises(resume.RefusedError, match="nothing has no gpu_check"):
        apply.apply([tmp_path / "nothing"], [], source)
    assert source.read_text() == before


def test_the_command_refuses_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "gpu_check.json").write_text(json.dumps(ENVIRONMENT | {"dirty": "true", "rows": [asdict(CHECK)]}))
    assert gpu_check.main(["--apply", str(tmp_path)]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    for arguments in ([], ["--out", str(tmp_path), "--apply", str(tmp_path)]):
        with pytest.raises(SystemExit):
            gpu_check.main(arguments)


@pytest.mark.parametrize("section", ["prefill", "mixed", "decode", "backward"])
def test_every_candidate_is_right_and_holds_while_it_is_timed(section: str, monkeypatch: pytest.MonkeyPatch) -> None:
    held: list[dict[str, Any]] = []
    for module, name in (("prefill", "prefill_tile"), ("paged", "paged_tile"), ("backward", "backward_tiles")):
        place = importlib.import_module(f"videoanchor_triton.kernels.{module}")

        function = getattr(place, name)

        def asked(*given: Any, real: Any = function, **options: Any) -> Any:
            held.append({table: dict(getattr(measured, table)) for table in ALL_FASTER})
            return real(*given, **options)

        monkeypatch.setattr(place, name, asked)
    tasks = list((mixed_tasks.mixed_tasks if section == "mixed" else partial(candidates.candidate_tasks, section))(CPU))
    tasks = [task for task in tasks if section != "mixed" or task.row.contender.startswith(decisions.CANDIDATE)]
    assert tasks
    for task in tasks:
        held.clear()
        row = task.run(task.row)
        assert row.status == "ok", row
        assert held
        if row.contender.startswith(decisions.CANDIDATE):
            (table, key, value), _ = decisions._tried(row, "interpreter")
            assert all(tables[table].get(key) == value for tables in held)
    assert not any(getattr(measured, table) for table in ALL_FASTER)


def test_an_applied_tile_is_the_one_that_is_compiled_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    launched: dict[str, dict[str, Any]] = {}

    class Recorded:
        def __init__(self, name: str) -> None:
            self.name = name

        def __getitem__(self, _: Any) -> Callable[..., Any]:
            return lambda **given: launched.update({self.name: given})

    kernels = {"prefill": ("prefill_kernel",), "prescale": ("prescale_kernel",), "plan": ("plan_kernel",)}
    kernels |= {"paged": ("paged_kernel", "merge_kernel"), "backward": ("d_queries_kernel", "d_keys_kernel")}
    for module, names in kernels.items():
        for name in names:
            place = importlib.import_module(f"videoanchor_triton.kernels.{module}")
            monkeypatch.setattr(place, name, Recorded(name))
    monkeypatch.setitem(measured.PREFILL, KEY, (64, 64, 4, 3))
    monkeypatch.setitem(measured.PAGED, (*KEY, 16), (16, 64, 2, 4))
    monkeypatch.setitem(measured.BACKWARD, KEY, ((64, 64, 4, 2), (32, 128, 8, 2)))
    for kernel in ("post-exp", "decode positions", "dq"):
        aot.launch_of(kernel, *KEY, "bf16")()
    assert launched["prefill_kernel"]["TILE"] == Tile(64, 64, 4, 3)
    assert launched["paged_kernel"]["TILE"] == Tile(16, 64, 2, 4)
    for name, tile in zip(kernels["backward"], measured.BACKWARD[KEY], strict=True):
        assert launched[name]["TILE"] == Tile(*tile)


def test_the_hopper_kernel_is_on_where_it_was_found_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    dispatch = importlib.import_module("videoanchor_triton.kernels.dispatch")
    monkeypatch.setattr(dispatch, "triton_target", lambda _: ("sm_90", ""))
    assert available_backends("cpu")["hopper"] == "prefill only, off unless VIDEOANCHOR_HOPPER says so"
    monkeypatch.setitem(measured.HOPPER, KEY, True)
    assert available_backends("cpu")["hopper"] == "prefill only, head dim 128 unless VIDEOANCHOR_HOPPER says so"


def test_every_candidate_fits_the_target() -> None:
    """That none spills was compiled when the lists were made; what a wrong line would break first is seen here."""
    for table in ("PREFILL", "PAGED"):
        for key, tiles in getattr(settled, table).items():
            tried = settled.values(table, key)
            assert settled.present(table, key) not in tried, key
            assert {*tried} <= {*tiles}
            assert tried
            for queries, keys, warps, *_ in tiles:
                assert queries <= (key[2] if table == "PAGED" else 128)
                # a gate's load with fewer elements than threads is repeated in each of them
                assert keys >= 32 * warps or queries > 16 or key[0] == "interpreter", key
    for (target, size), tables in settled.BACKWARD.items():
        assert all(
            Tile(*t) != now for tiles, now in zip(tables, backward_tiles(target, size, 2), strict=True) for t in tiles
        )
