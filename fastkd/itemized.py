"""Objects of tensors that accelerate may take apart and put together: mappings whose items are the tensors.

accelerate sends batches to a device, concatenates, slices, broadcasts and gathers them. It goes into mappings, hands
each value to a function, and calls the mapping's type with a dict of what came back. A value that is no tensor, such as
a name, cannot be concatenated. So names and numbers are not among the values: the keys hold them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields
from typing import Any, TypeVar

from torch import Tensor

__all__ = ["Itemized", "itemized"]

Made = TypeVar("Made")
#: (name of the field, every field that is no tensor with its value).
Key = tuple[str, tuple[tuple[str, Any], ...]]


@Mapping.register  # not a base class: a loss's `isinstance` would ask ABCMeta
class Itemized:
    """A dataclass as a mapping: key → each of its tensors. Equality and hash stay the object's own."""

    def keys(self) -> Sequence[Key]:
        """One for each tensor, in the order of the fields."""
        values = {entry.name: getattr(self, entry.name) for entry in fields(self)}  # type: ignore[arg-type]
        others = tuple((name, value) for name, value in values.items() if value is None or _is_plain(value))
        return [(name, others) for name in values if name not in dict(others)]

    def values(self) -> list[Any]:
        """The tensors."""
        return [getattr(self, name) for name, _ in self.keys()]

    def items(self) -> list[tuple[Key, Any]]:
        """Both."""
        return [(key, getattr(self, key[0])) for key in self.keys()]

    def __getitem__(self, key: Key) -> Any:
        if key not in self.keys():
            raise KeyError(f"{type(self).__name__} with {dict(self.keys()[0][1])} has no {key}: others cannot join it")
        return getattr(self, key[0])

    def __iter__(self) -> Iterator[Key]:
        return iter(self.keys())

    def __len__(self) -> int:
        return len(self.keys())


def itemized(made: type[Made]) -> type[Made]:
    """Let a dataclass be made of its items too: `type(found)(dict(found.items()))` is as `found`.

    What stands for the tensors meanwhile (their shapes, while processes agree on them) is not checked.
    """
    original: Callable[..., None] = made.__init__

    @functools.wraps(original)
    def init(self: Any, *given: Any, **named: Any) -> None:
        if named or len(given) != 1 or not isinstance(given[0], dict):
            original(self, *given, **named)
            return
        values = {name: value for (name, _), value in given[0].items()}
        (others,) = {others for _, others in given[0]}
        if all(isinstance(value, Tensor) for value in values.values()):
            original(self, **values, **dict(others))
        else:
            vars(self).update(values, **dict(others))

    made.__init__ = init  # type: ignore[method-assign]
    return made


def _is_plain(value: Any) -> bool:
    return isinstance(value, (str, int, float))
