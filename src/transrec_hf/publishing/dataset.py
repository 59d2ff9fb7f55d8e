"""A catalogue and its interactions as a data set of the Hub, which [`load_domain`] can read."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from huggingface_hub import CommitInfo, DatasetCard, DatasetCardData, HfApi
from transformers.utils import logging

from ..data.catalogue import Catalogue
from ..data.columns import is_list
from ..data.interactions import Sequences
from ..data.media import FEATURES, file_feature
from ..data.statistics import length_statistics, modality_shares, popularity_statistics
from ..data.writing import items_writer
from ..errors import DataError, hub_errors
from ..model.modalities_transrec import MODALITIES
from .facts import CARD_NAME
from .markdown import render, shares_in_words


ITEMS_NAME, INTERACTIONS_NAME = "items.parquet", "interactions.parquet"
ROWS = 256  # rows that are written at a time, since images are large
SIZE_CATEGORIES = ("n<1K", "1K<n<10K", "10K<n<100K", "100K<n<1M", "1M<n<10M", "10M<n<100M", "100M<n<1B", "1B<n<10B")


def push_dataset_to_hub(
    catalogue: Catalogue,
    sequences: Sequences,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    license: str | None = None,
    language: str | list[str] | None = None,
    commit_message: str = "Upload catalogue and interactions",
) -> CommitInfo:
    """
    Push items and interactions, with a card, to a data set of the Hub in one commit.

    The data set has the configurations `items` (with the images inside, as the `Image` feature) and `interactions`,
    and is read by `load_domain(repo_id)` or `datasets.load_dataset(repo_id, "items")`. Contents that a modality policy
    hides are not pushed; further columns of the items are. **User and item ids are pushed as they are**: replace them
    first if they identify people.

    Args:
        catalogue ([`Catalogue`]): The items.
        sequences ([`Sequences`]): Whole sequences, one view for each user; not those of a split.
        repo_id (`str`): Id of the data set, which is made if it does not exist.
        private (`bool`, *optional*): Whether a new repository is private; by default what the account says.
        token (`str` or `bool`, *optional*): Token to use instead of the one that you are logged in with.
        revision (`str`, *optional*): Branch to push to, which is made if it does not exist.
        license, language (`str`, *optional*): Licence and language of the data, for the card.
        commit_message (`str`, *optional*): Message of the commit.

    Raises:
        [`DataError`]: If there are no interactions, a user has several views, or an image cannot be read.
        [`HubError`]: If the Hub cannot be reached or refuses the push.

    Example:

    ```python
    >>> push_dataset_to_hub(catalogue, sequences, "org/my-platform", license="cc-by-4.0", private=True)
    >>> catalogue, sequences = load_domain("org/my-platform")
    ```
    """
    if len(sequences) == 0:
        raise DataError(
            "there are no interactions to push: the sequences are empty. Give the sequences of load_domain."
        )
    if len(np.unique(sequences.user_ids)) < len(sequences):
        raise DataError("a user has several views: push whole sequences, not windows")
    with tempfile.TemporaryDirectory(prefix="transrec-push-") as folder, hub_errors(repo_id):
        write_items(catalogue, Path(folder) / ITEMS_NAME)
        write_interactions(catalogue, sequences, Path(folder) / INTERACTIONS_NAME)
        card = dataset_card(catalogue, sequences, repo_id, license=license, language=language)
        card.save(Path(folder) / CARD_NAME)
        api = HfApi(token=token)
        api.create_repo(repo_id, repo_type="dataset", private=private, exist_ok=True)
        if revision is not None:
            api.create_branch(repo_id, repo_type="dataset", branch=revision, exist_ok=True)
        return api.upload_folder(
            repo_id=repo_id,
            repo_type="dataset",
            folder_path=folder,
            revision=revision,
            commit_message=commit_message,
        )


def write_items(catalogue: Catalogue, file: str | os.PathLike) -> None:
    """Write the visible contents of the items as Parquet, with the encoded images and sounds inside."""
    import datasets

    features = datasets.Features(catalogue.items.features)
    listed = [name for name in FEATURES if name in features and is_list(features.arrow_schema.field(name).type)]
    features |= {name: file_feature(name) for name in FEATURES if name in features and name not in listed}
    features |= {name: datasets.List(file_feature("image")) for name in listed}
    schema, rows_as_arrow = features.arrow_schema, catalogue.items.with_format("arrow")
    with items_writer(file, schema) as writer:
        bar = logging.tqdm(range(0, len(catalogue), ROWS), desc="Writing items", delay=2)
        for start in bar:
            rows = range(start, min(start + ROWS, len(catalogue)))
            table = rows_as_arrow[rows.start : rows.stop]
            columns = {name: table[name] for name in table.column_names}
            for name in catalogue.contents:
                kind, shown = schema.field(name).type, catalogue.has(name)[rows.start : rows.stop]
                if name in listed:
                    frames: Any = catalogue.contents[name]
                    videos = [
                        [{"bytes": part, "path": None} for part in frames.parts(row)] if has else None
                        for row, has in zip(rows, shown, strict=True)
                    ]
                    columns[name] = pa.array(videos, kind)
                elif pa.types.is_struct(kind):  # contents that may be separate files
                    encoded = (catalogue.encoded(name, row) for row in rows)
                    contents = [None if content is None else {"bytes": content, "path": None} for content in encoded]
                    columns[name] = pa.array(contents, kind)
                else:
                    columns[name] = pc.if_else(pa.array(shown), columns[name], pa.scalar(None, columns[name].type))
            writer.write_table(pa.table(columns).cast(schema))


def write_interactions(catalogue: Catalogue, sequences: Sequences, file: str | os.PathLike) -> None:
    """Write the interactions of all views as Parquet, sorted by user and time."""
    view, place = sequences.expand()
    columns = {
        "user_id": pa.array(sequences.user_ids.tolist(), pa.string()).take(pa.array(view)),
        "item_id": pa.array(catalogue.item_ids.tolist(), pa.string()).take(pa.array(sequences.items[place])),
        "timestamp": pa.array(sequences.timestamps[place]),
    }
    pq.write_table(pa.table(columns), file)


def dataset_card(catalogue: Catalogue, sequences: Sequences, repo_id: str, **metadata: Any) -> DatasetCard:
    """The card of a data set: its two tables, its statistics, how to read it, and what to check before using it."""
    counts = sequences.item_counts(len(catalogue))
    total = int(sequences.lengths.sum())
    modalities = [name for name in MODALITIES if catalogue.has(name).any()]
    card_data = DatasetCardData(
        **metadata,
        pretty_name=repo_id.split("/")[-1],
        size_categories=[SIZE_CATEGORIES[min(max(0, len(str(total)) - 3), len(SIZE_CATEGORIES) - 1)]],
        tags=["recommendation", "sequential-recommendation", "transrec", *modalities],
        configs=[
            {"config_name": "items", "data_files": ITEMS_NAME, "default": True},
            {"config_name": "interactions", "data_files": INTERACTIONS_NAME},
        ],
    )
    values = {
        "repo_id": repo_id,
        "title": repo_id.split("/")[-1],
        "modalities": modalities,
        "columns": [name for name in catalogue.items.column_names if name not in ("item_id", *MODALITIES)],
        "num_items": len(catalogue),
        "num_users": len(sequences),
        "num_interactions": total,
        "shares": shares_in_words(modality_shares(catalogue)),
        "lengths": length_statistics(sequences.lengths),
        "popularity": popularity_statistics(counts),
        "unused": float((counts == 0).mean()),
        "licence": metadata.get("license"),
        "number": "{:,}".format,
        "percent": "{:.1%}".format,
    }
    return render(DatasetCard, "dataset_card.md", card_data, values)
