"""The answers of a recommender: dataclasses, and lists of them that can become tables."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pyarrow as pa


if TYPE_CHECKING:
    import datasets
    import pandas as pd

SCHEMA = pa.schema([("user_id", pa.string()), ("item_id", pa.string()), ("rank", pa.int32()), ("score", pa.float32())])
"""Columns of recommendations as a flat table."""


@dataclass(frozen=True)
class Versions:
    """
    The versions of model and items that an answer was made with.

    Args:
        model (`str`): Changes with the weights and settings of the model.
        index (`str`): Changes with the items, also with each change to them.
    """

    model: str
    index: str


@dataclass(frozen=True)
class Explanation:
    """
    The reasons for a recommendation, by counterfactual masking: how much lower the score would be without a part. A
    negative number means that the score would be higher without this part.

    Args:
        history (`dict[int, float]`): For each item that was read, by its position in the history, how much it adds to
            the score. In a history of one item it is the whole score.
        modalities (`dict[str, float]`, *optional*): For each modality, how much it adds. Only items that have another
            modality too can be read without it. `None` if the contents of the items are not available.
    """

    history: dict[int, float]
    modalities: dict[str, float] | None = None


@dataclass
class Recommendation:
    """
    One recommended item.

    Args:
        item_id (`str`): Its id in the catalogue.
        score (`float`): The score of the model; compare it only within one user. For popular items, the number of
            their interactions in the training data.
        text (`str`, *optional*): Its text, if the catalogue is available or the index has it.
        columns (`dict`, *optional*): Its further columns, e.g. `price`.
        explanation ([`Explanation`], *optional*): The reasons, with `explain=True`.
    """

    item_id: str
    score: float
    text: str | None = None
    columns: dict[str, Any] = field(default_factory=dict)
    explanation: Explanation | None = None


class Recommendations(list[Recommendation]):
    """
    The items recommended to one user, best first: a list with some attributes.

    Attributes:
        versions ([`Versions`]): The versions of model and items that it was made with.
        fallback (`str`, *optional*): `"popular"` if the history was empty, so that these are the popular items.
        skipped (`list[str]`): Unknown ids of the history, which were skipped.
    """

    def __init__(
        self,
        items: Iterable[Recommendation],
        versions: Versions,
        fallback: str | None = None,
        skipped: Iterable[str] = (),
    ) -> None:
        super().__init__(items)
        self.versions, self.fallback, self.skipped = versions, fallback, list(skipped)

    def rows(self, user_id: str = "user") -> list[dict[str, Any]]:
        """A dictionary of user_id, item_id, rank and score for each item."""
        return [
            {"user_id": user_id, "item_id": item.item_id, "rank": rank, "score": item.score}
            for rank, item in enumerate(self, start=1)
        ]

    def to_arrow(self) -> pa.Table:
        """
        A table with one row for each item: user_id, item_id, rank, score, the text, and all columns of other names.
        """
        table = pa.Table.from_pylist(self.rows(), SCHEMA)
        details = pa.Table.from_pylist([{"text": item.text, **item.columns} for item in self])
        for name in details.column_names:
            if name not in SCHEMA.names:
                table = table.append_column(name, details[name])
        return table

    def to_dataset(self) -> datasets.Dataset:
        """Like [`~Recommendations.to_arrow`], as a data set of `datasets`."""
        from datasets import Dataset

        return Dataset(self.to_arrow())

    def to_pandas(self) -> pd.DataFrame:
        """Like [`~Recommendations.to_arrow`], as a DataFrame of pandas."""
        return self.to_arrow().to_pandas()


class UserRecommendations(list[Recommendations]):
    """The items recommended to several users, in their order."""

    def __init__(self, users: Iterable[Recommendations], versions: Versions) -> None:
        super().__init__(users)
        self.versions = versions

    def rows(self, user_ids: Iterable[str] | None = None) -> Iterator[dict[str, Any]]:
        """
        A dictionary of user_id (without `user_ids`, the position of the user), item_id, rank and score for each item.
        """
        names = map(str, range(len(self)) if user_ids is None else user_ids)
        for name, found in zip(names, self, strict=True):
            yield from found.rows(name)

    def to_arrow(self, user_ids: Iterable[str] | None = None) -> pa.Table:
        """The flat table of user_id, item_id, rank and score."""
        return pa.Table.from_pylist(list(self.rows(user_ids)), SCHEMA)

    def to_dataset(self, user_ids: Iterable[str] | None = None) -> datasets.Dataset:
        """Like [`~UserRecommendations.to_arrow`], as a data set of `datasets`."""
        from datasets import Dataset

        return Dataset(self.to_arrow(user_ids))

    def to_pandas(self, user_ids: Iterable[str] | None = None) -> pd.DataFrame:
        """Like [`~UserRecommendations.to_arrow`], as a DataFrame of pandas."""
        return self.to_arrow(user_ids).to_pandas()
