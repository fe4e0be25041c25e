"""`feature_memory`: what terms make a training keep."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import torch

from fastkd import arguments
from fastkd.terms.architecture import Architecture, architecture_of
from fastkd.terms.term import Need, Term, Terms

__all__ = ["FeatureMemory", "feature_memory"]

#: What one block of a model has of each need: numbers, for (model, batch, tokens).
_NUMBERS: dict[Need, Callable[[Architecture, int, int], int]] = {
    "hidden_states": lambda model, batch, tokens: batch * tokens * model.width,
    "attentions": lambda model, batch, tokens: batch * model.heads * tokens**2,
    "projections": lambda model, batch, tokens: batch * tokens * (model.heads + 2 * model.kv_heads) * model.head_size,
}


class FeatureMemory(NamedTuple):
    """Bytes, beside what training on the logits alone keeps."""

    #: What the teacher's forward leaves for the terms, until they are computed.
    teacher: int
    #: Gradients that terms keep between their forward and the backward.
    gradients: int
    #: What the student's forward keeps more for the terms: the probabilities of eager attention, of all blocks, which
    #: fused implementations do not keep.
    student: int

    @property
    def total(self) -> int:
        """All together."""
        return self.teacher + self.gradients + self.student


def feature_memory(
    terms: Term | Sequence[Term] | Terms,
    student: Any,
    teacher: Any,
    *,
    batch: int,
    tokens: int,
    dtype: torch.dtype = torch.float32,
) -> FeatureMemory:
    """The bytes that a set of terms keeps, before any model is loaded.

        >>> ten = fastkd.terms.HiddenStateTerm([[i, 8 * i] for i in range(10)])
        >>> fastkd.feature_memory(ten, student, teacher, batch=16, tokens=2048, dtype=torch.float16).teacher
        5368709120

    That is of a teacher of width 8192: 10 · 16 · 2048 · 8192 · 2 bytes. Of hidden states and projections the blocks
    that some term reads are kept, each once; of attentions all. The hidden states after the teacher's last block and
    all of the student's are part of the training in any case. So are its queries, keys and values, but not its
    attentions: blocks · batch · heads · tokens² of them, in 16-bit dtypes once more in fp32, as most models compute the
    softmax, and each kept for the backward. With gradient checkpointing the student keeps less. A transformers whose
    `output_hidden_states` takes no numbers keeps the hidden states of all blocks.

    Args:
        terms: one or several. Terms of your own count as reading all blocks, and without gradients.
        student, teacher: causal language models, or their configurations.
        batch, tokens: rows of a batch and their length.
        dtype: of both models' activations. Under the mixed precision of Trainer the student returns fp32, so its
            gradients are of that.

    Raises ValueError for layers that do not exist, and for numbers below 1.
    """
    arguments.integer("batch", batch, least=1)
    arguments.integer("tokens", tokens, least=1)
    every = [terms] if isinstance(terms, Term) else cast("Sequence[Term]", terms)
    ours, theirs = architecture_of(student), architecture_of(teacher)
    read: dict[Need, set[int]] = {}
    for term in every:
        blocks = term.blocks_read(ours, theirs)
        for need in term.needs:
            whole = blocks is None or need == "attentions"
            read.setdefault(need, set()).update(range(theirs.blocks) if whole else blocks or ())
    read.get("hidden_states", set()).discard(theirs.blocks - 1)  # what the output head gets, and the logits need too
    kept = sum(len(blocks) * _NUMBERS[need](theirs, batch, tokens) for need, blocks in read.items()) * dtype.itemsize
    gradients = sum(term.gradient_bytes(ours, theirs, batch, tokens, dtype) for term in every)
    return FeatureMemory(kept, gradients, _eager(ours, batch, tokens, dtype) if "attentions" in read else 0)


def _eager(model: Architecture, batch: int, tokens: int, dtype: torch.dtype) -> int:
    """Bytes of the probabilities of all blocks, and of softmaxes in fp32 that they are rounded from."""
    each = dtype.itemsize + (4 if dtype.itemsize < 4 else 0)
    return model.blocks * _NUMBERS["attentions"](model, batch, tokens) * each
