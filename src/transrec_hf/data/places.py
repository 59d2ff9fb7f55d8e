"""Where the tables of a data set are (in files, in memory or on the Hub), and which files they may name.

A data set of the Hub can read only its own repository, and a local one only its own folder, with links resolved. The
author of a data set chooses its paths, but the files belong to the person who reads it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import yaml
from huggingface_hub import constants, hf_hub_download, resolve_revision
from huggingface_hub.errors import EntryNotFoundError

from ..errors import DataError, explain, one_line, printable, shortened
from .frames import as_table


if TYPE_CHECKING:
    import datasets


SUFFIXES = (".parquet", ".csv", ".tsv", ".jsonl")


@contextmanager
def bad_table(name: str) -> Iterator[None]:
    """Turn the errors of libraries that cannot read a table into a [`DataError`] that begins with its name."""
    try:
        yield
    except DataError:
        raise
    except OSError as error:
        raise DataError(
            f"{name}: {shortened(one_line(error), 300)}. Check the file, and the free disk space."
        ) from error
    except (pa.ArrowException, ValueError, TypeError, KeyError, OverflowError, RecursionError) as error:
        raise DataError(
            f"{name}: cannot be read ({type(error).__name__}: {shortened(one_line(error), 300)}). Write it again."
        ) from error


@dataclass
class Place:
    """
    Where one table is.

    Args:
        table (`datasets.Dataset`, `pa.Table` or `Path`): The table, or the local file that holds it.
        name (`str`): Its name, for messages.
        folder (`str`, *optional*): Folder to which the files that the table names are relative, and which must contain
            them. Without it, the table was made in this program, and may name any file.
    """

    table: datasets.Dataset | pa.Table | Path
    name: str
    folder: str | None = None


def open_source(source: Any, table: str, revision: str | None, split: str | None = None) -> Place:
    """The place of the table "items" or "interactions"."""
    import datasets

    if isinstance(source, (datasets.IterableDataset, datasets.IterableDatasetDict)):
        raise DataError(f"{table}: rows of a streamed data set cannot be looked up. Load it without streaming=True.")
    if isinstance(source, Mapping) and source and all(isinstance(of, datasets.Dataset) for of in source.values()):
        source = _choose_split(source, table, table, split)
    if isinstance(source, datasets.Dataset):
        return Place(source, table, _folder_of_hub(_repository_of(source)))
    if not isinstance(source, (str, os.PathLike)):
        with bad_table(table):
            return Place(as_table(source, table), table)
    path = Path(os.fspath(source))
    if os.path.isdir(path):
        found = _find_table(path, table)
        return Place(found, printable(found), str(found.parent))
    if os.path.isfile(path):
        return Place(path, printable(path), str(path.parent))
    if re.fullmatch(r"[\w.-]+/[\w.-]+", str(source)) and path.suffix not in SUFFIXES:
        name = f"{source} ({table})"
        splits = _load_hub(str(source), table, revision)
        return Place(_choose_split(splits, name, table, split), name, _folder_of_hub(str(source)))
    here = printable(os.getcwd())
    raise DataError(f"{shortened(printable(path), 300)}: no such file or folder. Check the path (now in {here}).")


def _choose_split(
    splits: Mapping[str, datasets.Dataset], name: str, table: str, split: str | None
) -> datasets.Dataset:
    """The only split of a data set, or the splits that are named, joined by `+`."""
    import datasets

    if len(splits) == 1 and (split is None or table == "items"):
        return next(iter(splits.values()))
    if split is None:
        everything = "+".join(splits)
        raise DataError(
            f"{name}: has several splits, {list(splits)}. Name one with split=..., or several as in "
            f"split={everything!r}."
        )
    unknown = [part for part in split.split("+") if part not in splits]
    if unknown:
        raise DataError(f"{name}: there is no split {unknown[0]!r}. Name some of {list(splits)}.")
    return datasets.concatenate_datasets([splits[part] for part in split.split("+")])


def _load_hub(repo_id: str, table: str, revision: str | None) -> Mapping[str, datasets.Dataset]:
    import datasets

    try:
        with_network = not constants.HF_HUB_OFFLINE
        commit = resolve_revision(repo_id, repo_type="dataset", revision=revision) if with_network else revision
        if with_network:
            _check_configurations(repo_id, commit)
        return datasets.load_dataset(repo_id, name=table, revision=commit)
    except DataError:
        raise
    except Exception as error:
        raise DataError(
            f"{repo_id}: neither a folder here nor a data set of the Hub with a configuration {table!r} that can be "
            f"read ({explain(error) or f'{type(error).__name__}: {shortened(one_line(error), 300)}'}). Check the id, "
            "the network and HF_HUB_OFFLINE."
        ) from error


def _check_configurations(repo_id: str, commit: str | None) -> None:
    """Refuse a data set whose README names files outside of it: local files, or network addresses."""
    for name in ("README.md", ".huggingface.yaml"):
        try:
            file = hf_hub_download(repo_id, name, repo_type="dataset", revision=commit)
        except EntryNotFoundError:
            continue
        text = Path(file).read_text(encoding="utf-8", errors="replace")
        if name == "README.md":
            header = re.match(r"[\s\ufeff]*---\s*?\n(.*?)\n---\s*?(\n|$)", text, re.DOTALL)
            text = header[1] if header else ""
        try:
            configurations = (yaml.safe_load(text) or {}).get("configs")
        except (yaml.YAMLError, AttributeError, RecursionError, ValueError) as error:
            raise DataError(
                f"{repo_id}: the header of {name} cannot be read ({type(error).__name__}). Correct it."
            ) from error
        for value in _strings(configurations):
            parts = re.split(r"[/\\]", value)
            if "://" in value or "::" in value or ".." in parts or os.path.isabs(value) or parts[0].startswith("~"):
                raise DataError(
                    f"{repo_id}: {name} names a file outside of the repository: {shortened(value)!r}. A data set of "
                    "the Hub may read its own files only: get that file yourself if you trust it."
                )


def _strings(values: Any) -> Iterable[str]:
    """All strings in nested lists and dictionaries."""
    if isinstance(values, str):
        yield values
    elif isinstance(values, Mapping):
        for value in values.values():
            yield from _strings(value)
    elif isinstance(values, list):
        for value in values:
            yield from _strings(value)


def _repository_of(dataset: datasets.Dataset) -> str | None:
    """The data set of the Hub that an object was loaded from, if its cache files tell."""
    for file in dataset.cache_files:
        if match := re.search(r"[/\\]([\w.-]+?)___([\w.-]+)[/\\]", file["filename"]):
            return f"{match[1]}/{match[2]}"
    return None


def _folder_of_hub(repo_id: str | None) -> str | None:
    """The folder of a data set in the cache of the Hub."""
    return repo_id and os.path.join(constants.HF_HUB_CACHE, f"datasets--{repo_id.replace('/', '--')}")


def _find_table(folder: Path, table: str) -> Path:
    """The only file of `folder` that can hold `table`."""
    candidates = [folder / f"{table}{suffix}" for suffix in SUFFIXES]
    if table == "items":
        candidates += [folder / "metadata.jsonl", folder / "items" / "metadata.jsonl"]
    found = [path for path in candidates if path.is_symlink() or path.is_file()]
    names = [str(path.relative_to(folder)) for path in found]
    if len(found) > 1:
        raise DataError(f"{printable(folder)}: several {table} files: {names}. Keep one.")
    if found:
        if not lies_in(found[0], folder):
            raise DataError(
                f"{printable(found[0])}: is a link that leaves its folder. Copy the file, or pass its own path."
            )
        if found[0].is_file():
            return found[0]
    there = [printable(path.name) for path in sorted(folder.iterdir())[:10]]
    raise DataError(
        f"{printable(folder)}: no {table} file among {there}. Add {table}.parquet, {table}.csv or {table}.jsonl."
    )


def lies_in(path: str | os.PathLike, folder: str | os.PathLike) -> bool:
    """
    Whether a file is in a folder, with all links resolved. In the cache of the Hub, the files of a snapshot are links
    to the `blobs` of the same repository, which belong to it.
    """
    try:
        real, root = Path(os.path.realpath(path)), Path(os.path.realpath(folder))
    except (OSError, ValueError):
        return False
    roots = [root]
    for place in (root, *root.parents):
        blobs = place.parent.parent / "blobs"
        if place.parent.name == "snapshots" and not blobs.is_symlink():
            roots.append(blobs)
    return any(real.is_relative_to(root) for root in roots)
