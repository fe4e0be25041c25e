"""What `python -m bench.scale` prints: the formulas' bytes for some sizes, as tables."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from tabulate import tabulate

from bench.scale import formulas
from bench.scale.formulas import MIXED, Bytes, Loss, Model
from fastkd.backend import Backend

__all__ = ["HEAD", "MODELS", "Setting", "Table", "data", "head_exchanged", "tables", "text"]

#: Parameters beside embedding and head, and hidden sizes, of Llama 3's models.
MODELS = {
    "1B": Model(973_146_112, 2048, tied=True),
    "8B": Model(6_979_588_096, 4096, tied=False),
    "70B": Model(68_452_360_192, 8192, tied=False),
}


@dataclass(frozen=True)
class Setting:
    """What is asked about."""

    pairs: Sequence[tuple[str, str]] = (("1B", "8B"), ("8B", "70B"))  # student, teacher
    ranks: Sequence[int] = (1, 8, 64, 512, 4096)
    vocabularies: Sequence[int] = (32000, 128256, 151936, 262144)
    vocabulary: int = 128256
    tokens: int = 8192  # of a rank
    group: int = 8  # ranks that a vocabulary is spread over, at most
    size: Bytes = MIXED
    device: str = "cuda"
    models: dict[str, Model] = field(default_factory=lambda: MODELS)

    @property
    def backend(self) -> Backend:
        """Whose numbers of a row are exchanged."""
        name = "gpu.state" if self.device == "cuda" else "cpu.state"
        try:
            return importlib.import_module(f"fastkd.kernels.{name}")  # type: ignore[return-value]
        except ImportError as error:
            raise SystemExit(f"what GPUs exchange is read from their kernels, which need Triton: {error}") from error


class Table(NamedTuple):
    """Numbers of a `unit`; the first columns say of what."""

    name: str
    says: str
    keys: tuple[str, ...]
    columns: tuple[str, ...]
    rows: list[tuple[tuple[Any, ...], tuple[float, ...]]]


def tables(setting: Setting) -> Iterator[Table]:
    """All of them."""
    yield _step(setting)
    yield _head(setting)
    yield _by_vocabulary(setting)
    yield _held(setting)
    yield _rows(setting)
    yield _taught(setting)


def text(setting: Setting) -> str:
    """Markdown."""
    return "\n\n".join(_markdown(table) for table in tables(setting)) + "\n"


def data(setting: Setting) -> list[dict[str, Any]]:
    """The same as numbers: a dictionary for each row of each table, with bytes."""
    return [
        {
            "table": table.name,
            **dict(zip(table.keys, keys, strict=True)),
            **dict(zip(table.columns, values, strict=True)),
        }
        for table in tables(setting)
        for keys, values in table.rows
    ]


HEAD = ("DDP", "FSDP2", "vocabulary-parallel", "whole logits gathered")


def _step(setting: Setting) -> Table:
    rows: list[tuple[tuple[Any, ...], tuple[float, ...]]] = []
    for name, _ in setting.pairs:
        model, vocab = setting.models[name], setting.vocabulary
        parameters, head = model.parameters(vocab), model.head(vocab)
        for n in setting.ranks:
            engines = (
                formulas.ddp(parameters, setting.size),
                formulas.fsdp(parameters - head, head, setting.size),
            )
            rows.append(((name, n), tuple(moved.ring(n) for moved in engines)))
    says = f"Vocabulary {setting.vocabulary:,}; body and head, whatever the tokens."
    return Table("Exchanged in a step: the whole student", says, ("student", "ranks"), ("DDP", "FSDP2"), rows)


def _head(setting: Setting) -> Table:
    rows = [
        ((name, n), head_exchanged(setting, name, n, setting.vocabulary))
        for name, _ in setting.pairs
        for n in setting.ranks
    ]
    return Table("Exchanged in a step: head and loss alone", _batch(setting), ("student", "ranks"), HEAD, rows)


def head_exchanged(setting: Setting, name: str, n: int, vocab: int) -> tuple[float, ...]:
    """Bytes for `HEAD`, of n ranks."""
    model, size = setting.models[name], setting.size
    of, head = min(setting.group, n), model.head(vocab)
    tokens = of * setting.tokens
    hidden = formulas.hidden_gradient(tokens, model.hidden)
    spread = formulas.of_loss(tokens, of, Loss(), setting.backend, checked=False) + hidden
    whole = formulas.gathered_logits(tokens, vocab, size.computed) + hidden
    groups = formulas.fsdp(0, head // of, size).ring(n // of)
    return (
        formulas.ddp(head, size).ring(n),
        formulas.fsdp(0, head, size).ring(n),
        spread.ring(of) + groups,
        whole.ring(of) + groups,
    )


def _by_vocabulary(setting: Setting) -> Table:
    n = setting.ranks[len(setting.ranks) // 2]
    rows = [
        ((name, vocab), head_exchanged(setting, name, n, vocab))
        for name, _ in setting.pairs
        for vocab in setting.vocabularies
    ]
    name = f"Exchanged in a step: head and loss alone, {n:,} ranks, by vocabulary"
    return Table(name, _batch(setting), ("student", "vocabulary"), HEAD, rows)


def _held(setting: Setting) -> Table:
    rows: list[tuple[tuple[Any, ...], tuple[float, ...]]] = []
    for name, taught in setting.pairs:
        student, teacher = setting.models[name], setting.models[taught].hidden
        for n in setting.ranks:
            of = min(setting.group, n)
            asked = (setting.vocabulary, student, teacher, setting.size, setting.device)
            held = (
                formulas.ddp_held(setting.tokens, *asked),
                formulas.fsdp_held(setting.tokens, *asked, n=n),
                formulas.spread_held(of * setting.tokens, *asked, of=of, n=n),
            )
            values = tuple(value for one in held for value in (one.all, one.loss + one.rows))
            rows.append(((name, n), values))
    engines = ("DDP", "FSDP2", "FSDP2, vocabulary-parallel head")
    columns = tuple(column for engine in engines for column in (engine, "its loss"))
    says = (
        f"Vocabulary {setting.vocabulary:,}. {_batch(setting)} A teacher's logits are computed from its hidden "
        "states; its weights, and activations of bodies, are not counted."
    )
    return Table("Held by a rank", says, ("student", "ranks"), _unique(columns), rows)


def _rows(setting: Setting) -> Table:
    losses = {
        "forward_kl": Loss(),
        "jsd": Loss("jsd"),
        "cache of 64 tokens": Loss(teacher="sparse"),
        "cache of 12 tokens": Loss(teacher="sparse", entries=12),
    }
    rows: list[tuple[tuple[Any, ...], tuple[float, ...]]] = []
    hidden = [setting.models[name].hidden for name, _ in setting.pairs]
    for of in (2, 4, 8, 16, 64, 512, 4096):
        values = [formulas.of_loss(1, of, loss, setting.backend, checked=False).ring(of) for loss in losses.values()]
        values += [formulas.hidden_gradient(1, width).ring(of) for width in hidden]
        values.append(formulas.gathered_logits(1, setting.vocabulary, setting.size.computed).ring(of))
        rows.append(((of,), tuple(values)))
    columns = (*losses, *(f"d hidden, H = {width}" for width in hidden), "whole logits")
    says = "Over a group that a vocabulary is spread over, with labels."
    return Table("Exchanged for one token", says, ("ranks of the group",), columns, rows)


def _taught(setting: Setting) -> Table:
    rows: list[tuple[tuple[Any, ...], tuple[float, ...]]] = []
    for taught in dict.fromkeys(teacher for _, teacher in setting.pairs):
        found = formulas.teacher_bytes(setting.vocabulary, setting.models[taught].hidden)
        rows += [((taught, what), (size, setting.tokens * size)) for what, size in found.items()]
    says = f"Vocabulary {setting.vocabulary:,}; from a server, a disk or another rank: a rank receives its own."
    columns = ("a token", f"a step of {setting.tokens:,} tokens")
    return Table("A teacher that is elsewhere", says, ("teacher", "what comes"), columns, rows)


def _batch(setting: Setting) -> str:
    return (
        f"{setting.tokens:,} tokens on a rank; a vocabulary is spread over {setting.group} ranks, which see the tokens "
        "of all of them, and each part of a head is sharded over the groups."
    )


def _unique(columns: tuple[str, ...]) -> tuple[str, ...]:
    """Keys of JSON; printed, what follows a column needs no name of its own."""
    return tuple(f"{columns[i - 1]}: {name}" if name == "its loss" else name for i, name in enumerate(columns))


def _markdown(table: Table) -> str:
    shown = [(*(_key(key) for key in keys), *(_size(value) for value in values)) for keys, values in table.rows]
    headers = (*table.keys, *table.columns)
    alignment = ("left",) * len(table.keys) + ("right",) * len(table.columns)
    body = tabulate(shown, headers, tablefmt="pipe", disable_numparse=True, colalign=alignment)
    return f"### {table.name}\n\n{table.says}\n\n{body}"


def _key(key: Any) -> str:
    return f"{key:,}" if isinstance(key, int) else str(key)


def _size(count: float) -> str:
    """Three digits of bytes, in powers of 1000."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 999.5:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"
