"""Multi-token prediction: extra heads that predict tokens further ahead, trained beside the student.

Gloeckle et al. 2024 (arXiv:2404.19737): n heads stand side by side on the trunk's last hidden states. Each is one block
of the trunk's architecture, and all share the output head. Here head 0 is the student's own, which predicts token t + 1
at t; extra head k predicts token t + 1 + k. A block attends to t and before, as the trunk does, and gets nothing of the
tokens between t and its target.

    heads = fastkd.MultiTokenHeads(student.config, 3)
    trainer = KDTrainer(student, arguments, teacher=teacher, terms=[fastkd.MultiTokenTerm(heads)], ...)
"""

from __future__ import annotations

import contextlib
import copy
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from fastkd import arguments
from fastkd.losses import KDLoss, KDParts
from fastkd.sources import Projection
from fastkd.students.blocks import blocks_of
from fastkd.terms.architecture import text_config
from fastkd.terms.term import IGNORED, Batch, Course, Outputs, Term

__all__ = ["HEADS_FILE", "MultiTokenHeads", "MultiTokenTerm"]

#: In the student's directory, beside its own files.
HEADS_FILE = "multi_token_heads.safetensors"


class MultiTokenHeads(nn.Module):
    """Extra prediction heads on a trunk's last hidden states (Gloeckle et al. 2024), side by side.

    A head is the body of the student's own architecture with one block: the block, its rotary embeddings and causal
    mask, and a final norm. It has no embedding of tokens or positions, which the trunk's hidden states carry already.
    Its weights are random, as the architecture initialises them, in torch's default dtype.

    Args:
        config: the student's configuration, `student.config`, of a decoder of transformers.
        n: the number of heads, at least 1. Head k of 1, ..., n predicts token t + 1 + k at t.
        share_output: the heads' hidden states go to the student's output head. False: each has one of its own,
            `outputs[k − 1] [vocab, H]`.

    Raises TypeError for a config or n of the wrong type; ValueError for n < 1, for an encoder-decoder, for an
    architecture that transformers has no body of, for embeddings of positions that cannot be left out, and for a body
    that changes its `inputs_embeds` before the block.
    """

    def __init__(self, config: Any, n: int, *, share_output: bool = True) -> None:
        super().__init__()
        arguments.integer("n", n, least=1)
        arguments.switch("share_output", share_output)
        if not hasattr(config, "get_text_config"):
            raise TypeError(
                f"config must be a configuration of transformers, got {type(config).__name__}: pass student.config"
            )
        if config.is_encoder_decoder:
            raise ValueError(f"multi-token heads need a decoder, but {config.model_type!r} is an encoder-decoder")
        config = config.get_text_config()
        self.hidden_size, self.vocab_size = int(config.hidden_size), int(config.vocab_size)
        self.blocks = nn.ModuleList(_body(config) for _ in range(n))
        std = getattr(config, "initializer_range", 0.02)
        like = next(self.blocks.parameters())
        self.outputs = nn.ParameterList(
            torch.randn(self.vocab_size, self.hidden_size, dtype=like.dtype, device=like.device) * std
            for _ in range(0 if share_output else n)
        )

    def __len__(self) -> int:
        return len(self.blocks)

    def forward(
        self, hidden: Tensor, attention_mask: Tensor | None = None, position_ids: Tensor | None = None
    ) -> list[Tensor]:
        """Hidden states `[batch, tokens, H]` of heads 1, ..., n, as an output head gets them.

        Args:
            hidden: the trunk's last hidden states `[batch, tokens, H]`: `fastkd.project(student, ...).hidden`. They are
                cast to the blocks' dtype.
            attention_mask, position_ids: `[batch, tokens]`, what the trunk was given.

        Raises ValueError for hidden states of another width.
        """
        if hidden.shape[-1] != self.hidden_size:
            raise ValueError(
                f"hidden states {tuple(hidden.shape)} do not fit heads of width {self.hidden_size}: make the heads "
                "with the student's config"
            )
        dtype = next(self.parameters()).dtype
        given = {"attention_mask": attention_mask, "position_ids": position_ids}
        return [
            block(inputs_embeds=hidden.to(dtype), use_cache=False, return_dict=True, **given).last_hidden_state
            for block in self.blocks
        ]

    def project(
        self, trunk: Projection, attention_mask: Tensor | None = None, position_ids: Tensor | None = None
    ) -> list[Projection]:
        """Logits `[batch, tokens, vocab]` of heads 1, ..., n, not formed. Position t of head k is for token t + 1 + k.

        Args:
            trunk: `fastkd.project(student, ...)`: its last hidden states and its output head, which is the heads' too
                where they share it. Its softcap and factor hold for all.
            attention_mask, position_ids: as of `forward`.
        """
        found = self(trunk.hidden, attention_mask, position_ids)
        if not len(self.outputs):
            return [replace(trunk, hidden=hidden) for hidden in found]
        return [
            replace(trunk, hidden=hidden, weight=weight, bias=None)
            for hidden, weight in zip(found, self.outputs, strict=True)
        ]

    def save_pretrained(self, directory: str | os.PathLike[str]) -> None:
        """Write the heads to `multi_token_heads.safetensors` in `directory`, where the student is saved too.

        The student's own files and what loads them know nothing of it: without this file the heads are dropped.
        """
        from safetensors.torch import save_file

        Path(directory).mkdir(parents=True, exist_ok=True)
        weights = {name: weight.detach().contiguous() for name, weight in self.state_dict().items()}
        shared = "no" if len(self.outputs) else "yes"
        described = {"format": "pt", "heads": str(len(self)), "share_output": shared}
        save_file(weights, Path(directory) / HEADS_FILE, described)

    @classmethod
    def from_pretrained(cls, directory: str | os.PathLike[str]) -> MultiTokenHeads:
        """The heads that were saved in the student's `directory`, in the dtype they were saved in, on the CPU.

        Raises FileNotFoundError where it has no heads, ValueError where its configuration is of another student.
        """
        from safetensors import safe_open
        from transformers import AutoConfig

        file = Path(directory) / HEADS_FILE
        if not file.is_file():
            raise FileNotFoundError(f"{directory} has no {HEADS_FILE}: its student was saved without its heads")
        with safe_open(file, "pt") as found:
            described = found.metadata() or {}
            weights = {name: found.get_tensor(name) for name in found.keys()}  # noqa: SIM118  it is no mapping
        if "heads" not in described or not weights:
            raise ValueError(f"{file} was not written by MultiTokenHeads.save_pretrained")
        config = AutoConfig.from_pretrained(directory)
        heads = cls(config, int(described["heads"]), share_output=described["share_output"] == "yes")
        heads.to(next(iter(weights.values())).dtype)
        try:
            heads.load_state_dict(weights)
        except RuntimeError as error:
            raise ValueError(f"{file} is not of the student whose config.json is beside it: {error}") from error
        return heads


class MultiTokenTerm(Term):
    """What extra heads learn: their tokens, and what the student itself says of these once it has read further.

    Σ over heads k of [hard_weight · CE(head k at t, token t + 1 + k) + soft_weight · T² · KL(student at t + k ‖ head k
    at t)] / n, with both distributions at temperature T: the objective of Gloeckle et al. 2024, averaged over heads as
    in DeepSeek-V3 (arXiv:2412.19437), and a distillation of the main head into the others. The main head's side of the
    KL gets no gradient. Hidden states of the trunk and a shared output head get those of the heads.

    A position counts if its target does: label t + 1 + k is not −100 and lies in the row. Position t must be attended
    to, and belong to the target's document where `position_ids` begin again with each. Sums are divided by the step's
    predicted tokens (`Batch.items`), for all heads alike, so accumulated batches add up to a large one.

    Args:
        heads: made of the student's configuration; or how many, which `check` makes then, before the first step.
        weight: factor of the value, or a `Course`.
        hard_weight, soft_weight: of cross-entropy and KL.
        temperature: T of the KL.
        name: what is logged, with `<name>_hard` and `<name>_soft` (T² included), means over heads, unweighted.

    A training has one such term, whose heads are saved beside the student: two are refused.

    Raises TypeError or ValueError for wrong arguments, and before the first step for heads of another student.
    """

    files = (HEADS_FILE,)

    def __init__(
        self,
        heads: MultiTokenHeads | int = 1,
        weight: float | Course = 1.0,
        *,
        hard_weight: float = 0.3,
        soft_weight: float = 0.1,
        temperature: float = 2.0,
        name: str = "multi_token",
    ) -> None:
        super().__init__(name, weight)
        if not isinstance(heads, MultiTokenHeads):
            if not isinstance(heads, int):
                raise TypeError(f"heads must be fastkd.MultiTokenHeads or a number, got {type(heads).__name__}")
            arguments.integer("heads", heads, least=1)
        self.wanted = heads if isinstance(heads, int) else len(heads)
        self.heads = None if isinstance(heads, int) else heads
        self.kd = KDLoss(temperature, soft_weight=soft_weight, hard_weight=hard_weight, shift=True, return_parts=True)

    def check(self, student: nn.Module, teacher: nn.Module | None) -> None:
        """Make the heads, where only their number was given. Raise ValueError for heads of another width."""
        if self.heads is None:
            config: Any = student.config
            self.heads = MultiTokenHeads(config, self.wanted).to(next(student.parameters()).device)
        width = getattr(text_config(student), "hidden_size", self.heads.hidden_size)
        if width != self.heads.hidden_size:
            raise ValueError(
                f"term {self.name!r} has heads of width {self.heads.hidden_size}, but the student's is {width}: make "
                "them with student.config"
            )

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
        """`loss`, the value, its parts, and the value again to be logged."""
        if self.heads is None:
            raise ValueError(f"term {self.name!r} has no heads yet: call check(student, teacher) first")
        if batch.shifted:
            raise ValueError(
                f"term {self.name!r} needs labels further ahead than shift_labels have: batches must bring labels alone"
            )
        main, inputs = student.projection, batch.inputs
        mask, positions = inputs.get("attention_mask"), inputs.get("position_ids")
        found = []
        for ahead, head in enumerate(self.heads.project(main, mask, positions), start=1):
            labels = _labels_ahead(batch.labels, ahead, mask, positions)
            known = main.detach()
            # Row t of the teacher's side is the main head at t + ahead. Those that wrap around have no target.
            further = replace(known, hidden=known.hidden.roll(-ahead, dims=1))
            parts = self.kd(head, further, labels, num_items=batch.items)
            assert isinstance(parts, KDParts)
            found.append(torch.stack(parts))
        loss, soft, hard = torch.stack(found).mean(0)
        return {
            "loss": loss,
            self.name: loss.detach(),
            f"{self.name}_soft": soft.detach(),
            f"{self.name}_hard": hard.detach(),
        }

    def save(self, directory: Path) -> None:
        """The heads, as `MultiTokenHeads.from_pretrained` reads them."""
        if self.heads is not None:
            self.heads.save_pretrained(directory)


def _labels_ahead(labels: Tensor, ahead: int, mask: Any, positions: Any) -> Tensor:
    """Labels `[batch, tokens]` as a shifted loss takes them: that at t + 1 is token t + 1 + ahead, or −100."""
    found = pad(labels[:, ahead:], (0, ahead), value=IGNORED)[:, : labels.shape[1]]
    counts = torch.ones_like(found, dtype=torch.bool)
    if isinstance(mask, Tensor) and mask.shape == labels.shape:
        counts[:, 1:] &= mask[:, :-1].bool()
    if isinstance(positions, Tensor) and positions.shape == labels.shape:
        # Where documents are packed, positions begin again with each.
        counts[:, 1:] &= positions.roll(-1 - ahead, dims=1)[:, :-1] == positions[:, :-1] + 1 + ahead
    return torch.where(counts, found, IGNORED)


def _body(config: Any) -> nn.Module:
    """One block of an architecture, with the norm after it, as a model from `inputs_embeds` to hidden states."""
    from transformers import AutoModel

    layers = config.num_hidden_layers
    one = copy.deepcopy(config)
    for name, value in vars(config).items():
        if "layer" in name and isinstance(value, (list, tuple)) and len(value) == layers:
            setattr(one, name, type(value)(value[-1:]))  # what is listed by layers
    one.num_hidden_layers = 1
    one.vocab_size = 1  # the embedding is made only to be dropped
    one.pad_token_id = one.bos_token_id = one.eos_token_id = None
    for name in ("embedding_multiplier", "embedding_scale"):  # Granite and others scale what is no embedding here
        if isinstance(getattr(one, name, None), int | float):
            setattr(one, name, 1.0)
    body: Any = AutoModel.from_config(one, dtype=torch.get_default_dtype())
    body.set_input_embeddings(None)
    for name, child in list(body.named_modules()):
        if type(child) is nn.Embedding and "." not in name:
            setattr(body, name, _NoPositions(child.embedding_dim))
        elif isinstance(child, nn.Embedding):
            raise ValueError(
                f"{type(body).__name__} embeds positions with {name}, a {type(child).__name__}, which cannot be left "
                "out: multi-token heads of this architecture have to be written by hand"
            )
    _check_passed_on(body)
    return body  # type: ignore[no-any-return]


class _Reached(Exception):
    """The block, which need not run: its attention may be a kernel of another device or dtype."""


def _check_passed_on(body: Any) -> None:
    """Raise ValueError for a body that does to `inputs_embeds`, before its block, what only embeddings need."""
    like = next(body.parameters())
    if like.is_meta:  # of a model that is only looked at, and cannot be run
        return
    given = torch.linspace(-1, 1, int(body.config.hidden_size), dtype=like.dtype, device=like.device).view(1, 1, -1)
    reached: list[Tensor] = []

    def look(block: nn.Module, args: tuple[Any, ...], options: dict[str, Any]) -> None:
        reached.append(args[0] if args else options["hidden_states"])
        raise _Reached

    hook = blocks_of(body)[1][0].register_forward_pre_hook(look, with_kwargs=True)
    was_training = body.training
    try:
        with torch.no_grad(), contextlib.suppress(_Reached):
            body.eval()(inputs_embeds=given, use_cache=False)
    finally:
        hook.remove()
        body.train(was_training)
    if not torch.equal(reached[0], given):
        raise ValueError(
            f"{type(body).__name__} changes its inputs_embeds before the first block, which hidden states of the trunk "
            "cannot go through: multi-token heads of this architecture have to be written by hand"
        )


class _NoPositions(nn.Module):
    """In the place of an embedding of positions: 0, since hidden states of the trunk have them.

    Of a dtype below every other, so that the sum with the hidden states stays in theirs.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    def forward(self, positions: Tensor) -> Tensor:
        return torch.zeros((), dtype=torch.bool, device=positions.device).expand(*positions.shape, self.width)
