"""The student on an input that was made harder, as its own teacher; and what makes inputs harder."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastkd import arguments
from fastkd.teachers.mode import NOTHING, TeacherMode, unwrapped
from fastkd.terms import Need, Outputs, outputs_of

__all__ = ["VIEWS", "MultiView"]

Inputs = Mapping[str, Any]
#: What makes of a batch's inputs others. Its random numbers are PyTorch's, which the mode seeds.
View = Callable[[Inputs], Inputs]
Within = Callable[[nn.Module, Inputs, float], contextlib.AbstractContextManager[Inputs]]


class MultiView(TeacherMode):
    """Self-distillation between views: what the student says of an augmented input teaches it on the plain one.

    The augmented input is run without gradient, in the mode the student is in: one more forward a batch.

    Args:
        views: what is done to the inputs, in this order, in one forward. Each a name of `VIEWS`, alone or with its rate
            in (0, 1), as in `"token_dropout:0.2"`; or a callable that gets the inputs of the model, a mapping, and
            returns others of the same shape.

            - `token_dropout`: the embeddings of random tokens are 0 (word dropout; Iyyer et al. 2015).
            - `token_replacement`: random tokens become others of the batch (unigram noising; Xie et al. 2017).
            - `attention_dropout`: the rate of the model's own dropout of attention probabilities.
        seed: of the random numbers, in which a callable takes part too. They are drawn aside: no other random number of
            the training depends on them. Processes draw different ones.

    Raises TypeError or ValueError for views that are neither, and for rates out of range; `check` for a model that a
    view cannot serve, and for `attention_dropout` where terms need attentions.
    """

    def __init__(
        self, views: str | View | Sequence[str | View] = ("token_dropout", "attention_dropout"), *, seed: int = 0
    ) -> None:
        super().__init__()
        given = [views] if isinstance(views, str) or callable(views) else list(views)
        if not given:
            raise ValueError(f"there are no views, so student and teacher would be the same: name some of {_NAMES}")
        self._views = [_named(one) if isinstance(one, str) else _called(one) for one in given]
        self.seed = arguments.integer("seed", seed)
        self.calls = 0

    def check(self, student: nn.Module, needs: Sequence[Need] = (), vocab_size: int | None = None) -> None:
        """The model has what the views change, and what is needed of it are no attentions after a dropout."""
        self.__dict__["model"] = student
        for view, _ in self._views:
            if view is VIEWS["attention_dropout"] and "attentions" in needs:
                raise ValueError(
                    "a term needs the teacher's attentions, which the view attention_dropout drops a part of, so their "
                    "rows are no probabilities: give MultiView other views, or the term relation='qk'"
                )
            view.check(unwrapped(student))

    @torch.no_grad()
    def outputs(
        self, student: nn.Module, inputs: Inputs, taken: Mapping[str, Any] = NOTHING, needs: Sequence[Need] = ()
    ) -> Outputs:
        """One forward of the student, on the augmented input."""
        device = next(one.device for one in inputs.values() if isinstance(one, Tensor))
        model, self.calls = unwrapped(student), self.calls + 1
        with contextlib.ExitStack() as within:
            within.enter_context(_drawn_aside(self._seed(), device))
            # Under autocast, weights that are cast here have no graph in PyTorch 2.6. Kept, they would serve the
            # student's own forward in the same context, and its weights would get no gradient.
            within.enter_context(_autocast_that_keeps_nothing(device.type))
            for view, rate in self._views:
                inputs = within.enter_context(view.within(model, inputs, rate))
            return outputs_of(model, inputs, needs)

    def _seed(self) -> int:
        rank = dist.get_rank() if dist.is_available() and dist.is_initialized() else 0
        text = f"{self.seed} {rank} {self.calls}"
        return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=7).digest(), "little")

    def kept(self) -> dict[str, Any]:
        """How many batches there have been, from which every random number follows."""
        return {"calls": self.calls}

    def restore(self, kept: Mapping[str, Any]) -> None:
        """Take up what `kept` gave."""
        self.calls = int(kept["calls"])


def _autocast_that_keeps_nothing(device: str) -> torch.autocast:
    """Autocast as it is, on or off, without its cache of weights."""
    enabled, dtype = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
    return torch.autocast(device, dtype, enabled, cache_enabled=False)


@contextlib.contextmanager
def _drawn_aside(seed: int, device: torch.device) -> Iterator[None]:
    """Random numbers of their own, on the CPU and on a device."""
    if device.type == "cpu":
        with torch.random.fork_rng([]):
            torch.default_generator.manual_seed(seed)
            yield
        return
    module: Any = torch.get_device_module(device)
    with torch.random.fork_rng([device], device_type=device.type), module.device(device):
        torch.default_generator.manual_seed(seed)
        module.manual_seed(seed)  # of this device alone: others are not forked
        yield


def _token_ids(inputs: Inputs, view: str) -> Tensor:
    ids = inputs.get("input_ids")
    if not isinstance(ids, Tensor):
        raise ValueError(f"{view} needs batches with input_ids, got {sorted(inputs)}")
    return ids


@contextlib.contextmanager
def _token_dropout(model: nn.Module, inputs: Inputs, rate: float) -> Iterator[Inputs]:
    _token_ids(inputs, "token_dropout")

    def zeroed(_module: nn.Module, _args: Any, embedded: Tensor) -> Tensor:
        dropped = torch.rand(embedded.shape[:-1], dtype=torch.float32, device=embedded.device) < rate
        return embedded.masked_fill(dropped.unsqueeze(-1), 0.0)

    handle = _embedding(model).register_forward_hook(zeroed)
    try:
        yield inputs
    finally:
        handle.remove()


@contextlib.contextmanager
def _token_replacement(model: nn.Module, inputs: Inputs, rate: float) -> Iterator[Inputs]:
    ids, mask = _token_ids(inputs, "token_replacement"), inputs.get("attention_mask")
    drawn = torch.randint(ids.numel(), ids.shape, dtype=torch.int64, device=ids.device)
    replaced = torch.rand(ids.shape, dtype=torch.float32, device=ids.device) < rate
    if isinstance(mask, Tensor) and mask.shape == ids.shape:  # padding neither replaces nor is replaced
        text = mask.bool()
        replaced = replaced & text & text.flatten()[drawn]
    yield {**inputs, "input_ids": torch.where(replaced, ids.flatten()[drawn], ids)}


@contextlib.contextmanager
def _attention_dropout(model: nn.Module, inputs: Inputs, rate: float) -> Iterator[Inputs]:
    changes = _attentions(model, rate)
    before = [(module, name, getattr(module, name)) for module, name, _ in changes]
    try:
        for change in changes:
            setattr(*change)
        yield inputs
    finally:
        for change in before:
            setattr(*change)


def _embedding(model: Any) -> nn.Module:
    found: nn.Module | None = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    if found is None:
        raise ValueError(f"token_dropout needs a model with get_input_embeddings(), which {type(model).__name__} lacks")
    return found


def _attentions(model: nn.Module, rate: float = 0.0) -> list[tuple[nn.Module, str, Any]]:
    """(module, attribute, value) of what sets the rate of attention dropout. ValueError where there is nothing.

    The module itself is put into training mode, and not its children, so that other dropouts stay as they are.
    """
    found: list[tuple[nn.Module, str, Any]] = []
    for module in model.modules():
        for name in ("attention_dropout", "attn_dropout"):
            value = getattr(module, name, None)
            if isinstance(value, nn.Dropout):
                found += [(value, "p", rate), (value, "training", True), (module, "training", True)]
            elif isinstance(value, (int, float)):
                found += [(module, name, rate), (module, "training", True)]
    if not found:
        raise ValueError(
            f"attention_dropout finds no module with attention_dropout or attn_dropout in {type(model).__name__}: give "
            "MultiView other views"
        )
    return found


def _anything(model: nn.Module) -> None:
    """Every model will do."""


class _View(NamedTuple):
    """One row: what is done while the model runs, to which model, and the rate where none is given."""

    within: Within
    check: Callable[[nn.Module], Any] = _anything
    rate: float = 0.1


VIEWS: dict[str, _View] = {
    "token_dropout": _View(_token_dropout, _embedding),
    "token_replacement": _View(_token_replacement),
    "attention_dropout": _View(_attention_dropout, _attentions),
}
_NAMES = ", ".join(VIEWS)


def _named(text: str) -> tuple[_View, float]:
    name, _, number = text.partition(":")
    if name not in VIEWS:
        raise ValueError(f"there is no view {name!r}: there are {_NAMES}, and callables")
    if not number:
        return VIEWS[name], VIEWS[name].rate
    try:
        rate = float(number)
    except ValueError:
        rate = float("nan")
    if not 0 < rate < 1:
        raise ValueError(f"the rate of view {text!r} must be a number in (0, 1), as in {name}:0.1")
    return VIEWS[name], rate


def _called(view: Any) -> tuple[_View, float]:
    if not callable(view):
        raise TypeError(f"a view is a name or a callable, got {type(view).__name__}: there are {_NAMES}")
    return _View(lambda _model, inputs, _rate: contextlib.nullcontext(view(inputs))), 0.0
