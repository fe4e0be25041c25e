"""What a call must give, in float64 and straight from the definitions, with nothing taken from the library.

Values are sums over the vocabulary as the papers write them, gradients are autograd's, masked tokens are left out by
indexing. Beside each number stands its *size*: the sum of the absolute values of what it is computed from, in units of
which rounding errors are counted (see `compare.assert_elements`). A gradient element of 1e-6 that is the difference of
two probabilities of 0.3 has a size near 0.6.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from tests.fuzz_calls import LossCall, Operands, Sparse

Terms = tuple[Tensor, Tensor, Tensor]  # per category: terms, their sizes, and the sizes of ∂term/∂log q


class Expected(NamedTuple):
    """Values of `KDParts`, each with its size; gradients of the leaves that want one, each with its sizes."""

    loss: tuple[Tensor, Tensor]
    soft: tuple[Tensor, Tensor]
    hard: tuple[Tensor, Tensor]
    gradients: list[tuple[Tensor, Tensor]]
    largest: float  # what any row's gradient is multiplied by


# --- divergences ------------------------------------------------------------------------------------------------


def _times(probability: Tensor, factor: Tensor) -> Tensor:
    """Their product; 0 where the probability is 0, whatever the factor."""
    return probability * torch.where(probability == 0, 0.0, factor)


def _log(x: Tensor) -> Tensor:
    return torch.where(x > 0, torch.where(x > 0, x, 1.0).log(), -math.inf)


def _finite(log: Tensor) -> Tensor:
    """|log|, and 0 where it is infinite."""
    return torch.where(log == -math.inf, 0.0, log.detach().abs())


def _reach(log_p: Tensor, log_q: Tensor) -> Tensor:
    return 1 + _finite(log_p) + _finite(log_q)


def forward_kl(log_p: Tensor, log_q: Tensor, parameters: Sequence[float], unit: Tensor) -> Terms:
    p = log_p.exp()
    return _times(p, log_p - log_q), _times(p, _reach(log_p, log_q)), p


def reverse_kl(log_p: Tensor, log_q: Tensor, parameters: Sequence[float], unit: Tensor) -> Terms:
    q = log_q.exp()
    size = _times(q, _reach(log_p, log_q))
    return _times(q, log_q - log_p), size, size


def symmetric_kl(log_p: Tensor, log_q: Tensor, parameters: Sequence[float], unit: Tensor) -> Terms:
    w = parameters[0]
    if w in (0, 1):
        return (reverse_kl, forward_kl)[int(w)](log_p, log_q, (), unit)
    pairs = zip(forward_kl(log_p, log_q, (), unit), reverse_kl(log_p, log_q, (), unit), strict=True)
    return tuple(w * forward + (1 - w) * reverse for forward, reverse in pairs)  # type: ignore[return-value]


def jsd(log_p: Tensor, log_q: Tensor, parameters: Sequence[float], unit: Tensor) -> Terms:
    beta = parameters[0]
    if beta in (0, 1):
        return (forward_kl, reverse_kl)[int(beta)](log_p, log_q, (), unit)
    p, q = log_p.exp(), log_q.exp()
    log_m = _log(beta * p + (1 - beta) * q)
    size = _times(q, _reach(log_p, log_q))
    terms = beta * _times(p, log_p - log_m) + (1 - beta) * _times(q, log_q - log_m)
    return terms, size + _times(p, _reach(log_p, log_q)), size


def skew_kl(log_p: Tensor, log_q: Tensor, parameters: Sequence[float], unit: Tensor) -> Terms:
    lam = parameters[0]
    if lam == 0:
        return forward_kl(log_p, log_q, (), unit)
    p, q = log_p.exp(), log_q.exp()
    size = _times(p, _reach(log_p, log_q))
    return _times(p, log_p - _log(lam * p + (1 - lam) * q)), size, p + q


def skew_reverse_kl(log_p: Tensor, log_q: Tensor, parameters: Sequence[float], unit: Tensor) -> Terms:
    lam = parameters[0]
    if lam == 0:
        return reverse_kl(log_p, log_q, (), unit)
    p, q = log_p.exp(), log_q.exp()
    size = _times(q, _reach(log_p, log_q))
    return _times(q, log_q - _log((1 - lam) * p + lam * q)), size, size


def tvd(log_p: Tensor, log_q: Tensor, parameters: Sequence[float], unit: Tensor) -> Terms:
    p, q = log_p.exp(), log_q.exp()
    undecided = (log_p - log_q).detach().abs() <= 1e-6 * unit  # the sign of q − p, by rounding alone
    return (p - q).abs() / 2, p + q, torch.where(undecided, q * 5e6 / unit, q)


def squared_hellinger(log_p: Tensor, log_q: Tensor, parameters: Sequence[float], unit: Tensor) -> Terms:
    p, q, root = log_p.exp(), log_q.exp(), ((log_p + log_q) / 2).exp()
    return (p + q) / 2 - root, p + q, q + root


def alpha_beta(log_p: Tensor, log_q: Tensor, parameters: Sequence[float], unit: Tensor) -> Terms:
    alpha, beta = parameters
    total = alpha + beta

    def power(a: float, b: float) -> Tensor:
        exponents = [x * log for x, log in ((a, log_p), (b, log_q)) if x]  # 0 · −inf is 0 here
        return sum(exponents, torch.zeros_like(log_q)).exp()

    ratio = log_q - log_p
    largest = torch.stack((power(total, 0), power(0, total), power(alpha, beta))).amax(0)
    size = largest * _reach(log_p, log_q)
    slopes = size if abs(alpha) < 0.1 else largest / abs(alpha)
    if alpha == beta == 0:
        return ratio**2 / 2, _reach(log_p, log_q) ** 2, slopes
    if alpha == 0:
        terms = (power(0, beta) * beta * ratio - power(0, beta) + power(beta, 0)) / beta**2
        return terms, size / beta**2, slopes
    if beta == 0:
        terms = (-power(alpha, 0) * alpha * ratio - power(alpha, 0) + power(0, alpha)) / alpha**2
        return terms, size / alpha**2, slopes
    if total == 0:
        return (alpha * ratio + torch.expm1(-alpha * ratio)) / alpha**2, size / alpha**2, slopes
    terms = power(alpha, beta) - alpha / total * power(total, 0) - beta / total * power(0, total)
    share = 1 + abs(alpha / total) + abs(beta / total)
    return -terms / (alpha * beta), share * largest / abs(alpha * beta), slopes


DIVERGENCES: dict[str, Callable[[Tensor, Tensor, Sequence[float], Tensor], Terms]] = {
    row.__name__: row
    for row in (forward_kl, reverse_kl, symmetric_kl, jsd, skew_kl, skew_reverse_kl, tvd, squared_hellinger, alpha_beta)
}


def divergence(call: LossCall, log_p: Tensor, log_q: Tensor, unit: Tensor) -> Terms:
    """Of the call. A category that neither side has does not exist."""
    name, parameters = call.divergence
    neither = (log_p == -math.inf) & (log_q == -math.inf)
    log_p, log_q = (torch.where(neither, 0.0, log) for log in (log_p, log_q))
    terms = DIVERGENCES[name](log_p, log_q, parameters, unit)
    return tuple(torch.where(neither, 0.0, x) for x in terms)  # type: ignore[return-value]


# --- rows -------------------------------------------------------------------------------------------------------


class Row(NamedTuple):
    """Per row a value and its size; per column the size of the gradient w.r.t. the student's logits."""

    value: Tensor
    size: Tensor
    gradient_size: Tensor


class Logits(NamedTuple):
    """`[rows, V]` logits and the `[rows, V]` size of each: what it was summed from, where it is a product."""

    z: Tensor
    size: Tensor

    def at(self, rows: Tensor) -> Logits:
        return Logits(self.z[rows], self.size[rows])


def log_softmax(z: Tensor) -> Tensor:
    shifted = z - z.detach().amax(-1, keepdim=True)
    return shifted - shifted.exp().sum(-1, keepdim=True).log()


def _unit(logits: Logits, log_probability: Tensor, temperature: float) -> Tensor:
    """The size of each column's log-probability: of its exponent, its logit, and of the row's normaliser."""
    own = logits.size / temperature + _finite(log_probability)
    return 4 + own + _times(log_probability.exp(), own).sum(-1, keepdim=True)


def _closed(value: Terms, unit: Tensor, log_q: Tensor, temperature: float) -> Row:
    """From terms per category: the chain rule through softmax, (g − q·Σg) / T, in sizes."""
    terms, sizes, slopes = value
    slopes = _times(slopes, unit)
    gradient_size = (slopes + log_q.exp() * slopes.sum(-1, keepdim=True)) / temperature
    return Row(terms.sum(-1), _times(sizes, unit).sum(-1).detach(), gradient_size.detach())


def soft_rows(call: LossCall, student: Logits, teacher: Logits) -> Row:
    name, parameters = call.divergence
    if name == "mse":
        gap = student.z - teacher.z
        size, columns = student.size + teacher.size, gap.shape[-1]
        reach = (gap.abs() + size).detach()
        return Row((gap**2).mean(-1), (gap.detach().abs() * reach).mean(-1), 2 / columns * reach)
    log_q = log_softmax(student.z / call.student_temperature)
    log_p = log_softmax(teacher.z / call.teacher_temperature)
    unit = _unit(student, log_q, call.student_temperature) + _unit(teacher, log_p, call.teacher_temperature)
    unit = unit * max((1.0, *map(abs, parameters)))
    return _closed(divergence(call, log_p, log_q, unit), unit, log_q, call.student_temperature)


def sparse_rows(call: LossCall, student: Logits, targets: Sparse, rows: Tensor) -> Row:
    """K tokens and one more category, "the rest": the mass of all other columns, on both sides."""
    temperature = call.student_temperature
    ids, logprobs = (x.reshape(-1, x.shape[-1])[rows] for x in (targets.ids.long(), targets.logprobs.double()))
    present = logprobs > -math.inf
    log_z = log_softmax(student.z / temperature)
    kept = torch.zeros_like(log_z, dtype=torch.bool)
    for entry in range(ids.shape[1]):  # one by one: an absent entry may have any id
        live = present[:, entry]
        kept[live.nonzero()[:, 0], ids[live, entry]] = True
    picked = torch.where(present, log_z.gather(-1, torch.where(present, ids, 0)), -math.inf)
    others = torch.where(kept, -math.inf, student.z / temperature)
    empty = (others == -math.inf).all(-1, keepdim=True)
    top = torch.where(empty, 0.0, others.detach().amax(-1, keepdim=True))
    shares = (others - top).exp()
    mass = shares.sum(-1, keepdim=True)
    shares = shares.detach() / torch.where(empty, 1.0, mass.detach())  # of each column in the rest
    whole = (student.z.detach() / temperature).amax(-1, keepdim=True)
    normaliser = (student.z / temperature - whole).exp().sum(-1, keepdim=True).log() + whole
    rest = torch.where(empty, -math.inf, torch.where(empty, 1.0, mass).log() + top - normaliser)
    log_q = torch.cat((picked, rest), -1)

    p = logprobs.exp()
    if targets.kind == "ghost":
        left = 1 - p.sum(-1) if targets.rest is None else targets.rest.double().reshape(-1)[rows].exp()
        left = torch.where(left > 1e-6, left, 0.0) if targets.rest is None else left
        p = torch.cat((p, left[:, None]), -1)
        p = p if targets.rest is None else p / p.sum(-1, keepdim=True)
    else:
        p = p / p.sum(-1, keepdim=True) if targets.kind == "renormalize" else p
        p = torch.cat((p, torch.zeros_like(p[:, :1])), -1)

    unit = _unit(student, log_z, temperature)
    of_rest = 4 + _finite(rest) + _times(shares, unit).sum(-1, keepdim=True)
    units = torch.cat((torch.where(present, unit.gather(-1, torch.where(present, ids, 0)), 0.0), of_rest), -1)
    units = (units + _finite(_log(p))) * max((1.0, *map(abs, call.divergence[1])))
    row = _closed(divergence(call, _log(p), log_q, units), units, log_q, temperature)
    terms = row.value
    if targets.kind == "sampled":  # −Σ w log q, less the teacher's entropy where it is known
        terms = -_times(p, log_q).sum(-1)
        if targets.entropy is not None:
            terms = terms - targets.entropy.double().reshape(-1)[rows]
    sizes = shares * (row.gradient_size[:, -1:] + unit * row.gradient_size[:, -1:] / of_rest)
    for entry in range(ids.shape[1]):
        live = present[:, entry]
        sizes[live.nonzero()[:, 0], ids[live, entry]] += row.gradient_size[live, entry]
    return Row(terms, row.size + terms.detach().abs(), sizes.detach())


def hard_rows(student: Logits, labels: Tensor) -> Row:
    log_q = log_softmax(student.z)
    unit = _unit(student, log_q, 1.0)
    one_hot = torch.nn.functional.one_hot(labels, student.z.shape[-1]).double()
    picked = log_q.gather(-1, labels[:, None])[:, 0]
    size = (one_hot * unit).sum(-1) + picked.abs() + _times(log_q.exp(), unit).sum(-1)
    return Row(-picked, size.detach(), (unit * (log_q.exp() + one_hot)).detach())


# --- tokens -----------------------------------------------------------------------------------------------------


def token_scales(call: LossCall) -> tuple[Tensor, Tensor]:
    """What the soft and the hard value of each token are multiplied by: mask × weights ÷ divisor.

    Of the tokens that are scored: all, or under `shift` all but each sequence's last.
    """
    leading = call.scored(torch.zeros(call.student.shape[:-1])).shape
    weights = torch.ones(leading, dtype=torch.float64)
    if call.weights is not None:
        weights = call.predicted(call.weights).double()
    counted = torch.ones(leading, dtype=torch.bool)
    if call.labels is not None:
        counted = call.predicted(call.labels).long() != call.setting("ignore_index")
    hard = torch.where(counted, weights, 0.0)
    soft = hard if call.setting("mask_soft") else weights
    return _divided(call, soft), _divided(call, hard)


def _divided(call: LossCall, scale: Tensor) -> Tensor:
    reduction = call.setting("reduction")
    divisor = 1.0
    if reduction == "mean":
        divisor = float(scale.sum()) if call.num_items is None else float(call.num_items)
    if reduction == "batchmean":
        divisor = float(call.student.shape[0])
    return scale / divisor if divisor else torch.zeros_like(scale)


def logits_of(side: Operands, leaves: Sequence[Tensor], rows: Tensor, columns: int, eager: bool = False) -> Logits:
    """The first `columns` logits of these rows of a side whose tensors are `leaves`, in float64.

    The eager reference divides by the temperature before it subtracts the maximum: each logit is rounded as it stands.
    """
    if not side.is_projection:
        z = leaves[0].reshape(-1, leaves[0].shape[-1])[rows][:, :columns]
        return Logits(z, _finite(z) if eager else torch.zeros_like(z))
    hidden, weight = leaves[0].reshape(-1, leaves[0].shape[-1])[rows], leaves[1][:columns]
    bias = leaves[2][:columns] if len(leaves) > 2 else torch.zeros_like(weight[:, 0])
    scale, cap = side.head.get("logit_scale", 1.0), side.head.get("softcap")
    z = scale * (hidden @ weight.t() + bias)
    size = scale * (hidden.detach().abs() @ weight.detach().abs().t() + bias.detach().abs())
    if cap is None:
        return Logits(z, size)
    capped = cap * torch.tanh(z / cap)
    return Logits(capped, (size * (1 - (capped / cap) ** 2) + capped.abs()).detach())


def _leaf_sizes(side: Operands, leaves: Sequence[Tensor], rows: Tensor, unit: Tensor) -> list[Tensor]:
    """From the size of the gradient of each logit to that of each element of the tensors they come from."""
    sizes = [torch.zeros_like(leaf) for leaf in leaves]
    flat = sizes[0].view(-1, sizes[0].shape[-1])
    columns = unit.shape[-1]
    if not side.is_projection:
        flat[rows.nonzero()[:, 0], :columns] = unit
        return sizes
    hidden, weight = leaves[0].detach().reshape(-1, leaves[0].shape[-1])[rows].abs(), leaves[1].detach()[:columns].abs()
    unit = unit * side.head.get("logit_scale", 1.0)
    flat[rows] = unit @ weight
    sizes[1][:columns] = unit.t() @ hidden
    if len(sizes) > 2:
        sizes[2][:columns] = unit.sum(0)
    return sizes


def expected(call: LossCall) -> Expected:
    """Values and gradients of a valid call."""
    soft_scale, hard_scale = (x.reshape(-1) for x in token_scales(call))
    upstream = call.upstream.double().reshape(-1) if call.setting("reduction") == "none" else None
    columns = call.columns
    leaves = [x.detach().double().contiguous().requires_grad_() for x in call.student.tensors]
    every = call.scored_rows()  # index of each scored token among all
    live_tokens = (soft_scale != 0) | (hard_scale != 0)
    live = torch.zeros(call.student.shape[:-1].numel(), dtype=torch.bool)
    live[every[live_tokens]] = True
    student = logits_of(call.student, leaves, live, columns, call.eager)
    if student.z.requires_grad:
        student.z.retain_grad()
    soft_live, hard_live = soft_scale[live_tokens], hard_scale[live_tokens]
    t2 = call.student_temperature**2 if call.setting("scale_t2") and call.divergence[0] != "mse" else 1.0
    slope = torch.ones_like(soft_live) if upstream is None else upstream[live_tokens]
    if upstream is None:
        slope = slope * call.upstream.double()

    unit = torch.zeros_like(student.z)
    values, sizes = [], []
    total = torch.zeros(len(soft_live), dtype=torch.float64)
    total_size = torch.zeros_like(total)
    soft_weight, hard_weight = call.term_weights
    largest = 0.0
    for term, given, weight, scale in (
        (_soft_term, call.teacher is not None, soft_weight, t2 * soft_live),
        (_hard_term, call.labels is not None, hard_weight, hard_live),
    ):
        on = (scale != 0) & given
        value, size = torch.zeros_like(scale), torch.zeros_like(scale)
        if on.any():
            row = term(call, student.at(on), live_tokens.nonzero()[:, 0][on])
            value, size = value.masked_scatter(on, row.value), size.masked_scatter(on, row.size)
            if weight:
                largest = max(largest, weight * float((scale * slope).abs().max()))
                unit[on] += weight * (scale * slope).abs()[on][:, None] * row.gradient_size
        values.append(scale * value)
        sizes.append((scale * size).abs())
        if weight:
            total, total_size = total + weight * values[-1], total_size + weight * sizes[-1]

    (total * slope).sum().backward() if total.requires_grad else None
    gradients = _gradients(call, leaves, live, student, unit)
    reduced = []
    for rows, size in ((total, total_size), (values[0], sizes[0]), (values[1], sizes[1])):
        rows, size = rows.detach(), size + rows.detach().abs()
        if upstream is None:
            reduced.append((rows.sum(), size.sum()))
        else:
            tokens = (torch.zeros_like(soft_scale).masked_scatter(live_tokens, x) for x in (rows, size))
            reduced.append(tuple(x.view(call.upstream.shape) for x in tokens))
    return Expected(*reduced, gradients, largest)  # type: ignore[arg-type]


def _soft_term(call: LossCall, student: Logits, tokens: Tensor) -> Row:
    teacher, rows = call.teacher, call.scored_rows()[tokens]
    if not isinstance(teacher, Operands):
        assert teacher is not None
        return sparse_rows(call, student, teacher, rows)
    leaves = [x.detach().double() for x in teacher.tensors]
    return soft_rows(call, student, logits_of(teacher, leaves, rows, call.columns, call.eager))


def _hard_term(call: LossCall, student: Logits, tokens: Tensor) -> Row:
    assert call.labels is not None
    return hard_rows(student, call.predicted(call.labels).reshape(-1)[tokens].long())


def _gradients(
    call: LossCall, leaves: list[Tensor], live: Tensor, student: Logits, unit: Tensor
) -> list[tuple[Tensor, Tensor]]:
    slopes = student.z.grad if student.z.grad is not None else torch.zeros_like(student.z)
    cap = call.student.head.get("softcap")
    if cap is not None:  # back through the cap: its slope 1 − tanh² is a difference too
        bend = 1 - (student.z.detach() / cap) ** 2
        unit, slopes = unit * bend + 2 * slopes.abs(), slopes * bend
    unit = unit + 4 * slopes.abs()
    sizes = _leaf_sizes(call.student, leaves, live, unit)
    return [
        (torch.zeros_like(leaf) if leaf.grad is None else leaf.grad, size)
        for leaf, size, wanted in zip(leaves, sizes, call.student.wants, strict=True)
        if wanted
    ]
