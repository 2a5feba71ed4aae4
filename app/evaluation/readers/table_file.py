"""Tables as files: CSV, TSV, a JSON list, and the first sheet of an Excel workbook."""

import csv
import json
import re
import zipfile
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from ....integrations.errors import InputError

SUFFIXES = (".xlsx", ".tsv", ".csv", ".json")
_MOST_BYTES = 2**30
_CELL_CHARACTERS = 2**27
_MAIN = "{http://schemas.openxmlformats.org/spreadsheetml/2006/main}"
_RELATION = "{http://schemas.openxmlformats.org/officeDocument/2006/relationships}id"


def read_table(path: Path) -> list[dict[str, Any]]:
    """The rows of a table, each by the names in its header. Cells of CSV and TSV are text; an empty cell is "", or
    missing.

    Raises:
        InputError: it cannot be read.
    """
    try:
        match path.suffix.lower():
            case ".xlsx":
                return _xlsx(path)
            case ".json":
                rows = json.loads(path.read_text(encoding="utf-8"))
                if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
                    raise ValueError("expected a list of objects")
                return rows
            case suffix:
                csv.field_size_limit(_CELL_CHARACTERS)
                with path.open(newline="", encoding="utf-8-sig") as file:
                    return list(csv.DictReader(file, delimiter="\t" if suffix == ".tsv" else ",", restval=""))
    except (ValueError, KeyError, csv.Error, zipfile.BadZipFile, ElementTree.ParseError, RecursionError) as error:
        raise InputError(
            f"{path} cannot be read as a table ({error}): give the file as the harness wrote it"
        ) from error


def _xlsx(path: Path) -> list[dict[str, Any]]:
    """Values as they are stored: numbers, text and booleans; formulas by their last result."""
    with zipfile.ZipFile(path) as book:
        if sum(part.file_size for part in book.infolist()) > _MOST_BYTES:
            raise ValueError(f"it unpacks to more than {_MOST_BYTES // 2**30} GiB")
        first = _xml(book, "xl/workbook.xml").find(f".//{_MAIN}sheet")
        if first is None:
            raise ValueError("it has no sheet")
        targets = {one.get("Id"): one.get("Target", "") for one in _xml(book, "xl/_rels/workbook.xml.rels")}
        target = targets[first.get(_RELATION)]
        sheet = _xml(book, target.lstrip("/") if target.startswith("/") else f"xl/{target}")
        shared = []
        if "xl/sharedStrings.xml" in book.namelist():
            shared = [_text(one) for one in _xml(book, "xl/sharedStrings.xml").findall(f"{_MAIN}si")]
    lines = [_cells(row, shared) for row in sheet.iter(f"{_MAIN}row")]
    header = lines[0] if lines else {}
    return [{str(name): line.get(place, "") for place, name in header.items()} for line in lines[1:] if line]


def _xml(book: zipfile.ZipFile, name: str) -> ElementTree.Element:
    content = book.read(name)
    if b"<!DOCTYPE" in content[:4096]:
        raise ValueError(f"{name} declares a document type, which no workbook does")
    return ElementTree.fromstring(content)


def _text(item: ElementTree.Element) -> str:
    """Of all runs, without phonetic hints; characters that XML cannot hold come as _x000D_."""
    runs = [item.find(f"{_MAIN}t"), *(run.find(f"{_MAIN}t") for run in item.findall(f"{_MAIN}r"))]
    text = "".join(run.text or "" for run in runs if run is not None)
    return re.sub(r"_x([0-9A-Fa-f]{4})_", lambda code: chr(int(code[1], 16)), text)


def _cells(row: ElementTree.Element, shared: list[str]) -> dict[str, Any]:
    """By the letters of the column."""
    found: dict[str, Any] = {}
    for place, cell in enumerate(row.findall(f"{_MAIN}c")):
        column = re.sub(r"\d", "", cell.get("r", "")) or f"#{place}"
        value, kind = cell.findtext(f"{_MAIN}v"), cell.get("t", "n")
        if kind == "inlineStr":
            inline = cell.find(f"{_MAIN}is")
            found[column] = "" if inline is None else _text(inline)
        elif value is not None:
            if kind == "s":
                found[column] = shared[int(value)]
            elif kind == "n":
                found[column] = float(value)
            else:
                found[column] = value == "1" if kind == "b" else "" if kind == "e" else value
    return found
