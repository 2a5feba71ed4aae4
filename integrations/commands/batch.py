"""`videoanchor batch`: many questions about many videos, one row a result."""

import argparse
import json
import sys
from contextlib import redirect_stdout
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import InputError
from .shared import (
    Commands,
    add_config_options,
    add_model_options,
    add_tensor_parallel_option,
    add_video_options,
    check_extras,
    check_tensor_parallel,
    config_of,
)

if TYPE_CHECKING:
    from ..batch.results import ResultsLog

_EPILOG = """\
examples:
  videoanchor batch questions.jsonl --model NAME_OR_PATH --alpha-k A --alpha-v A --out results
  videoanchor batch videos/ --question "What happens?" --model NAME_OR_PATH --preset internvl2-8b --out results

A line of questions.jsonl: {"id": "a1", "video": "clips/a.mp4", "question": "What is left of the door?"}
Paths start at the file's folder. A CSV has the same columns. Other columns are carried to the results as input.NAME.

--out gets results.jsonl (a line a row, written as each finishes), results.csv, results.parquet (when the run ends or
is interrupted) and scores/ (the scores of the videos, used again by later runs). The same command goes on where a run
stopped, however it stopped.

A row is known by its video (the path, and the content by size and the MiB at either end), question and settings.
Change a setting, and its rows are answered anew, beside the others. Replace a video, or bring one that was missing, and
its rows are answered anew; the new results take the place of the old ones. Take a video away, and its results stay.
Exit code 1: some rows failed; their reason is in the results, --retry-failed tries them again.
"""


def add(commands: Commands) -> None:
    """Adds the command."""
    batch = commands.add_parser(
        "batch",
        help="many questions about many videos, resumable, on one GPU or a cluster",
        description="Asks a checkpoint every question of INPUT with the gate on.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    batch.add_argument("input", type=Path, metavar="INPUT", help="a .jsonl file, a .csv file, or a folder of videos")
    batch.add_argument(
        "--question", action="append", default=[], metavar="TEXT", help="for a folder: of every video; may be repeated"
    )
    batch.add_argument("--out", required=True, type=Path, metavar="DIR")
    add_model_options(batch)
    add_video_options(batch)
    batch.add_argument("--max-new-tokens", type=int, default=128, metavar="N", help="default: %(default)s")
    batch.add_argument("--retry-failed", action="store_true", help="answer the rows that failed again")
    batch.add_argument(
        "--tables", nargs="*", choices=("csv", "parquet"), default=["csv", "parquet"], help="default: csv parquet"
    )
    batch.add_argument("--json", action="store_true", help="print a summary as JSON, and no progress")
    sharing = batch.add_argument_group("what questions about one video share")
    sharing.add_argument("--cache", type=Path, metavar="DIR", help="of the scores; default: OUT/scores")
    sharing.add_argument(
        "--cache-size", type=float, default=1.0, metavar="GIB", help="the least recently used go; default: %(default)s"
    )
    sharing.add_argument(
        "--whole-prompts",
        action="store_true",
        help="compute each prompt in one pass, to the last bit as `videoanchor run` does; default: the prompt up to "
        "the end of a video is computed once",
    )
    engine = batch.add_argument_group("engine")
    engine.add_argument(
        "--engine",
        choices=("local", "ray"),
        default="local",
        help="local: one model in this process (default). ray: Ray Data, an actor a GPU, on this machine or the "
        "cluster that RAY_ADDRESS names; INPUT's videos, the checkpoint and OUT must be reachable from all of it",
    )
    add_tensor_parallel_option(engine)
    engine.add_argument("--actors", type=int, metavar="N", help="with ray; default: as many as there are GPUs for")
    engine.add_argument(
        "--gpus-per-actor",
        type=float,
        metavar="N",
        help="with ray; default: those of --tensor-parallel, or 0 without a GPU",
    )
    add_config_options(batch)
    batch.set_defaults(command=_batch)


def _batch(args: argparse.Namespace) -> int:
    from ..batch.job import run_batch
    from ..batch.progress import BatchProgress
    from ..batch.results import ResultsLog, write_whole
    from ..batch.rows import read_rows, with_fingerprints, without_repeats
    from ..output import check_folder, versions

    _check(args)
    job = _job(args)
    rows, repeats = without_repeats(read_rows(args.input, args.question))
    check_folder(args.out)
    for number, first in repeats:
        print(f"row {number} repeats row {first}: answered once", file=sys.stderr)
    progress = BatchProgress(enabled=not args.json)
    with ResultsLog(args.out / "results.jsonl") as log:
        settings = {"settings": job.settings(), "versions": versions()}
        path = args.out / f"settings-{job.settings_hash()}.json"
        write_whole(path, (json.dumps(settings, indent=2, ensure_ascii=False) + "\n").encode())
        rows, replaced = with_fingerprints(rows, log.records, job.settings_hash())
        n_outdated = sum(key not in log.records for key in replaced.values())
        if n_outdated:
            print(f"{n_outdated} results are of videos that have changed: answered anew", file=sys.stderr)
        try:
            with redirect_stdout(sys.stderr):  # Ray prints what happens to its actors
                run_batch(job, rows, log, _engine(args, progress), progress, retry_failed=args.retry_failed)
        except KeyboardInterrupt:
            progress.close()
            print(f"{args.out}: {progress.n_done} more rows are done; the same command goes on", file=sys.stderr)
            _conclude(args, log, replaced)
            raise
        finally:
            progress.close()
        tables = _conclude(args, log, replaced)
        results = [log.records[row.key(job.settings_hash())] for row in rows]
    return _report(args, results, [log.path, *tables], progress)


def _conclude(args: argparse.Namespace, log: "ResultsLog", replaced: dict[str, str]) -> list[Path]:
    """Removes results that have been replaced, as far as the new ones are there, and writes the tables."""
    from ..batch.results import write_tables

    old = {key for key, new in replaced.items() if new in log.records}
    if old:
        log.drop(old)
    return write_tables(log.records.values(), args.out, args.tables) if log.records else []


def _check(args: argparse.Namespace) -> None:
    """What can be refused before any work."""
    check_extras()
    for name, where, extra in (
        ("pyarrow", "parquet" in args.tables, "batch"),
        ("ray", args.engine == "ray", "ray"),
    ):
        if where and find_spec(name) is None:
            otherwise = ", or leave Parquet out: --tables csv" if name == "pyarrow" else ""
            raise InputError(f"missing {name}: pip install 'videoanchor-triton[{extra}]'{otherwise}")
    if args.max_new_tokens < 1:
        raise InputError(f"--max-new-tokens: expected 1 or more, got {args.max_new_tokens}")
    if not args.cache_size >= 0:
        raise InputError(f"--cache-size: expected 0 or more GiB, got {args.cache_size}")
    if args.engine == "local" and (args.actors is not None or args.gpus_per_actor is not None):
        raise InputError("--actors and --gpus-per-actor: only with --engine ray")
    if args.actors is not None and args.actors < 1:
        raise InputError(f"--actors: expected 1 or more, got {args.actors}")
    if args.gpus_per_actor is not None and not args.gpus_per_actor >= 0:
        raise InputError(f"--gpus-per-actor: expected 0 or more, got {args.gpus_per_actor}")
    if args.tensor_parallel > 1 and args.gpus_per_actor not in (None, 0, args.tensor_parallel):
        raise InputError(
            f"--gpus-per-actor {args.gpus_per_actor:g} and --tensor-parallel {args.tensor_parallel}: each process "
            "of an actor takes a GPU; leave --gpus-per-actor out"
        )
    check_tensor_parallel(args, here=args.engine == "local")


def _job(args: argparse.Namespace) -> Any:
    from ..batch.worker import BatchJob

    return BatchJob(
        model=args.model,
        device=args.device,
        dtype=args.dtype,
        config=config_of(args),
        video={"fps": args.fps, "max_frames": args.max_frames, "sampling": args.sampling, "timeout": args.timeout},
        fit=args.fit,
        max_new_tokens=args.max_new_tokens,
        score_folder=(args.cache or args.out / "scores").absolute(),
        score_bytes=int(args.cache_size * 2**30),
        share_prefill=not args.whole_prompts,
    )


def _engine(args: argparse.Namespace, progress: Any) -> Any:
    from ..batch.job import local_engine
    from ..batch.tensor_parallel import tensor_parallel_engine

    if args.engine == "ray":
        from ..batch.ray_engine import ray_engine

        options = {"gpus_per_actor": args.gpus_per_actor, "tensor_parallel": args.tensor_parallel}
        return partial(ray_engine, n_actors=args.actors, **options)
    if args.tensor_parallel > 1:
        return partial(tensor_parallel_engine, size=args.tensor_parallel, progress=progress.stage)
    return partial(local_engine, progress=progress.stage)


def _report(args: argparse.Namespace, results: list[dict[str, Any]], written: list[Path], progress: Any) -> int:
    failures = [record for record in results if record["status"] == "failed"]
    if args.json:
        summary = {
            "rows": len(results),
            "done": len(results) - len(failures),
            "failed": len(failures),
            "answered_by_this_run": progress.n_done,
            "generated_tokens": progress.n_tokens,
            "seconds": dict(progress.seconds),
            "peak_memory_bytes": progress.peak_memory_bytes,
            "files": [str(path) for path in written],
        }
        print(json.dumps(summary, indent=2))
    else:
        print(f"rows      {len(results)}: {len(results) - len(failures)} done, {len(failures)} failed")
        if progress.n_done:
            print(f"this run  {progress.n_done} answered, {progress.text()}")
        for record in failures[:5]:
            print(f"failed    line {record['line']}: {record['reason']}")
        if failures:
            print("          to try these again: --retry-failed")
        for path in written:
            print(f"wrote     {path}")
    return 1 if failures else 0
