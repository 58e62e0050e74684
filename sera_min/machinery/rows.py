"""Rows of preference data, from files and hub data sets."""

import csv
import gzip
import io
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import datasets

from sera_min.machinery.errors import InputError, one_line
from sera_min.machinery.forms import COLUMNS, unknown_form

SUFFIXES = (".json", ".jsonl", ".csv", ".json.gz", ".jsonl.gz", ".csv.gz", ".parquet")
KNOWN = {name for names in COLUMNS.values() for name in names}  # columns

Rows: TypeAlias = Sequence[Any] | datasets.Dataset


def read_rows(name: str, split: str, limit: int | None = None, config: str | None = None) -> Rows:
    """Rows, the first `limit`, of a hub data set (and its configuration), a file or a folder. Raises InputError."""
    path = Path(name)
    if path.is_file() and not name.endswith(SUFFIXES):
        raise InputError(f"{name}: expected a file that ends with one of {', '.join(SUFFIXES)}")
    if not path.exists() and (name.endswith(SUFFIXES) or is_path(name)):
        raise InputError(f"{name}: no such file")
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # its errors come back in ours, on one line
    try:
        rows = read_file(path, split) if path.is_file() else read_data_set(name, split, config)
    except Exception as error:  # pyarrow, pandas, huggingface_hub and datasets each raise their own, and wrap others'
        causes: list[str] = []
        cause: BaseException | None = error
        while cause is not None:
            causes += [one_line(cause)]
            cause = cause.__cause__ or (None if cause.__suppress_context__ else cause.__context__)
        what = name if path.is_file() else f"{name}, split '{split}'"
        raise InputError(f"{what}: cannot be read: {broken_file(path)}{'; '.join(dict.fromkeys(causes))}") from None
    if isinstance(rows, datasets.Dataset):
        return rows if limit is None else rows.select(range(min(len(rows), limit)))
    return rows[:limit]


def broken_file(folder: Path) -> str:
    """Of a folder's files the first that cannot be read by itself, which `datasets` does not name."""
    for file in sorted(folder.rglob("*")):
        try:
            if file.name.endswith(SUFFIXES):
                read_file(file, "train")
        except Exception:  # which one it is, is in `datasets`' own error
            return f"{file}: "
    return ""


def is_path(name: str) -> bool:
    """Whether no name of the hub, which is "owner/name", looks like this."""
    return name.count("/") > 1 or name.startswith((".", "~", "/")) or name.endswith("/")


def is_lfs_pointer(file: Path) -> bool:
    """Whether the file is Git LFS's three lines about a file that was never downloaded."""
    with open(file, "rb") as start:
        return start.read(24) == b"version https://git-lfs."


def read_file(path: Path, split: str) -> Rows:
    if is_lfs_pointer(path):
        raise ValueError("it is a Git-LFS pointer to a file, which `git lfs pull` puts in its place")
    if path.suffix == ".parquet":
        return datasets.load_dataset("parquet", data_files={split: str(path)}, split=split)
    with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8-sig", newline="") as file:
        text = file.read()
    rows = read_csv(text) if ".csv" in path.suffixes[-2:] else read_json(text)
    if not rows:
        raise ValueError("it is empty")
    return rows


def read_data_set(name: str, split: str, config: str | None) -> datasets.Dataset:
    """Of the hub, of a folder of files, or of one that `save_to_disk` wrote."""
    if not any((Path(name) / file).exists() for file in ("dataset_dict.json", "state.json")):
        return datasets.load_dataset(name, config, split=split, trust_remote_code=False)
    saved = datasets.load_from_disk(name)
    splits = saved if isinstance(saved, dict) else {str(saved.split or "train"): saved}
    if split not in splits:
        raise ValueError(f"its splits are {', '.join(splits)}")
    return splits[split]


def read_json(text: str) -> list[Any]:
    """The values of a JSON list, or all values one after the other. Raises ValueError naming line and column.

    Rows are counted from 0, as everywhere. Not by `datasets`, whose reader has crashed the process on deep nesting, and
    wants a field of one type in all rows.
    """
    if text.lstrip().startswith("["):
        return json.loads(text)
    rows: list[Any] = []
    parser, text = json.JSONDecoder(), text.rstrip()
    at = len(text) - len(text.lstrip())
    while at < len(text):
        try:
            row, at = parser.raw_decode(text, at)
        except json.JSONDecodeError as error:  # whose own line may be a later one
            line = text.count("\n", 0, at) + 1
            raise ValueError(f"row {len(rows)}, which begins in line {line}: {error}") from None
        rows.append(row)
        while at < len(text) and text[at].isspace():
            at += 1
    return rows


def read_csv(text: str) -> list[Any]:
    """Every value is a text; not by `datasets`, which would read "NA" as nothing, and "4" as a number."""
    csv.field_size_limit(sys.maxsize)
    return list(csv.DictReader(io.StringIO(text), strict=True))


def decoded(rows: Rows, name: str) -> Iterator[Any]:
    """The rows one by one, with the columns that are read. What `datasets` cannot decode is an InputError."""
    if isinstance(rows, datasets.Dataset):
        columns = rows.column_names
        rows = rows.select_columns([column for column in columns if column in KNOWN])
        if not rows.column_names:
            raise unknown_form(columns, name)
    each = iter(rows)
    for i in range(len(rows)):
        try:
            yield next(each)
        except Exception as error:  # it reads ahead
            raise InputError(f"{name}, row {i} or one after it: cannot be decoded: {one_line(error)}") from None
