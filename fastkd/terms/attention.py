"""`AttentionTerm`: the student is to look where the teacher looks, block by block."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from fastkd.projection.sides import autocast_dtype
from fastkd.rows import kept_dtype
from fastkd.terms.architecture import Architecture, architecture_of
from fastkd.terms.hidden import same_batch
from fastkd.terms.layers import LayerMap, check_layers, is_learned, layer_pairs
from fastkd.terms.recording import Heads, check_recordable
from fastkd.terms.relations import Probabilities, Products, divergence_of_rows
from fastkd.terms.term import Batch, Course, Need, Outputs, Term

__all__ = ["AttentionTerm", "Relation"]

Relation = Literal["attention", "qk", "values"]
_RELATIONS: dict[str, Need] = {"attention": "attentions", "qk": "projections", "values": "projections"}


class AttentionTerm(Term):
    """KL(teacher ‖ student) of rows of attention, what each query makes of all keys, after the blocks that a map pairs.

    Of a pair, with the teacher's probabilities P and the student's Q, both `[heads, keys]`, of one query:

        Σ over keys of P̄ · log(P̄ / Q̄), mean over heads

    If one model has more heads, P̄ or Q̄ are means over groups of its heads that stand side by side, as many as the
    other has. The value is the mean over pairs, and over the positions whose next label counts. Rows go through the
    library's kernel, a chunk at a time; on the CPU, those of other positions are not computed.

        terms = Terms([KDTerm(), AttentionTerm("last:1", relation="values")])
        terms.check(student, teacher)

    Args:
        layers: which block learns from which, as in `HiddenStateTerm`, without `"learned"`.
        relation: what the rows are.
            `"attention"`: the probabilities that the models return, which fused implementations do not: load both with
            `attn_implementation="eager"`.
            `"qk"`: the same, computed here from queries and keys after the rotary embedding (MiniLM, Wang et al. 2020),
            softcap included. Any implementation does, and no `[tokens, tokens]` is kept.
            `"values"`: softmax(v vᵀ / √head size), of heads of values (MiniLM, MiniLMv2, Wang et al. 2021).
            Both see the keys up to the query that `attention_mask` does not mask. So `attention_mask` is
            `[batch, tokens]`, rows are not packed, and for `"qk"` no sliding window is shorter than the rows.
        weight, name: as of `Term`.

    Probabilities smaller than the smallest normal fp32 number count as that.

    Raises TypeError or ValueError for other values. `check` raises ValueError for blocks that do not exist, numbers of
    heads of which none divides the other; for `"attention"` and `"qk"` models with attention sinks, whose rows do not
    sum to 1; for `"attention"` fused implementations, and attention dropout of the student or of a teacher that is
    trained, whose rows are no probabilities; for `"qk"` and `"values"` models that do not look their attention up in
    transformers' table, and a student with reentrant gradient checkpointing. `forward` raises it for unequal batches or
    sequences; for probabilities in fp16, their own dtype or autocast's, whose gradients would overflow; for those that
    have no gradient under reentrant checkpointing; and for `"qk"` and `"values"` for masks, packed rows and windows
    that they do not follow.
    """

    def __init__(
        self,
        layers: LayerMap = "uniform",
        relation: Relation = "attention",
        *,
        weight: float | Course = 1.0,
        name: str = "attention",
    ) -> None:
        super().__init__(name, weight)
        check_layers(layers)
        if is_learned(layers):
            raise ValueError("layers='learned' mixes hidden states: for attention take uniform, last, last:N or pairs")
        if relation not in _RELATIONS:
            raise ValueError(f"relation must be one of {', '.join(_RELATIONS)}, got {relation!r}")
        self.layers, self.relation = layers, relation
        self.needs = (_RELATIONS[relation],)
        #: (block of the student, block of the teacher); set by `check`.
        self.pairs: list[tuple[int, int]] = []

    def check(self, student: nn.Module, teacher: nn.Module | None) -> None:
        """Raise ValueError for models it cannot serve."""
        if teacher is None:
            raise ValueError(f"term {self.name!r} reads the teacher's attention, which no cache has: take a model")
        ours, theirs = architecture_of(student), architecture_of(teacher)
        self.pairs = layer_pairs(self.layers, ours.blocks, theirs.blocks)
        self.students_blocks = frozenset(block for block, _ in self.pairs)
        self.teachers_blocks = self.blocks_read(ours, theirs)
        heads = [one.kv_heads if self.relation == "values" else one.heads for one in (ours, theirs)]
        self._check_heads(*heads)
        if self.relation == "attention":
            self._check_returned(ours, theirs)
            self._check_dropout(ours, theirs, any(weight.requires_grad for weight in teacher.parameters()))
        else:
            check_recordable(student)
            check_recordable(teacher)
            self._check_checkpointing(student)
        for whose, model in (("student", student), ("teacher", teacher)):
            if self.relation != "values" and _has_sinks(model):
                raise ValueError(
                    f"term {self.name!r}: the {whose}, {type(model).__name__}, has attention sinks, so its rows over "
                    "the keys do not sum to 1: take relation='values'"
                )

    def blocks_read(self, student: Architecture, teacher: Architecture) -> frozenset[int]:
        """Those of the pairs."""
        return frozenset(other for _, other in layer_pairs(self.layers, student.blocks, teacher.blocks))

    def gradient_bytes(
        self, student: Architecture, teacher: Architecture, batch: int, tokens: int, dtype: torch.dtype
    ) -> int:
        """Gradients of the student's probabilities, or of its projections, of each pair."""
        heads = {"attention": student.heads, "qk": student.heads + student.kv_heads, "values": 2 * student.kv_heads}
        size = tokens if self.relation == "attention" else student.head_size
        numbers = batch * heads[self.relation] * tokens * size
        return len(layer_pairs(self.layers, student.blocks, teacher.blocks)) * numbers * kept_dtype(dtype).itemsize

    def _check_heads(self, ours: int, theirs: int) -> None:
        if max(ours, theirs) % min(ours, theirs):
            raise ValueError(
                f"term {self.name!r}: the student has {ours} heads and the teacher {theirs}, which are no groups of "
                "equal size: choose a student whose heads divide the teacher's"
            )

    def _check_returned(self, ours: Architecture, theirs: Architecture) -> None:
        for whose, one in (("student", ours), ("teacher", theirs)):
            if one.implementation not in (None, "eager"):
                raise ValueError(
                    f"term {self.name!r} reads attentions, which the {whose}'s implementation {one.implementation!r} "
                    "does not return: load it with attn_implementation='eager', or take relation='qk'"
                )

    def _check_dropout(self, ours: Architecture, theirs: Architecture, trained: bool) -> None:
        for whose, one in (("student", ours), ("teacher, which is trained,", theirs)):
            if one.dropout and (trained or one is ours):
                raise ValueError(
                    f"term {self.name!r}: the {whose} returns its attentions after a dropout of {one.dropout}, so "
                    "their rows are not probabilities: set it to 0 in its configuration, or take relation='qk'"
                )

    def _check_checkpointing(self, student: nn.Module) -> None:
        """Reentrant checkpointing runs blocks without a graph, so what is computed within has no gradient."""
        for module in student.modules():
            options = getattr(getattr(module, "_gradient_checkpointing_func", None), "keywords", None)
            reentrant = isinstance(options, dict) and options.get("use_reentrant", True)
            if reentrant and getattr(module, "gradient_checkpointing", False):
                raise ValueError(
                    f"term {self.name!r} with relation={self.relation!r} needs gradients within blocks, which "
                    "reentrant gradient checkpointing does not have: set gradient_checkpointing_kwargs="
                    "{'use_reentrant': False}"
                )

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        """The mean over pairs, heads and tokens."""
        if not self.pairs:
            raise ValueError(f"term {self.name!r} knows no models: call check(student, teacher) before the first step")
        total: Any = 0.0
        for block, other in self.pairs:
            ours, theirs = self._rows(student, block, batch), self._rows(teacher, other, batch)
            x, y = ours.tensors[0], theirs.tensors[0]
            if not x.requires_grad and student.model is not None:
                self._check_checkpointing(student.model)  # it may be enabled after `check`, as Trainer does
            same_batch(self.name, "attentions", _batch_of(x), _batch_of(y), batch)
            self._check_heads(ours.heads, theirs.heads)
            counted = batch.counted.to(x.device)
            total = total + divergence_of_rows(ours, theirs, counted)
        return batch.over_step(total / len(self.pairs))

    def _rows(self, outputs: Outputs, block: int, batch: Batch) -> Probabilities | Products:
        if self.relation == "attention":
            found = outputs.attentions
            if block >= len(found):
                raise ValueError(f"term {self.name!r} needs attentions of block {block}, but {len(found)} have some")
            # Trainer casts what the student returns to fp32; gradients within it are of autocast's dtype all the same.
            if (
                torch.float16 in (found[block].dtype, autocast_dtype(found[block].device))
                and found[block].requires_grad
            ):
                raise ValueError(
                    f"term {self.name!r}: gradients of fp16 probabilities overflow: train in bf16, or take "
                    "relation='qk'"
                )
            return Probabilities(found[block])
        heads = outputs.projections.get(block)
        if heads is None:
            raise ValueError(f"term {self.name!r}: block {block} has no attention with queries, keys and values")
        real = self._real(batch, heads)
        if self.relation == "values":
            return Products(heads.values, heads.values, heads.values.shape[-1] ** -0.5, real)
        return Products(heads.queries, heads.keys, heads.scaling, real, heads.softcap)

    def _real(self, batch: Batch, heads: Heads) -> Tensor | None:
        """The keys that are no padding. ValueError where queries see others than those up to their own place."""
        mask, positions = batch.inputs.get("attention_mask"), batch.inputs.get("position_ids")
        device, shape = heads.values.device, _batch_of(heads.values)
        instead = "the models must return it: take relation='attention'"
        if mask is not None and (not isinstance(mask, Tensor) or mask.dim() != 2):
            form = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
            raise ValueError(
                f"term {self.name!r} needs an attention_mask [batch, tokens], got {form}: for others {instead}"
            )
        real = None if mask is None else mask.to(device=device, dtype=torch.bool)
        if isinstance(positions, Tensor) and positions.dim() == 2:
            again = positions[:, 1:] <= positions[:, :-1]
            if mask is not None and mask.shape == positions.shape:
                again = again & mask[:, 1:].bool() & mask[:, :-1].bool()  # those of padding are arbitrary
            if again.any():
                raise ValueError(
                    f"term {self.name!r}: position_ids begin again within a row, so documents are packed: give each a "
                    f"row of its own, or {instead}"
                )
        if self.relation == "qk" and heads.window is not None and shape[1] > heads.window:
            raise ValueError(
                f"term {self.name!r}: a sliding window of {heads.window} tokens is shorter than rows of {shape[1]}: "
                f"shorten the rows, or {instead}"
            )
        return real


def _has_sinks(model: nn.Module) -> bool:
    """Whether softmaxes of attention have a column that is no key, as in GPT-OSS."""
    return any(isinstance(getattr(module, "sinks", None), Tensor) for module in model.modules())


def _batch_of(rows: Tensor) -> torch.Size:
    """(batch, tokens) of `[batch, heads, tokens, ...]`."""
    return torch.Size((rows.shape[0], rows.shape[2]))
