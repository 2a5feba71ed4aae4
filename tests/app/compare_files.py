"""Results as files, in the forms in which harnesses write them."""

import json
import zipfile
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

HEADER = '<?xml version="1.0" encoding="UTF-8" standalone="yes"?>\n'
MAIN = "http://schemas.openxmlformats.org/spreadsheetml/2006/main"
RELATIONS = "http://schemas.openxmlformats.org/officeDocument/2006/relationships"
PACKAGE = "http://schemas.openxmlformats.org/package/2006/relationships"


def write_lines(path: Path, *rows: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def write_scores(path: Path, scores: dict[str, Any], card: Any = None, **columns: Any) -> Path:
    """A plain JSONL; each question about a video of its own, unless `columns` names one."""
    rows = [{"id": name, "video": f"{name}.mp4", "score": score, **columns} for name, score in scores.items()]
    return write_lines(path, *([] if card is None else [{"card": card}]), *rows)


def write_lmms(
    folder: Path, task: str, rows: list[dict[str, Any]], date: str = "20260101_120000", **config: Any
) -> Path:
    """What lmms-eval 0.7.3 leaves with --log_samples, as a run of it left it."""
    config = {"model": "qwen2_5_vl", "random_seed": 0, "numpy_seed": 1234, "gen_kwargs": "", **config}
    about = {
        "configs": {task: {"task": task, "generation_kwargs": {"max_new_tokens": 16, "until": ["\n\n"]}}},
        "config": {"model_args": "pretrained=Qwen/Qwen2.5-VL-7B-Instruct,max_num_frames=32,max_pixels=12544", **config},
        "lmms_eval_version": "0.7.3",
        "date": date,
        "model_name": "Qwen/Qwen2.5-VL-7B-Instruct",
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{date}_results.json").write_text(json.dumps(about))
    return write_lines(folder / f"{date}_samples_{task}.jsonl", *rows)


def vsi_sample(number: int, reply: str, score: float, **document: Any) -> dict[str, Any]:
    """A line of the task vsibench: each of its metrics keeps the whole document."""
    document = {
        "id": 100 + number,
        "dataset": "scannet",
        "scene_name": f"scene{number // 2:04d}_00",
        "question_type": "object_rel_distance",
        "question": f"Which is nearest, {number}?",
        "options": ["A. sofa", "B. lamp"],
        "ground_truth": "A",
        "prediction": reply,
        "accuracy": score,
        **document,
    }
    return {
        "doc_id": number,
        "target": document["ground_truth"],
        "filtered_resps": reply,
        "token_counts": [{"output_tokens": 1}],
        "doc_hash": "the same for all",
        "vsibench_overall": document,
        "object_rel_distance_accuracy": document,
        "input": f"These are frames of a video.\n{document['question']}",
    }


def write_xlsx(path: Path, rows: list[dict[str, Any]], shared: bool = True) -> Path:
    """As XlsxWriter lays a workbook out: text in a table of shared strings, or with `shared` False in the cells, as
    openpyxl can; nothing for an empty cell."""
    texts: list[str] = []
    lines = []
    for number, row in enumerate([dict(zip(rows[0], rows[0], strict=True)), *rows], 1):
        cells = []
        for column, value in zip("ABCDEFGHIJKLMNOP", row.values(), strict=False):
            place = f'r="{column}{number}"'
            if isinstance(value, bool):
                cells.append(f'<c {place} t="b"><v>{int(value)}</v></c>')
            elif isinstance(value, int | float):
                cells.append(f"<c {place}><v>{value}</v></c>")
            elif value is not None and shared:
                texts.append(value)
                cells.append(f'<c {place} t="s"><v>{len(texts) - 1}</v></c>')
            elif value is not None:
                cells.append(f'<c {place} t="inlineStr"><is><t xml:space="preserve">{escape(value)}</t></is></c>')
        lines.append(f'<row r="{number}">{"".join(cells)}</row>')
    strings = "".join(f'<si><t xml:space="preserve">{escape(text)}</t></si>' for text in texts)
    sheets = '<sheets><sheet name="Sheet1" sheetId="1" r:id="rId1"/></sheets>'
    with zipfile.ZipFile(path, "w") as book:
        book.writestr("xl/workbook.xml", f'{HEADER}<workbook xmlns="{MAIN}" xmlns:r="{RELATIONS}">{sheets}</workbook>')
        target = '<Relationship Id="rId1" Target="worksheets/sheet1.xml"/>'
        book.writestr(
            "xl/_rels/workbook.xml.rels", f'{HEADER}<Relationships xmlns="{PACKAGE}">{target}</Relationships>'
        )
        data = f"<sheetData>{''.join(lines)}</sheetData>"
        book.writestr("xl/worksheets/sheet1.xml", f'{HEADER}<worksheet xmlns="{MAIN}">{data}</worksheet>')
        if shared:
            book.writestr("xl/sharedStrings.xml", f'{HEADER}<sst xmlns="{MAIN}">{strings}</sst>')
    return path
