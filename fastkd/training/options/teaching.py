"""What teaches the student, and what beside the teacher's predictions it learns from."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import Field, dataclass, fields
from typing import Any, ClassVar, Literal

from fastkd.training.options.base import InputError, at_home, at_least, check_finite, expand_home, option

__all__ = [
    "TAKES",
    "ModeOptions",
    "TeachingOptions",
    "named_terms",
    "set_text",
    "set_title",
    "term_set",
    "unfolded",
    "unfolded_sets",
]

#: Mode → the options that are for it alone. They are refused beside others.
TAKES: dict[str, tuple[str, ...]] = {
    "frozen": (),
    "cached": (),
    "online": ("teacher_learning_rate",),
    "mutual": ("teacher_learning_rate", "peer"),
    "ema": ("ema_decay", "ema_device", "ema_dtype"),
    "snapshot": ("snapshot_every",),
    "multi_view": ("views",),
    "mixture": ("more_teachers", "teacher_weights"),
    "routed": ("more_teachers",),
}
#: Modes in which the student learns from what becomes of a student, and not from the teacher that judges it.
_OF_ITSELF = ("mutual", "ema", "snapshot", "multi_view")


@dataclass(frozen=True)
class ModeOptions:
    """What modes of teaching can be asked."""

    teacher_learning_rate: float | None = option(
        None, "online, mutual: peak learning rate of what learns beside [same]"
    )
    peer: str = option("", "mutual: the second student, named as student is [the student, from other random weights]")
    ema_decay: float = option(0.999, "ema: what of the average stays at each step; less in the first ones")
    ema_device: str = option("", "ema: where the average is kept [the student's device]")
    ema_dtype: Literal["student", "float32", "bfloat16"] = option("student", "ema: the average's precision")
    snapshot_every: int = option(0, "snapshot: steps from one to the next; 0: the student of the last epoch's end")
    views: list[str] = option(
        [], "multi_view: what is done to the inputs it teaches on: token_dropout, ... [two of them]"
    )
    more_teachers: list[str] = option([], "mixture, routed: the teachers after --teacher, named as it is")
    teacher_weights: list[float] = option([], "mixture: weights of all teachers, --teacher's first [equal]")

    def __post_init__(self) -> None:
        expand_home(self, "peer")
        object.__setattr__(self, "more_teachers", [at_home(name, "more_teachers") for name in self.more_teachers])
        check_finite(self)
        at_least(self, snapshot_every=0)
        if self.teacher_learning_rate is not None and self.teacher_learning_rate <= 0:
            raise InputError(f"teacher_learning_rate is {self.teacher_learning_rate}; it must be above 0")
        if not 0 <= self.ema_decay < 1:
            raise InputError(f"ema_decay is {self.ema_decay}; it must be in [0, 1)")
        count = 1 + len(self.more_teachers)
        if self.teacher_weights and len(self.teacher_weights) != count:
            raise InputError(f"teacher_weights has {len(self.teacher_weights)} numbers for {count} teachers")
        if self.teacher_weights and (min(self.teacher_weights) < 0 or not sum(self.teacher_weights)):
            raise InputError(f"teacher_weights are {self.teacher_weights}; none may be below 0, nor all be 0")

    def check_taken(self, modes: Sequence[str]) -> None:
        """Raises InputError for an option that none of the modes takes."""
        for one in fields(self):
            takers, value = [mode for mode, names in TAKES.items() if one.name in names], getattr(self, one.name)
            if takers and not set(takers) & set(modes) and value != _default(one):
                asked = " and ".join(map(repr, modes))
                raise InputError(
                    f"{one.name} is {value!r}, but teacher_mode is {asked}: it is for {' and '.join(takers)}"
                )

    def of_mode(self, mode: str, terms: Sequence[str]) -> TeachingOptions:
        """Options of one mode, with what of these is for it. Raises InputError for what contradicts itself."""
        mine = {name: getattr(self, name) for name in TAKES[mode]}
        return TeachingOptions(teacher_mode=mode, terms=list(terms), **mine)  # type: ignore[arg-type]


@dataclass(frozen=True)
class TeachingOptions(ModeOptions):
    """Who teaches, and the terms of the loss beside the teacher's predictions and the labels."""

    _argument_group_name: ClassVar[str] = "teaching"

    teacher_mode: Literal[
        "frozen", "cached", "online", "mutual", "ema", "snapshot", "multi_view", "mixture", "routed"
    ] = option(
        "frozen",
        "frozen: the teacher as it is, or its cache; online: the teacher is trained on the labels too; mutual: the "
        "student and a second one teach each other; ema: the moving average of the student; snapshot: the student of "
        "some steps before; multi_view: the student itself, on inputs made harder; mixture: several teachers, their "
        "probabilities averaged; routed: each corpus of a mixture (mix_data) has its teacher. Whatever teaches, the "
        "student is judged beside the model that --teacher names",
    )
    terms: list[str] = option(
        [],
        "what the loss has beside the teacher's predictions and the labels: hidden, attention, multi_token, or a "
        """mapping such as '{"type": "hidden", "weight": 0.5, "layers": "uniform"}'""",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        mode = self.teacher_mode
        self.check_taken([mode])
        if "more_teachers" in TAKES[mode] and not self.more_teachers:
            raise InputError(f"teacher_mode is {mode!r}, which takes several teachers: name them with more_teachers")
        named_terms(self.terms)

    @property
    def of_itself(self) -> bool:
        """Whether a student teaches, and the model of --teacher does no more than judge."""
        return self.teacher_mode in _OF_ITSELF


def named_terms(given: Any) -> list[dict[str, Any]]:
    """Names and mappings, these as JSON, → mappings with a `type`. Raises InputError for what is neither."""
    found = []
    for text in given:
        one: Any = {"type": text}
        if text.lstrip().startswith(("{", "[")):
            try:
                one = json.loads(text)
            except ValueError as error:
                raise InputError(f"terms has {text!r}, which is no JSON: {error}") from error
        if not isinstance(one, dict) or not isinstance(one.get("type"), str):
            raise InputError(f'terms has {text!r}, which does not say its type, such as {{"type": "hidden"}}')
        found.append(one)
    return found


def term_set(given: str) -> list[str]:
    """One of the sets that a sweep tries: none, names joined by +, a mapping or a list of both in JSON.

    Raises InputError as `named_terms` does.
    """
    found: list[Any] = [] if given == "none" else given.split("+")
    if given.lstrip().startswith(("{", "[")):
        try:
            read = json.loads(given)
        except ValueError as error:
            raise InputError(f"terms has {given!r}, which is no JSON: {error}") from error
        found = read if isinstance(read, list) else [read]
    terms = [one if isinstance(one, str) else json.dumps(one) for one in found]
    named_terms(terms)
    return terms


def set_text(terms: Sequence[str]) -> str:
    """A set as a configuration keeps it, which `term_set` and `unfolded_sets` read as this set."""
    if not terms:
        return "none"
    return json.dumps([json.loads(one) if one.lstrip().startswith("{") else one for one in terms])


def set_title(terms: Sequence[str]) -> str:
    """A set as tables and figures show it: hidden + attention (relation qk)."""
    return " + ".join(map(_title, terms)) or "none"


def _title(term: str) -> str:
    if not term.lstrip().startswith("{"):
        return term
    given = json.loads(term)
    rest = [
        f"{name} {one if isinstance(one, str) else json.dumps(one)}" for name, one in given.items() if name != "type"
    ]
    return f"{given['type']} ({', '.join(rest)})" if rest else str(given["type"])


def unfolded_sets(given: Any) -> dict[str, Any]:
    """terms of a sweep's YAML file: sets, where any of them is none, a list or joined by +; else one set.

    One set is what the file of a distillation has. Raises InputError as `unfolded` does.
    """
    items = unfolded(given)["terms"]
    return {"terms": items if any(map(_is_set, items)) else [json.dumps(items, default=str)]}


def _is_set(text: str) -> bool:
    plain = text.lstrip()
    return text == "none" or plain.startswith("[") or ("+" in text and not plain.startswith("{"))


def unfolded(given: Any) -> dict[str, Any]:
    """terms of a YAML file: its mappings as JSON. Raises InputError for what is neither a name nor a mapping."""
    items = given if isinstance(given, list) else [given]
    for item in items:
        if not isinstance(item, (str, dict, list)):
            raise InputError(f"terms has {item!r}: a term is a name or a mapping with a type")
    return {"terms": [item if isinstance(item, str) else json.dumps(item, default=str) for item in items]}


def _default(one: Field[Any]) -> Any:
    return one.default_factory() if callable(one.default_factory) else one.default
