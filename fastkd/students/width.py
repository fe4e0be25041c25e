"""A narrower student: the channels, heads and neurons of its teacher that are most active on a few batches."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fastkd.arguments import integer
from fastkd.students.activity import Activity, observed
from fastkd.students.blocks import blocks_of, check_model, made_of, model_configuration

__all__ = ["narrow", "narrowed_configuration"]

#: A module's own name → what its outputs and its inputs are. Others read and write the residual stream.
_PROJECTIONS = {
    **dict.fromkeys(("q_proj",), ("heads", "residual")),
    **dict.fromkeys(("k_proj", "v_proj"), ("groups", "residual")),
    **dict.fromkeys(("o_proj", "attn.c_proj"), ("residual", "heads")),
    **dict.fromkeys(("gate_proj", "up_proj", "mlp.c_fc"), ("neurons", "residual")),
    **dict.fromkeys(("down_proj", "mlp.c_proj"), ("residual", "neurons")),
    "attn.c_attn": ("queries, keys and values", "residual"),
    "q_norm": ("heads", "heads"),  # where they are over all heads, as OLMo's
    "k_norm": ("groups", "groups"),
}


def narrow(model: Any, width: int, batches: Iterable[Mapping[str, Any]]) -> Any:
    """A copy of a causal language model with `width` of the channels of its residual stream, and smaller blocks.

    Kept are the channels, heads and neurons of the largest activation norms over the batches (Minitron: Muralidharan
    et al. 2024, arXiv:2407.14679): a channel's is the root mean square of what the norms make of it, summed over all
    norms; a head's that of its output, and a neuron's that of its activation. Heads keep their size; their number, and
    the width of the MLP, shrink as the width does. Whole groups of query heads go with their head of keys, where these
    can be divided; else a share of each group. Experts of a mixture keep their number and their own width. Where the
    architecture scales embeddings by √width, as Gemma's does, the scale is that of the student's width.

        student = fastkd.students.narrow(teacher, 384, [{"input_ids": ids} for ids in text[:32].split(8)]).train()

    Args:
        model: of transformers, without adapters, in floating point: GPT-2, or a decoder whose projections are named as
            Llama's.
        width: of the student, below the model's `hidden_size`.
        batches: keyword arguments of `model`: `input_ids [batch, tokens]`, `attention_mask`, ... Tokens that the mask
            leaves out do not count. Some thousands of tokens are enough.

    Returns:
        A model of the same class, dtypes and mode, which shares no memory with `model`.

    Raises:
        TypeError: `model` is not a causal language model of transformers, has adapters, or `width` is not an int.
        ValueError: a width that is not below the model's or cannot be divided into heads; no batches; quantised
            weights; or a projection of an architecture that is not known here.
    """
    check_model(model)
    config = narrowed_configuration(model, width)
    found = observed(model, batches, _norms(model), _inputs_of(model))
    keep = _Kept(model, model.config.get_text_config(), config.get_text_config(), found)
    return made_of(model, config, cut=keep.cut)


def narrowed_configuration(model: Any, width: int) -> Any:
    """The configuration of `narrow(model, width, …)`. Raises ValueError as it does."""
    config = model_configuration(model)
    whole, cut = model.config.get_text_config(), config.get_text_config()
    hidden, heads = whole.hidden_size, whole.num_attention_heads
    groups = getattr(whole, "num_key_value_heads", None) or heads
    if hasattr(whole, "word_embed_proj_dim"):
        raise ValueError(
            f"{type(model).__name__} has embeddings of a width of their own, word_embed_proj_dim="
            f"{whole.word_embed_proj_dim}: fastkd does not know how to narrow them. Use keep_layers, or another model"
        )
    if not 0 < integer("width", width) < hidden:
        raise ValueError(f"width must be from 1 to {hidden - 1}, below the model's {hidden}, got {width}")
    fits = [size for size in range(1, hidden) if _heads(size, hidden, heads, groups)]
    if width not in fits:
        raise ValueError(
            f"width {width} gives no whole number of heads: of {heads} heads in {groups} groups over {hidden} channels "
            f"widths of {', '.join(map(str, fits)) or 'none'} do"
        )
    cut.hidden_size = width
    cut.num_attention_heads, fewer = _heads(width, hidden, heads, groups)
    if getattr(whole, "num_key_value_heads", None):
        cut.num_key_value_heads = fewer
    if hasattr(whole, "head_dim"):
        cut.head_dim = whole.head_dim or hidden // heads
    neurons = "n_inner" if hasattr(whole, "n_inner") else "intermediate_size"
    if getattr(whole, neurons, None) is not None and _has_neurons(model, getattr(whole, neurons)):
        setattr(cut, neurons, max(1, round(getattr(whole, neurons) * width / hidden)))
    return config


def _heads(width: int, hidden: int, heads: int, groups: int) -> tuple[int, ...]:
    """(heads, groups) at this width; nothing where they are no whole numbers."""
    if width * groups % hidden == 0:
        return width * heads // hidden, width * groups // hidden
    fewer, rest = divmod(width * heads, hidden)
    return (fewer, groups) if rest == 0 and fewer % groups == 0 else ()


def _has_neurons(model: Any, size: int) -> bool:
    """Whether an MLP has its neurons in a projection, not in a tensor of all experts."""
    return any(_inputs(name) == "neurons" and size in _matrix(one).shape for name, one in _inputs_of(model).items())


def _inputs_of(model: Any) -> dict[str, nn.Module]:
    """The projections whose inputs are heads or neurons, by their names."""
    inside = f"{blocks_of(model)[0]}."
    ends = {name: _ends(name) for name, _ in model.named_modules() if name.startswith(inside)}
    return {name: model.get_submodule(name) for name, both in ends.items() if both and both[0] == "residual"}


def _norms(model: Any) -> dict[str, nn.Module]:
    """The norms of the residual stream, by their names. ValueError where there are none."""
    hidden = [model.config.get_text_config().hidden_size]
    found = {}
    for name, module in model.named_modules():
        shapes = [list(weight.shape) for weight in module.parameters(recurse=False)]
        if shapes and _ends(name) is None and all(shape == hidden for shape in shapes):
            found[name] = module
    if not found:
        raise ValueError(f"{type(model).__name__} has no norms over its hidden_size, whose outputs rank the channels")
    return found


def _ends(name: str) -> tuple[str, str] | None:
    """What the outputs and inputs of a module are, by its name."""
    parts = name.split(".")
    return _PROJECTIONS.get(parts[-1]) or _PROJECTIONS.get(".".join(parts[-2:]))


def _inputs(name: str) -> str | None:
    ends = _ends(name)
    return ends and ends[1]


def _matrix(module: nn.Module) -> Tensor:
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight


class _Kept:
    """Which channels, heads and neurons are kept."""

    def __init__(self, model: Any, whole: Any, cut: Any, found: Activity) -> None:
        self._model, self._found = model, found
        self._hidden, self._heads = whole.hidden_size, whole.num_attention_heads
        self._groups = getattr(whole, "num_key_value_heads", None) or self._heads
        self._size = getattr(whole, "head_dim", None) or self._hidden // self._heads
        self._fewer = cut.num_attention_heads
        self._fewer_groups = getattr(cut, "num_key_value_heads", None) or self._fewer
        self._channels = _largest(found.channels, cut.hidden_size)
        self._inside = f"{blocks_of(model)[0]}."

    def cut(self, module: str, parameter: str, tensor: Tensor, shape: torch.Size) -> Tensor:
        """What the student keeps of a parameter, as `made_of` asks for it."""
        for axis, size in enumerate(shape):
            if tensor.shape[axis] != size:
                tensor = tensor.index_select(axis, self._index(module, parameter, tensor, axis, size))
        return tensor

    def _index(self, module: str, parameter: str, tensor: Tensor, axis: int, size: int) -> Tensor:
        role = self._role(module, parameter, tensor, axis)
        length, index = tensor.shape[axis], None
        if role == "residual" and length == self._hidden:
            index = self._channels
        elif role == "neurons":
            norms = self._beside(module, "neurons")
            index = None if norms is None else _largest(norms, size)
        elif role in ("heads", "groups", "queries, keys and values"):
            norms = self._beside(module, "heads")
            index = None if norms is None else self._attention(norms, role)
        if index is None or len(index) != size:
            raise ValueError(
                f"{module}.{parameter} {list(tensor.shape)} has {length} along axis {axis}, which the student's "
                f"configuration makes {size}: fastkd does not know how this architecture's are chosen"
            )
        return index.to(tensor.device)

    def _role(self, module: str, parameter: str, tensor: Tensor, axis: int) -> str | None:
        """What an axis is; None where that is not known."""
        ends = _ends(module)
        if ends is None:
            # In a block, what is as long as the residual stream may be heads, but for what a matrix reads.
            reads = axis == tensor.dim() - 1 or module.endswith("experts")
            return "residual" if reads or not module.startswith(self._inside) else None
        transposed = type(self._model.get_submodule(module)).__name__ == "Conv1D"  # GPT-2's: [inputs, outputs]
        return ends[axis != transposed] if parameter == "weight" else ends[0]

    def _beside(self, module: str, role: str) -> Tensor | None:
        """The norms of the heads or neurons that enter the projection in the same part of the same block."""
        part = module.rpartition(".")[0]
        for name, norms in self._found.inputs.items():
            if name.rpartition(".")[0] == part and _inputs(name) == role:
                return norms
        return None

    def _attention(self, norms: Tensor, role: str) -> Tensor:
        """Rows of a projection: of the heads kept in its block, of their groups, or of all three parts of GPT-2's."""
        each = norms.square().view(self._groups, -1, self._size).sum(2).sqrt()  # [groups, heads of a group]
        groups = _largest(each.sum(1), self._fewer_groups)
        inside = self._fewer // self._fewer_groups
        heads = torch.cat([group * each.shape[1] + _largest(each[group], inside) for group in groups])
        rows = _rows(groups if role == "groups" else heads, self._size)
        if role == "queries, keys and values":
            return torch.cat([rows + part * self._heads * self._size for part in range(3)])
        return rows


def _largest(norms: Tensor, count: int) -> Tensor:
    """Where the `count` largest are, ascending."""
    return norms.topk(count).indices.sort().values


def _rows(heads: Tensor, size: int) -> Tensor:
    return (heads[:, None] * size + torch.arange(size, dtype=torch.int64, device=heads.device)).flatten()
