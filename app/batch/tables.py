"""The tables of a batch, `results.csv` and `results.parquet`: columns that are declared here, whatever the data.

`python -m videoanchor_triton.app.batch.tables` prints the declaration as JSON Schema
(docs/results.schema.json).
"""

import io
import json
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

from ..atomic_write import write_whole
from ..csv_text import csv_text
from .results import Record

VERSION = "1"
"""Of the declaration: it changes when a column goes, or changes its type or what it means."""
VERSION_KEY = b"videoanchor.results"
"""Of the metadata of a Parquet file."""

Type = Literal["string", "integer", "number", "boolean", "list", "object"]
"""In `results.jsonl`; lists and objects are text of JSON in tables. Every entry may be null."""

COLUMNS: dict[str, tuple[Type, str]] = {
    "key": ("string", "of this result: a digest of video, its content, question, settings and copy"),
    "status": ("string", "done, failed, or in tables unasked: no result yet"),
    "answer": ("string", "generated text"),
    "failure": ("string", "what a failed row failed by: input (the row or its video), accelerator, other"),
    "reason": ("string", "of a failure"),
    "line": ("integer", "in the input as it is now; null in results.jsonl where it has this row no more"),
    "copy": ("integer", "rows before it with the same video and question, which were asked once"),
    "video": ("string", "absolute path"),
    "question": ("string", "as asked"),
    "input": ("object", "the other columns of the input; in tables also columns of text, input_NAME"),
    "fingerprint": ("string", "digest of the size, the first and the last MiB of the video"),
    "settings": ("string", "hash of all settings: settings-HASH.json"),
    "model": ("string", "checkpoint, a folder or a name on the hub"),
    "dtype": ("string", "asked for"),
    "alpha_q": ("number", "strength of the gate on queries"),
    "alpha_k": ("number", "on keys"),
    "alpha_v": ("number", "on values"),
    "decode": ("string", "persist or prefill"),
    "scorer": ("string", "ssc, kmeans or uniform"),
    "score": ("string", "what scorer ssc makes of the subspaces"),
    "n_clusters": ("string", "subspaces, a number or auto"),
    "pca_rank": ("integer", "null: no PCA"),
    "random_state": ("integer", "seed"),
    "algorithm": ("string", "of the self-expression, asked for"),
    "tol": ("number", "relative duality gap"),
    "max_frames": ("integer", "asked for"),
    "fps": ("number", "asked for; null: max_frames over all of the video"),
    "sampling": ("string", "uniform or scene"),
    "max_pixels": ("integer", "of a frame, larger ones are scaled down"),
    "strict": ("boolean", "videos with signs of damage are refused"),
    "fit": ("boolean", "fewer frames where they do not fit"),
    "max_new_tokens": ("integer", "asked for"),
    "tokens.prompt": ("integer", "tokens"),
    "tokens.visual": ("integer", "tokens"),
    "tokens.generated": ("integer", "tokens"),
    "frames": ("integer", "given to the model"),
    "notes": ("list", "what is odd about the video"),
    "ssc.algorithm": ("string", "used for the scores"),
    "ssc.n_iter": ("integer", "iterations"),
    "ssc.residual": ("number", "largest relative duality gap, or the residual of the authors' rule"),
    "ssc.converged": ("boolean", "every token within tol"),
    "ssc.cached": ("boolean", "scores from the disk"),
    "seconds.decode_video": ("number", "0 where an earlier row of the video took them, as in the next columns"),
    "seconds.vision": ("number", "vision tower"),
    "seconds.ssc": ("number", "scores"),
    "seconds.prefill": ("number", "first pass of the language model"),
    "seconds.decode": ("number", "the passes after it"),
    "seconds.decode_per_token": ("number", "mean of them"),
    "seconds.generate": ("number", "all of the call"),
    "peak_memory_bytes": ("integer", "of the allocators of all GPUs; null without one"),
    "peak_host_memory_bytes": ("integer", "of the process so far"),
    "device": ("string", "GPU, or cpu"),
    "version": ("string", "of videoanchor-triton"),
}
_REQUIRED = ("key", "status", "video", "question", "settings")


def write_tables(records: Iterable[Record], folder: Path, formats: Collection[str]) -> list[Path]:
    """Writes `results.csv` and `results.parquet`, as far as `formats` names them, with the same columns: those of
    `COLUMNS` (`seconds.vision` as `seconds_vision`), and text for each column of the input, `input_NAME`.

    Text of the CSV that a spreadsheet would run has a quote before it, see `csv_cell`.
    """
    records = list(records)
    inputs = list(dict.fromkeys(name for record in records for name in record.get("input", {})))
    rows = [_row(record, inputs) for record in records]
    written = []
    for name, content in (("csv", _csv), ("parquet", _parquet)):
        if name in formats:
            written.append(folder / f"results.{name}")
            write_whole(written[-1], content(rows, inputs))
    return written


def _row(record: Record, inputs: Sequence[str]) -> Record:
    row = {_flat(name): _value(record, name, kind) for name, (kind, _) in COLUMNS.items()}
    columns = record.get("input", {})
    return row | {f"input_{name}": _text(columns.get(name)) for name in inputs}


def _flat(name: str) -> str:
    return name.replace(".", "_")


def _value(record: Record, name: str, kind: Type) -> Any:
    value: Any = record
    for part in name.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return _text(value) if kind in ("string", "list", "object") else value


def _text(value: Any) -> str | None:
    return value if value is None or isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _csv(rows: Sequence[Record], inputs: Sequence[str]) -> bytes:
    return csv_text([*map(_flat, COLUMNS), *(f"input_{name}" for name in inputs)], rows).encode()


def _parquet(rows: Sequence[Record], inputs: Sequence[str]) -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    types = {"integer": pa.int64(), "number": pa.float64(), "boolean": pa.bool_()}
    fields = [pa.field(_flat(name), types.get(kind, pa.string())) for name, (kind, _) in COLUMNS.items()]
    fields += [pa.field(f"input_{name}", pa.string()) for name in inputs]
    buffer = io.BytesIO()
    schema = pa.schema(fields, metadata={VERSION_KEY: VERSION})
    pq.write_table(pa.Table.from_pylist(list(rows), schema=schema), buffer)
    return buffer.getvalue()


def json_schema() -> dict[str, Any]:
    """JSON Schema of a line of `results.jsonl`, and of a row of the tables as `pyarrow` reads it."""
    line: dict[str, Any] = {}
    row: dict[str, Any] = {}
    for name, (kind, about) in COLUMNS.items():
        *parents, last = name.split(".")
        place = line
        for parent in parents:
            place = place.setdefault(parent, {"type": ["object", "null"], "properties": {}})["properties"]
        place[last] = {"type": [{"list": "array"}.get(kind, kind), "null"], "description": about}
        in_tables = kind if kind in ("integer", "number", "boolean") else "string"
        row[_flat(name)] = {"type": [in_tables, "null"], "description": about}
    line["n_clusters"]["type"] = ["integer", "string", "null"]
    for properties, statuses in ((line, ["done", "failed"]), (row, ["done", "failed", "unasked"])):
        properties["status"] = {"enum": statuses, "description": COLUMNS["status"][1]}
        for name in set(_REQUIRED) - {"status"}:
            properties[name]["type"] = "string"
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": f"videoanchor batch: results, version {VERSION}",
        "anyOf": [{"$ref": "#/$defs/line"}, {"$ref": "#/$defs/row"}],
        "$defs": {
            "line": {
                "description": "a line of results.jsonl",
                "type": "object",
                "properties": line,
                "required": list(_REQUIRED),
                "additionalProperties": False,
            },
            "row": {
                "description": "a row of results.parquet; results.csv has the same columns",
                "type": "object",
                "properties": row,
                "required": list(row),
                "patternProperties": {"^input_": {"type": ["string", "null"]}},
                "additionalProperties": False,
            },
        },
    }


if __name__ == "__main__":
    print(json.dumps(json_schema(), indent=2))
