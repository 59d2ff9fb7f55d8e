"""Errors of input, of the Hub and of the network, and the sentences that explain them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
from huggingface_hub import constants, resolve_revision
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    RevisionResolutionError,
    StrictDataclassError,
)
from safetensors import SafetensorError


MAX_EXAMPLES = 5


class DataError(ValueError):
    """Bad input. The message names the file, the row or the id, and says what to do."""


InputError = DataError
"""The same class, under a name for input that is not data; tracebacks show the first name, which users know."""


class BadContent(InputError):
    """Why the content of one item cannot be used. The caller, which knows the item, adds its id."""


class UnknownItems(InputError):
    """
    Unknown items. The message names some of them, and no path of this machine.

    Attributes:
        item_ids (`list[str]`): The ids of all unknown items.
    """

    def __init__(self, item_ids: Iterable[str], mend: str):
        self.item_ids = list(dict.fromkeys(item_ids))
        shown = [shortened(item_id) for item_id in self.item_ids[:MAX_EXAMPLES]]
        super().__init__(f"{len(self.item_ids)} unknown item ids: {shown}. {mend}")


def shortened(value: object, length: int = 80) -> str:
    """A value for a message: on one line, in printable characters, and not longer than `length`."""
    text = str(value)
    text = text if len(text) <= length else f"{text[:length]}..."
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text)


def printable(path: str | os.PathLike) -> str:
    """A path for messages and files, with control characters and bytes that are not UTF-8 escaped."""
    return shortened(os.fsencode(path).decode("utf-8", "backslashreplace"), 4096)


class NotFinite(ValueError):
    """Training met a number that is not finite. The message names the step and says what to do."""


def describe(
    what: str, rows: np.ndarray | list[int], mend: str, label: Callable[[int], str] | None = None
) -> list[str]:
    """
    The line of a message for one kind of defect, with its first rows; an empty list without rows. `rows` count from 0,
    the message counts from 1.
    """
    shown = ", ".join(f"row {row + 1}" + (f" ({label(row)})" if label else "") for row in rows[:MAX_EXAMPLES])
    more = f" and {len(rows) - MAX_EXAMPLES} more" if len(rows) > MAX_EXAMPLES else ""
    return [f"{what}: {shown}{more}. {mend}"] if len(rows) else []


class Defects:
    """Defects of a long table, found block by block."""

    def __init__(self) -> None:
        self._rows: dict[tuple[str, str], list[np.ndarray]] = {}
        self._labels: dict[tuple[str, str], dict[int, str]] = {}

    def add(
        self, what: str, wrong: np.ndarray, mend: str, first_row: int, label: Callable[[int], str] | None = None
    ) -> None:
        """Like [`describe`], for the rows with `wrong` true in a block that begins at row `first_row`."""
        rows = np.flatnonzero(wrong)
        self._rows.setdefault((what, mend), []).append(rows + first_row)
        if label is not None:
            labels = self._labels.setdefault((what, mend), {})
            labels.update({first_row + row: label(row) for row in rows[: MAX_EXAMPLES - len(labels)].tolist()})

    def describe(self) -> list[str]:
        """The line for each kind of defect."""
        lines = []
        for (what, mend), rows in self._rows.items():
            labels = self._labels.get((what, mend))
            lines += describe(what, np.concatenate(rows), mend, None if labels is None else labels.__getitem__)
        return lines


def raise_defects(source: str, defects: list[str]) -> None:
    """Raise one [`DataError`] for all `defects`, with one line for each."""
    if defects:
        raise DataError("\n".join(f"{source}: {defect}" for defect in defects))


class HubError(OSError):
    """An error of the Hub, of the network, or of a checkpoint. The message is one sentence that says what to do."""


def pinned(name_or_path: str | os.PathLike, place: Mapping[str, Any]) -> dict[str, Any]:
    """
    The keywords that say where a checkpoint is (`revision`, `token`, `cache_dir`, `local_files_only`, ...), with the
    revision resolved to a commit. So all files that are loaded with them come from one state of the repository. It
    takes one request, which fails at once if the repository cannot be read.
    """
    if os.path.isdir(name_or_path):
        return dict(place)
    access = {name: place[name] for name in ("cache_dir", "local_files_only", "revision", "token") if name in place}
    return {**place, "revision": resolve_revision(str(name_or_path), **access)}


def _http_sentence(error: HfHubHTTPError) -> str:
    status = error.response.status_code
    if status == 401:
        return "the Hub does not know you: log in with `hf auth login`, or set HF_TOKEN to a valid token"
    if status == 403:
        return "your token is not allowed to do this: use one with write access to the repository"
    if status == 429 or status >= 500:
        return f"the Hub at {constants.ENDPOINT} is overloaded or out of order (HTTP {status}): try again later"
    return (
        f"the Hub at {constants.ENDPOINT} refused the request (HTTP {status}: {error.server_message or 'no reason'})"
    )


def _unreachable(error: BaseException) -> str:
    return f"the Hub at {constants.ENDPOINT} cannot be reached or broke off: check the network, then try again"


def _not_cached(error: BaseException) -> str:
    return (
        "not in the cache, and the Hub was not asked because of HF_HUB_OFFLINE or local_files_only: download it once "
        "while online, or give a folder"
    )


_SENTENCES: tuple[tuple[type[BaseException], Callable[[Any], str]], ...] = (
    (
        GatedRepoError,
        lambda error: (
            f"access needs a permission: request it on {constants.ENDPOINT}, then log in with `hf auth login`"
        ),
    ),
    (
        RepositoryNotFoundError,
        lambda error: (
            f"the Hub at {constants.ENDPOINT} has no such repository, or it is private: check "
            "the id, of the form owner/name, or log in with `hf auth login`"
        ),
    ),
    (RevisionNotFoundError, lambda error: "the repository has no such revision: check the branch, tag or commit"),
    (LocalTokenNotFoundError, lambda error: "there is no token: log in with `hf auth login`, or set HF_TOKEN"),
    (OfflineModeIsEnabled, _not_cached),
    (
        SafetensorError,
        lambda error: (
            f"a weight file is damaged or cut off ({error}): "
            "download it again with force_download=True, or ask its owner to upload it again"
        ),
    ),
    (HfHubHTTPError, _http_sentence),
    (HTTPError, _unreachable),
    (LocalEntryNotFoundError, _not_cached),
    (RevisionResolutionError, _not_cached),
    (HFValidationError, lambda error: "neither a folder nor an id of the Hub, which is `name` or `owner/name`"),
)


def explain(error: BaseException) -> str | None:
    """
    One sentence that tells what an error of the Hub, of the network or of a file from the Hub means, and what to do;
    `None` for any other error. Errors that libraries have wrapped in their own are found too.
    """
    chain: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in chain:
        chain.append(cause)
        cause = cause.__cause__ or cause.__context__
    for kind, sentence in _SENTENCES:
        for cause in chain:
            if isinstance(cause, kind):
                return sentence(cause)
    if any(isinstance(cause, OSError) and "`use_safetensors=True`" in str(cause) for cause in chain):
        return (
            "it has no weights in safetensors (model.safetensors), and pickled weights are not read, since they can "
            "run code: convert them to safetensors"
        )
    if any(isinstance(cause, ValueError) and "trust_remote_code=True" in str(cause) for cause in chain):
        return (
            "it contains code, which is not run unless you trust it: read the code, then pass trust_remote_code=True"
        )
    return None


@contextmanager
def hub_errors(name_or_path: str | os.PathLike) -> Iterator[None]:
    """Turn errors that [`explain`] knows into a [`HubError`] that begins with the checkpoint's id or folder."""
    try:
        yield
    except HubError:
        raise
    except Exception as error:
        sentence = explain(error)
        if sentence is None:
            raise
        raise HubError(f"{name_or_path}: {sentence}") from error


def one_line(error: BaseException) -> str:
    """The message of an error on one line; for a configuration error, the message of its validator."""
    if isinstance(error, StrictDataclassError) and error.__cause__ is not None:
        error = error.__cause__
    if isinstance(error, KeyError):
        return f"there is no {error}"
    return " ".join(str(error).split()) or type(error).__name__


@contextmanager
def bad_input(what: str, *kinds: type[Exception]) -> Iterator[None]:
    """
    Turn the errors that libraries raise on bad input, and errors of these `kinds`, into a [`DataError`] that begins
    with `what`, the name of a file or an option.
    """
    try:
        yield
    except (DataError, HubError):
        raise
    except (ValueError, OSError, ImportError, StrictDataclassError, SafetensorError, *kinds) as error:  # type: ignore
        raise DataError(f"{what}: {explain(error) or one_line(error)}") from error
