"""How good a student is, at temperature 1: on the text, and against its teacher.

A model is run over the windows once; what is kept is its last hidden states and its output head (`Predictions`), of
which logits are made a few rows at a time. So the teacher's body can be freed before the student trains, and any
number of students is compared with it at the cost of its head.

Several processes share the work by batches of windows. Every number is made of sums over single windows, added in the
order of the windows, so it has the bits of one process.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

import fastkd
from fastkd.processes import Processes
from fastkd.projection.loop import logit_chunks
from fastkd.training.dealing import Deal

__all__ = [
    "BINS",
    "LARGEST_LOSS",
    "Finding",
    "Measures",
    "Predictions",
    "WindowSums",
    "diagnosis",
    "exact_logits",
    "flops",
    "measure",
    "predict",
    "retention",
    "unigram_loss",
]

BINS = 15  # of confidence, for the calibration error
LARGEST_LOSS = 700.0  # whose perplexity is a float
_ROWS = 256  # whose logits exist at a time
Rows = tuple[fastkd.Projection, Tensor]  # logits `[_ROWS, V]` of predicted tokens, and their labels
_KL = fastkd.KDLoss(temperature=1.0, soft_weight=1.0, hard_weight=0.0, reduction="none")


@dataclass(frozen=True)
class Predictions:
    """What a model expects over windows: of each batch that is this process's the hidden states, and its head."""

    hidden: list[Tensor]  # `[windows, length, H]` on the CPU
    head: fastkd.Projection  # of no tokens
    deal: Deal

    def batches(self, windows: Tensor) -> Iterator[Iterator[Rows]]:
        """Of each batch of `windows` [n, length] that is this process's the predicted tokens, in turn."""
        for hidden, ids in zip(self.hidden, self.deal.mine(windows), strict=True):
            yield self._rows(hidden[:, :-1].flatten(0, 1), ids[:, 1:].flatten())

    def _rows(self, hidden: Tensor, labels: Tensor) -> Iterator[Rows]:
        for start in range(0, len(labels), _ROWS):
            part = hidden[start : start + _ROWS].to(self.head.device)
            yield replace(self.head, hidden=part), labels[start : start + _ROWS].to(self.head.device)

    @property
    def vocab_size(self) -> int:
        return self.head.shape[-1]


@torch.no_grad()
def predict(
    model: Any, windows: Tensor, batch_size: int, vocab_size: int | None = None, processes: Processes | None = None
) -> Predictions:
    """Run `model` over `windows` [n, length], in eval mode. Only the first `vocab_size` ids count, if given.

    Each of `processes` runs the batches that are its own. The head shares the model's memory: to keep the predictions
    of a model that is trained further, give that one's head other memory first.
    """
    training = model.training
    model.eval()
    deal, hidden = Deal(batch_size, processes or Processes()), []
    mine = deal.mine(windows)
    for ids in mine or [windows[:1, :1]]:  # a process without a batch needs the head
        ids = ids.to(model.device)
        found = fastkd.project(model, input_ids=ids, attention_mask=torch.ones_like(ids)).detach()
        hidden.append(found.hidden.cpu())
    model.train(training)
    bias = None if found.bias is None else found.bias[:vocab_size]
    head = replace(found, hidden=found.hidden[:0, 0], weight=found.weight[:vocab_size], bias=bias)
    return Predictions(hidden[: len(mine)], head, deal)


def exact_logits(projection: fastkd.Projection) -> Tensor:
    """fp32 `[tokens, V]`, not rounded to the model's dtype; tokens are the collapsed leading dimensions."""
    return torch.cat([logits.clone() for _, logits in logit_chunks(projection, projection.shape[-1])])


@dataclass(frozen=True)
class WindowSums:
    """Sums over the predicted tokens of each window, for a bootstrap to draw from: float64 `[windows]` on the CPU."""

    tokens: Tensor  # how many
    loss: Tensor  # cross-entropy in nats
    kl: Tensor | None = None  # KL(teacher ‖ student) in nats


@dataclass(frozen=True)
class Measures:
    """Means over every predicted token. What compares with the teacher is None where there is none."""

    loss: float  # cross-entropy in nats
    calibration_error: float
    #: Per bin of confidence: share of the tokens, mean confidence, share that was right.
    calibration: list[list[float]]
    sums: WindowSums = field(repr=False, compare=False)
    kl: float | None = None  # KL(teacher ‖ student) in nats
    top1_agreement: float | None = None
    top5_agreement: float | None = None  # share of the teacher's five likeliest tokens among the student's
    probability_correlation: float | None = None  # Pearson's, over all tokens and the whole vocabulary

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.loss, LARGEST_LOSS))

    def record(self) -> dict[str, Any]:
        """What metrics.json says: sizes in place of the sums of every window."""
        means = {name: value for name, value in vars(self).items() if name != "sums"}
        return {"windows": len(self.sums.tokens), "tokens": int(self.sums.tokens.sum()), **means}


@torch.no_grad()
def measure(student: Predictions, windows: Tensor, teacher: Predictions | None = None) -> Measures:
    """Judge a student on `windows` [n, length], on its own and, if there is one, against a teacher.

    Both were run in batches of one size. All processes that ran them call this, and get the same.
    """
    compared = teacher is not None and teacher is not student

    def of_batches() -> list[Tensor]:
        above = teacher.batches(windows) if teacher is not None and compared else itertools.repeat(None)
        return [
            torch.cat(list(_of_tokens(*pair))).unflatten(0, (-1, windows.shape[1] - 1)).sum(1)
            for pair in zip(student.batches(windows), above, strict=False)
        ]

    by_window = student.deal.together(of_batches)
    loss, kl = by_window[:, 0], by_window[:, 1] if compared else None
    tokens = torch.full_like(loss, windows.shape[1] - 1)
    total = by_window.sum(0)
    totals, bins = total[: -3 * BINS], total[-3 * BINS :].view(3, BINS)
    count = bins[0].sum()
    share, confidence, right = bins[0] / count, bins[1] / bins[0].clamp(min=1), bins[2] / bins[0].clamp(min=1)
    measures = Measures(
        loss=(totals[0] / count).item(),
        calibration_error=(share * (confidence - right).abs()).sum().item(),
        calibration=torch.stack((share, confidence, right), 1).tolist(),
        sums=WindowSums(tokens, loss, kl),
    )
    if teacher is None:
        return measures
    if not compared:
        sums = replace(measures.sums, kl=torch.zeros_like(loss))
        return replace(measures, sums=sums, kl=0.0, top1_agreement=1.0, top5_agreement=1.0, probability_correlation=1.0)
    uniform = count / student.vocab_size  # the product of the sums, divided by the number of probabilities
    both, ours, theirs = totals[4:] - uniform
    return replace(
        measures,
        kl=(totals[1] / count).item(),
        top1_agreement=(totals[2] / count).item(),
        top5_agreement=(totals[3] / count).item(),
        probability_correlation=(both / (ours * theirs).sqrt()).item(),
    )


def _of_tokens(rows: Iterable[Rows], above: Iterable[Rows] | None) -> Iterator[Tensor]:
    """What is summed of each token, float64 `[_ROWS, k]` on the CPU.

    The loss; with a teacher the KL, and what `_agreement` says; then by bins of confidence: 1, confidence, whether the
    likeliest token was right.
    """
    theirs: Iterable[Rows | None] = itertools.repeat(None) if above is None else above
    for (projection, labels), row in zip(rows, theirs, strict=False):
        logits = exact_logits(projection)
        found = fastkd.row_statistics(logits, labels)
        columns = [-found.label_logprob]
        if row is not None:
            taught = exact_logits(row[0]).to(logits.device)
            columns += [_KL(logits, taught), *_agreement(logits, taught)]
        confidence = (logits.amax(-1) - found.log_sum_exp).exp()
        place = (confidence * BINS).long().clamp(max=BINS - 1)
        binned = torch.stack((torch.ones_like(confidence), confidence, found.argmax == labels), 1).double()
        bins = binned[:, :, None] * torch.nn.functional.one_hot(place, BINS)[:, None]
        yield torch.cat((torch.stack([column.double() for column in columns], 1), bins.flatten(1)), 1).cpu()


def _agreement(logits: Tensor, above: Tensor) -> list[Tensor]:
    """Of each row float64: same likeliest token, share in common of five, p·q, q², p²."""
    k = min(5, logits.shape[-1])
    ours, theirs = logits.topk(k).indices, above.topk(k).indices
    q, p = fastkd.log_softmax(logits).exp(), fastkd.log_softmax(above).exp()
    shared = (ours[:, :, None] == theirs[:, None, :]).any(-1).double().mean(-1)
    products = ((one * other).sum(-1, dtype=torch.float64) for one, other in ((p, q), (q, q), (p, p)))
    return [(ours[:, 0] == theirs[:, 0]).double(), shared, *products]


def unigram_loss(train: Tensor, windows: Tensor, vocab_size: int) -> float:
    """Cross-entropy in nats of the training text's token frequencies, one added to each, on `windows`."""
    counts = torch.bincount(train.flatten(), minlength=vocab_size).double() + 1
    return -(counts / counts.sum()).log()[windows[:, 1:]].mean().item()


def retention(student_loss: float, teacher_loss: float, baseline_loss: float) -> float | None:
    """How much of the teacher's gain over a baseline the student has, in percent; losses in nats.

    None where the teacher gains nothing.
    """
    if not teacher_loss < baseline_loss:
        return None
    return 100 * (baseline_loss - student_loss) / (baseline_loss - teacher_loss)


def flops(
    tokens: float, teacher_parameters: float, student_parameters: float, teacher_tokens: float | None = None
) -> float:
    """Of a distillation: 2·N of the teacher per token it reads, 6·N of the student per token it learns from.

    A cached teacher reads each token once (`teacher_tokens`), however often the student does.
    """
    read = tokens if teacher_tokens is None else teacher_tokens
    return 2 * teacher_parameters * read + 6 * student_parameters * tokens


#: Measure → (what is good, whether more is better, what to try where it is not).
_GOALS = {
    "probability_correlation": (
        0.8,
        True,
        "the probabilities go different ways: train longer, or with more soft_weight; if that does not help, the "
        "temperature is too high and the teacher's few likely tokens drown in the rest: lower it",
    ),
    "top1_agreement": (
        0.5,
        True,
        "the likeliest tokens differ: a gap in capacity (a larger student, or a teacher between the two) or too "
        "little training",
    ),
    "kl": (
        1.0,
        False,
        "the distributions are far apart: more soft_weight or more training; far from it although the training loss "
        "is low means too little text",
    ),
}


class Finding(str):
    """A line of the verdict: a text that knows whether it tells of a goal that is met."""

    met: bool

    def __new__(cls, text: str, met: bool) -> Finding:
        """`met` False: the goal is missed."""
        line = super().__new__(cls, text)
        line.met = met
        return line

    def __getnewargs__(self) -> tuple[str, bool]:  # type: ignore[override]
        """What a copy is made of."""
        return str(self), self.met


def diagnosis(measures: Measures, baseline: Measures | None = None) -> Sequence[Finding]:
    """A line per measure of agreement with the teacher: met or not, and what to try."""
    lines = []
    for name, (goal, more, advice) in _GOALS.items():
        value = getattr(measures, name)
        if value is None:
            continue
        met = value > goal if more else value < goal
        sign = ">" if more else "<"
        lines.append(Finding(f"{name} {value:.3f} ({sign} {goal}): {'good' if met else advice}", met))
    if baseline is not None and baseline.loss < measures.loss:
        text = (
            f"the student's loss {measures.loss:.3f} is above that of labels alone, {baseline.loss:.3f}: soft_weight "
            "and hard_weight are out of balance, or the teacher knows this text too little"
        )
        lines.append(Finding(text, met=False))
    return lines
