"""`videoanchor batch`: many questions about many videos, one row a result."""

import argparse
import json
import sys
from collections.abc import Iterable
from contextlib import redirect_stdout
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...integrations.errors import InputError
from ..text import json_text, printable
from ..video.names import each
from .shared import (
    Commands,
    add_config_options,
    add_drawing_options,
    add_gate_effect_option,
    add_model_options,
    add_system_option,
    add_tensor_parallel_option,
    add_video_options,
    check_extras,
    check_tensor_parallel,
    config_of,
    download_limit,
    drawing_of,
)

if TYPE_CHECKING:
    from ..batch.results import Record, ResultsLog
    from ..batch.rows import BatchRow
    from ..batch.worker import BatchJob

_EPILOG = """\
examples:
  videoanchor batch questions.jsonl --model NAME_OR_PATH --alpha-k A --alpha-v A --out results
  videoanchor batch videos/ --question "What happens?" --model NAME_OR_PATH --preset internvl2-8b --out results

A line of questions.jsonl: {"id": "a1", "video": "clips/a.mp4", "question": "What is left of the door?"}
Several videos and images: "video": ["clips/a.mp4", "views/door.jpg"], each one of the prompt, in this order.
Paths start at the file's folder. A CSV has the same columns. Other columns are carried to the results as input.NAME.

--out gets results.jsonl (a line a row, written as each finishes), results.csv, results.parquet (when the run ends, is
interrupted or stops; tables of an earlier run also when it starts; rows without a result have the status "unasked")
and scores/ (the scores of the videos, used again by later runs). The same command goes on where a run stopped, however
it stopped.

A row is known by its video (the path, and the content by size and the MiB at either end), question and settings.
Its line and other columns are taken from the file as it is now, in results of earlier runs as well; results of rows
that the file has no more stay in results.jsonl alone. Change a setting, and its rows are answered anew, beside the
others. Replace a video, or bring one that was missing, and its rows are answered anew; the new results take the place
of the old ones. Take a video away, and its results stay.
Exit code 1: some rows failed (their reason is in the results, --retry-failed tries them again), or the run stopped,
because the GPU failed or 5 rows in a row failed for one reason that is not theirs: the rows after those are not asked.
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
    add_system_option(batch)
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
        choices=("local", "ray", "vllm"),
        default="local",
        help="local: one model in this process (default). ray: Ray Data, an actor a GPU, on this machine or the "
        "cluster that RAY_ADDRESS names; INPUT's videos, the checkpoint and OUT must be reachable from all of it. "
        "vllm: vLLM with this package's plug-in, rows of many videos at once",
    )
    engine.add_argument(
        "--engine-options",
        type=_options,
        default="{}",
        metavar="JSON",
        help='with vllm: its engine arguments, as \'{"max_model_len": 32768, "gpu_memory_utilization": 0.8}\'',
    )
    add_tensor_parallel_option(engine)
    engine.add_argument("--actors", type=int, metavar="N", help="with ray; default: as many as there are GPUs for")
    engine.add_argument(
        "--gpus-per-actor",
        type=float,
        metavar="N",
        help="with ray; default: those of --tensor-parallel, or 0 without a GPU",
    )
    add_gate_effect_option(batch)
    add_drawing_options(batch)
    add_config_options(batch)
    batch.set_defaults(command=_batch)


def _options(text: str) -> dict[str, Any]:
    try:
        options = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"expected JSON, got {text!r}: {error}") from None
    if not isinstance(options, dict):
        raise argparse.ArgumentTypeError(f"expected a JSON object, got {text!r}")
    return options


def _batch(args: argparse.Namespace) -> int:
    from ..atomic_write import write_whole
    from ..batch.job import run_batch
    from ..batch.matching import matched, refreshed, with_fingerprints
    from ..batch.progress import BatchProgress
    from ..batch.results import ResultsLog
    from ..batch.rows import read_rows
    from ..batch.stopping import StoppedError
    from ..machine import versions
    from ..output import check_folder

    _check(args)
    job = _job(args)
    rows = read_rows(args.input, args.question, args.system)
    if args.engine == "vllm" and (several := [row.number for row in rows if len(each(row.video)) > 1]):
        raise InputError(
            f"line {several[0]}: several videos, not with --engine vllm, whose plug-in scores each by itself: use "
            "--engine local or ray"
        )
    check_folder(args.out)
    progress = BatchProgress(enabled=not args.json)
    stopped = None
    with ResultsLog(args.out / "results.jsonl") as log:
        settings = {"settings": job.settings(), "versions": versions()}
        path = args.out / f"settings-{job.settings_hash()}.json"
        write_whole(path, (json_text(settings) + "\n").encode())
        rows = with_fingerprints(rows)
        current = refreshed(rows, log.records, _older_settings(args.out, log.records.values()))
        if current != log.records:
            log.replace(current)
        rows, replaced = matched(rows, log.records, job.settings_hash())
        _say_what_is_there(rows, log.records, replaced)
        tables = _Tables(args, log, rows, job, replaced)
        if tables.exist:
            tables.write()  # whoever reads them while this runs, or after it was killed, sees what is missing
        try:
            with redirect_stdout(sys.stderr):  # Ray prints what happens to its actors
                run_batch(job, rows, log, _engine(args, progress), progress, retry_failed=args.retry_failed)
        except StoppedError as error:
            stopped = str(error)
        except (KeyboardInterrupt, OSError):
            progress.close()
            print(
                f"{printable(args.out)}: {progress.n_done} more rows are done; the same command goes on",
                file=sys.stderr,
            )
            tables.write()
            raise
        finally:
            progress.close()
        written = [log.path, *tables.write()]
        kept = sum(one["line"] is not None and one["settings"] != job.settings_hash() for one in log.records.values())
        results = [log.records.get(row.key(job.settings_hash())) for row in rows]
    return _report(args, results, kept, written, progress, stopped)


def _older_settings(out: Path, records: "Iterable[Record]") -> "dict[str, Record]":
    """The columns of the settings of results that were made before results had them."""
    from ..batch.worker import setting_columns

    hashes = {record["settings"] for record in records if "model" not in record}
    files = {name: path for name in hashes if (path := out / f"settings-{name}.json").exists()}
    return {name: setting_columns(json.loads(path.read_bytes())["settings"]) for name, path in files.items()}


def _say_what_is_there(rows: "list[BatchRow]", records: "dict[str, Record]", replaced: dict[str, str]) -> None:
    copies = sum(row.copy > 0 for row in rows)
    if copies:
        print(f"{copies} rows repeat the video and question of another: asked once, reported for each", file=sys.stderr)
    n_outdated = sum(key not in records for key in replaced.values())
    if n_outdated:
        print(f"{n_outdated} results are of videos that have changed: answered anew", file=sys.stderr)
    n_left = sum(record["line"] is None and key not in replaced for key, record in records.items())
    if n_left:
        print(
            f"{n_left} results are of rows or videos that the input has no more: they stay in results.jsonl, the "
            "tables leave them out",
            file=sys.stderr,
        )


class _Tables:
    """What is in the tables: each row of the input as it is now, in this setting and, where there is a result, in
    others."""

    def __init__(
        self,
        args: argparse.Namespace,
        log: "ResultsLog",
        rows: "list[BatchRow]",
        job: "BatchJob",
        replaced: dict[str, str],
    ) -> None:
        self._folder, self._log, self._job, self._replaced = args.out, log, job, replaced
        self._rows = {row.key(job.settings_hash()): row for row in rows}
        there = {name for name in ("csv", "parquet") if (args.out / f"results.{name}").exists()}
        self.exist = bool(there)
        self._formats = {*args.tables, *(there if find_spec("pyarrow") is not None else ())}  # none is left behind

    def write(self) -> list[Path]:
        """Removes results that have been replaced, as far as the new ones are there, and writes the tables."""
        from ..batch.results import write_tables
        from ..batch.worker import unasked

        if not self._log.records:
            return []
        old = self._log.records.keys() & {key for key, new in self._replaced.items() if new in self._log.records}
        if old:
            self._log.drop(old)
        nothing = (unasked(row, self._job.settings_hash()) | self._job.columns() for row in self._rows.values())
        mine = [self._log.records.get(record["key"], record) for record in nothing]
        others = [
            record
            for key, record in self._log.records.items()
            if key not in self._rows and record["line"] is not None and key not in self._replaced
        ]
        others.sort(key=lambda record: (record["settings"], record["line"]))
        return write_tables([*mine, *others], self._folder, self._formats)


def _check(args: argparse.Namespace) -> None:
    """What can be refused before any work."""
    check_extras()
    for name, where, extra in (
        ("pyarrow", "parquet" in args.tables, "batch"),
        ("ray", args.engine == "ray", "ray"),
        ("vllm", args.engine == "vllm", "vllm"),
    ):
        if where and find_spec(name) is None:
            otherwise = ", or leave Parquet out: --tables csv" if name == "pyarrow" else ""
            raise InputError(f"missing {name}: pip install 'videoanchor-triton[{extra}]'{otherwise}")
    for name, least in (("max_new_tokens", 1), ("cache_size", 0), ("actors", 1), ("gpus_per_actor", 0)):
        given = getattr(args, name)
        if given is not None and not given >= least:
            raise InputError(f"--{name.replace('_', '-')}: expected {least} or more, got {given}")
    if args.engine != "ray" and (args.actors is not None or args.gpus_per_actor is not None):
        raise InputError("--actors and --gpus-per-actor: only with --engine ray")
    if args.engine_options and args.engine != "vllm":
        raise InputError("--engine-options: only with --engine vllm")
    if args.engine == "vllm":
        _check_vllm(args)
    if args.tensor_parallel > 1 and args.gpus_per_actor not in (None, 0, args.tensor_parallel):
        raise InputError(
            f"--gpus-per-actor {args.gpus_per_actor:g} and --tensor-parallel {args.tensor_parallel}: each process "
            "of an actor takes a GPU; leave --gpus-per-actor out"
        )
    check_tensor_parallel(args, here=args.engine == "local")


def _check_vllm(args: argparse.Namespace) -> None:
    for option, given, instead in (
        ("--device", args.device != "auto", "CUDA_VISIBLE_DEVICES names the devices"),
        ("--fit", args.fit, "give --max-frames"),
        ("--cache", args.cache is not None, "a video is scored once, as its embeddings are made"),
        ("--whole-prompts", args.whole_prompts, "vLLM shares prompts by itself"),
        ("--gate-effect", args.gate_effect, "a server computes the gated answer alone"),
        ("--temperature", args.temperature is not None, "answers are greedy there"),
        ("--decode prefill", args.decode == "prefill", "generated tokens are gated there"),
    ):
        if given:
            raise InputError(f"{option}: not with --engine vllm, leave it out: {instead}")


def _job(args: argparse.Namespace) -> "BatchJob":
    from ..batch.worker import VIDEO_COLUMNS, BatchJob

    return BatchJob(
        **{
            name: getattr(args, name)
            for name in ("model", "device", "dtype", "fit", "max_new_tokens", "tensor_parallel")
        },
        config=config_of(args),
        video={name: getattr(args, name) for name in (*VIDEO_COLUMNS, "timeout")}
        | {"max_download": download_limit(args)},
        score_folder=(args.cache or args.out / "scores").absolute(),
        score_bytes=int(args.cache_size * 2**30),
        share_prefill=not args.whole_prompts,
        gate_effect=args.gate_effect,
        drawn=drawing_of(args),
        engine="vllm" if args.engine == "vllm" else "transformers",
    )


def _engine(args: argparse.Namespace, progress: Any) -> Any:
    from ..batch.job import local_engine

    if args.engine == "ray":
        from ..batch.ray_engine import ray_engine

        return partial(ray_engine, n_actors=args.actors, gpus_per_actor=args.gpus_per_actor)
    if args.engine == "vllm":
        from ..batch.vllm_engine import vllm_engine

        return partial(vllm_engine, options=args.engine_options)
    return partial(local_engine, progress=progress.stage)


def _report(
    args: argparse.Namespace,
    results: "list[Record | None]",
    kept: int,
    written: list[Path],
    progress: Any,
    stopped: str | None,
) -> int:
    from ..answer import output_warning

    failures = [record for record in results if record is not None and record["status"] == "failed"]
    n_unasked = results.count(None)
    n_done = len(results) - len(failures) - n_unasked
    if args.json:
        summary = {
            "rows": len(results),
            "done": n_done,
            "failed": len(failures),
            "unasked": n_unasked,
            "of_other_settings": kept,
            "stopped": stopped,
            "answered_by_this_run": progress.n_done,
            "generated_tokens": progress.n_tokens,
            "seconds": dict(progress.seconds),
            "peak_memory_bytes": progress.peak_memory_bytes,
            "files": [str(path) for path in written],
        }
        print(json_text(summary))
    else:
        unasked = f", {n_unasked} not asked" if n_unasked else ""
        print(f"rows      {len(results)}: {n_done} done, {len(failures)} failed{unasked}")
        if kept:
            print(f"kept      {kept} rows of other settings, told apart by their columns model, alpha_k and so on")
        if progress.n_done:
            print(f"this run  {progress.n_done} answered, {progress.text()}")
        for record in failures[:5]:
            print(f"failed    line {record['line']}: {printable(record['reason'])}")
        if failures:
            print("          to try these again: --retry-failed")
        effects = [record["gate_effect"] for record in results if record is not None and record.get("gate_effect")]
        if (warning := output_warning([effect["output_size"] for effect in effects])) is not None:
            print(f"gate      {warning}")
        for path in written:
            print(f"wrote     {printable(path)}")
    if stopped is not None:
        rest = f"{n_unasked} rows were not asked, the same command goes on"
        print(f"videoanchor batch: {printable(stopped)}: {rest}", file=sys.stderr)
    return 1 if failures or stopped is not None else 0
