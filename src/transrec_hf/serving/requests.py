"""The requests and answers of the service and their limits. Types are strict, and unknown fields are refused."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    FiniteFloat,
    StrictBool,
    StrictInt,
    StrictStr,
    Tag,
    model_validator,
)
from typing_extensions import Self


MAX_K = 1000
MAX_HISTORIES = 256
MAX_HISTORY = 1000
MAX_RAW = 64  # raw items of a request
MAX_EXPLAINED = 16  # histories
MAX_CANDIDATES = 10_000
MAX_ITEMS = 1000
MAX_COLUMNS = 64
MAX_TEXT = 2**16  # characters
MAX_FILTER = 4000
MAX_FEATURES = 2**14
MAX_FILE = 2**23  # bytes of an image, a sound or a video
FILES = ("image", "audio", "video")

ItemId = Annotated[StrictStr, Field(min_length=1, max_length=256, pattern=r"^[^\x00-\x1f\x7f]+$")]
Text = Annotated[StrictStr, Field(min_length=1, max_length=MAX_TEXT)]
File = Annotated[
    StrictStr,
    Field(
        min_length=4,
        max_length=MAX_FILE * 4 // 3 + 4,
        pattern=r"^[A-Za-z0-9+/]+={0,2}$",
        description="The bytes of a file in base64: a PNG, JPEG, WAV, MP4, ...",
    ),
]
Features = Annotated[list[FiniteFloat], Field(min_length=1, max_length=MAX_FEATURES)]
Codes = Annotated[list[Annotated[StrictInt, Field(ge=0, lt=2**16)]], Field(min_length=1, max_length=1024)]
Value = StrictStr | StrictBool | StrictInt | FiniteFloat | None
Column = Annotated[StrictStr, Field(min_length=1, max_length=64, pattern=r"^[^\x00-\x1f\x7f]+$")]
Filter = Annotated[StrictStr, Field(min_length=1, max_length=MAX_FILTER, examples=["price < 20 and stock > 0"])]
Modality = Literal["text", "image", "features", "audio", "video", "codes"]
Count = Annotated[StrictInt, Field(ge=1, le=MAX_K)]


class Strict(BaseModel):
    """A request in which unknown fields are refused."""

    model_config = ConfigDict(extra="forbid")


class RawItem(Strict):
    """A raw item, which need not be in the catalogue: text, image, vector, sound, video, codes, or several of them."""

    model_config = ConfigDict(json_schema_extra={"minProperties": 1})

    text: Text | None = None
    image: File | None = None
    features: Features | None = None
    audio: File | None = None
    video: File | None = None
    codes: Codes | None = None

    def contents(self) -> dict[str, Any]:
        """The contents by modality; files are not decoded."""
        return {name: value for name, value in self if value is not None}


def kind_of(item: Any) -> str:
    """A string is always an id, anything else a raw item."""
    return "id" if isinstance(item, str) else "raw"


IdOrRaw = Annotated[Annotated[ItemId, Tag("id")] | Annotated[RawItem, Tag("raw")], Discriminator(kind_of)]


class Recommend(Strict):
    """The histories, and which items may be recommended."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"histories": [["item-17", "item-4"]], "k": 5},
                {"histories": [[{"text": "a red hat"}, "item-4"]], "filter": "price < 20", "explain": True},
            ]
        }
    )

    histories: Annotated[
        list[Annotated[list[IdOrRaw], Field(max_length=MAX_HISTORY)]],
        Field(
            min_length=1,
            max_length=MAX_HISTORIES,
            description="For each user a list of ids or raw items, oldest first.",
        ),
    ]
    timestamps: Annotated[list[list[StrictInt]], Field(max_length=MAX_HISTORIES)] | None = None
    k: Count = 10
    exclude_seen: StrictBool = True
    filter: Filter | None = None
    candidates: Annotated[list[ItemId], Field(max_length=MAX_CANDIDATES)] | None = None
    modality: Modality | None = None
    on_unknown: Literal["raise", "skip"] = "raise"
    explain: StrictBool = False

    @model_validator(mode="after")
    def _check(self) -> Self:
        lengths = [len(history) for history in self.histories]
        if self.timestamps is not None and [len(times) for times in self.timestamps] != lengths:
            raise ValueError("timestamps must have one entry for each item of each history")
        return self

    def is_quick(self) -> bool:
        """Whether the request needs no tower and no explanation."""
        return not self.explain and all(isinstance(item, str) for history in self.histories for item in history)


class Similar(Strict):
    """The item, of the catalogue or raw, to which similar items are wanted."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"item": "item-17", "k": 5}]})

    item: IdOrRaw
    k: Count = 10
    filter: Filter | None = None
    modality: Modality | None = None


class Item(RawItem):
    """An item of the catalogue: its id, its contents and further columns, such as a price."""

    model_config = ConfigDict(json_schema_extra={"minProperties": 2})

    item_id: ItemId
    columns: Annotated[dict[Column, Value], Field(max_length=MAX_COLUMNS)] = {}

    def contents(self) -> dict[str, Any]:
        return {name: value for name, value in super().contents().items() if name not in ("item_id", "columns")}

    @model_validator(mode="after")
    def _check(self) -> Self:
        taken = sorted({"item_id", "text", "features", "codes", *FILES} & set(self.columns))
        if taken:
            raise ValueError(f"columns cannot be named {', '.join(taken)}")
        return self


class Items(Strict):
    """Items to add or to update."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [{"items": [{"item_id": "new-1", "text": "a red hat", "columns": {"price": 12.5}}]}]
        }
    )

    items: Annotated[list[Item], Field(min_length=1, max_length=MAX_ITEMS)]


class Removal(Strict):
    """Items to remove; with `readable` they may still occur in histories."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"item_ids": ["new-1"]}]})

    item_ids: Annotated[list[ItemId], Field(min_length=1, max_length=MAX_ITEMS)]
    readable: StrictBool = False


class VersionsOut(BaseModel):
    """The versions of model and index that an answer was made with."""

    model: str
    index: str


class ExplanationOut(BaseModel):
    """How much lower the score would be without an item of the history (by its position), or without a modality."""

    history: dict[str, float]
    modalities: dict[str, float] | None = None


class Recommended(BaseModel):
    """An item and its score; compare scores only within one answer."""

    item_id: str
    score: float
    text: str | None = None
    columns: dict[str, Any] = {}
    explanation: ExplanationOut | None = None


class UserOut(BaseModel):
    """The items for one user; for an empty history the popular items, and then `fallback` says so."""

    items: list[Recommended]
    fallback: str | None = None
    skipped: list[str] = []


class RecommendOut(BaseModel):
    """The items for each history."""

    users: list[UserOut]
    versions: VersionsOut


class SimilarOut(BaseModel):
    """The most similar items; the score is the cosine of the vectors."""

    items: list[Recommended]
    versions: VersionsOut


class ChangedOut(BaseModel):
    """The items that were added, updated or removed."""

    item_ids: list[str]
    versions: VersionsOut


class Health(BaseModel):
    """The state of the service; if `towers` is false, the first request with contents loads them."""

    status: str
    items: int | None = None
    towers: bool | None = None
    versions: VersionsOut | None = None


class Problem(BaseModel):
    """What went wrong."""

    type: str
    message: str
    where: list[str | int] = []
    item_ids: list[str] = []
