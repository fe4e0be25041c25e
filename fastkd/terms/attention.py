"""`AttentionTerm`: the student is to look where the teacher looks, block by block."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from fastkd.rows import kept_dtype
from fastkd.terms.architecture import Architecture, architecture_of
from fastkd.terms.hidden import same_batch
from fastkd.terms.layers import LayerMap, check_layers, is_learned, layer_pairs
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
    library's kernel, a chunk at a time; other positions meet no kernel on the CPU.

        terms = Terms([KDTerm(), AttentionTerm("last:1", relation="values")])
        terms.check(student, teacher)

    Args:
        layers: which block learns from which, as in `HiddenStateTerm`, without `"learned"`.
        relation: what the rows are.
            `"attention"`: the probabilities that the models return, which fused implementations do not: load both with
            `attn_implementation="eager"`.
            `"qk"`: the same, computed here from queries and keys after the rotary embedding (MiniLM, Wang et al. 2020).
            Any implementation does, and no `[tokens, tokens]` is kept.
            `"values"`: softmax(v vᵀ / √head size), of heads of values (MiniLM, MiniLMv2, Wang et al. 2021).
            Both see the keys up to the query that `attention_mask` does not mask; of windows or packed documents they
            know nothing.
        weight, name: as of `Term`.

    Probabilities smaller than the smallest normal fp32 number count as that.

    Raises TypeError or ValueError for other values. `check` raises ValueError for blocks that do not exist, numbers of
    heads of which none divides the other, and for `"attention"` a fused implementation or a student with attention
    dropout, whose rows are not probabilities; `forward` for unequal batches or sequences, and probabilities in fp16,
    whose gradients would overflow.
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
        self.teachers_blocks = self.blocks_read(ours, theirs)
        heads = [one.kv_heads if self.relation == "values" else one.heads for one in (ours, theirs)]
        self._check_heads(*heads)
        if self.relation == "attention":
            self._check_returned(ours, theirs)

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
        if ours.dropout:
            raise ValueError(
                f"term {self.name!r}: the student returns its attentions after a dropout of {ours.dropout}, so their "
                "rows are not probabilities: set it to 0 in its configuration, or take relation='qk'"
            )

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        """The mean over pairs, heads and tokens."""
        if not self.pairs:
            raise ValueError(f"term {self.name!r} knows no models: call check(student, teacher) before the first step")
        total: Any = 0.0
        for block, other in self.pairs:
            ours, theirs = self._rows(student, block, batch), self._rows(teacher, other, batch)
            x, y = ours.tensors[0], theirs.tensors[0]
            same_batch(self.name, "attentions", _batch_of(x), _batch_of(y), batch)
            self._check_heads(ours.heads, theirs.heads)
            counted = nn.functional.pad(batch.counted, (0, 1)).to(x.device)
            total = total + divergence_of_rows(ours, theirs, counted)
        return batch.over_step(total / len(self.pairs))

    def _rows(self, outputs: Outputs, block: int, batch: Batch) -> Probabilities | Products:
        if self.relation == "attention":
            found = outputs.attentions
            if block >= len(found):
                raise ValueError(f"term {self.name!r} needs attentions of block {block}, but {len(found)} have some")
            if found[block].dtype == torch.float16 and found[block].requires_grad:
                raise ValueError(
                    f"term {self.name!r}: gradients of fp16 probabilities overflow: train in bf16, or take "
                    "relation='qk'"
                )
            return Probabilities(found[block])
        heads = outputs.projections.get(block)
        if heads is None:
            raise ValueError(f"term {self.name!r}: block {block} has no attention with queries, keys and values")
        mask = batch.inputs.get("attention_mask")
        real = mask.to(device=heads.values.device, dtype=torch.bool) if mask is not None and mask.dim() == 2 else None
        if self.relation == "values":
            return Products(heads.values, heads.values, heads.values.shape[-1] ** -0.5, real)
        return Products(heads.queries, heads.keys, heads.scaling, real)


def _batch_of(rows: Tensor) -> torch.Size:
    """(batch, tokens) of `[batch, heads, tokens, ...]`."""
    return torch.Size((rows.shape[0], rows.shape[2]))
