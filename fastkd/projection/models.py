"""The output projection of a Hugging Face causal language model, taken from its own forward.

The whole model runs, with a hook on its output head. The hook keeps the hidden states that the head gets, so they
include whatever the architecture does before its head. In place of `[tokens, vocab]` logits the hook returns probe
values for one position. What the model's forward makes of the probe shows what it does to logits: nothing, a factor, a
softcap, or something that a `Projection` cannot hold. Names in configs do not say it: Granite divides logits by
`config.logits_scaling`, HyperCLOVA X multiplies by it, MiniCPM3 divides hidden states by it, and MPT ignores its
`config.logit_scale`. Forward hooks of the head get the probe too, so that what they do is measured with the rest.

Models are duck-typed; transformers and peft are not imported.
"""

from __future__ import annotations

import functools
import inspect
import weakref
from collections.abc import Mapping
from typing import Any, Literal, overload

import torch
from torch import Tensor, nn

from fastkd import gathered
from fastkd.projection import sharded
from fastkd.sources import Projection

__all__ = ["project"]

_BY_HAND = "build fastkd.Projection(hidden, weight, bias, softcap, logit_scale) by hand"


@overload
def project(model: nn.Module, /, *, return_outputs: Literal[False] = False, **inputs: Any) -> Projection: ...
@overload
def project(model: nn.Module, /, *, return_outputs: Literal[True], **inputs: Any) -> tuple[Projection, Any]: ...
def project(model: nn.Module, /, *, return_outputs: bool = False, **inputs: Any) -> Projection | tuple[Projection, Any]:
    """Run a causal language model and return its logits `[batch, tokens, vocab]` as a Projection, without forming them.

    Costs one forward of the model without its output head, and 1 to 5 ms of CPU time, which grow with the vocabulary.
    Gradients flow to every parameter of the model, to a tied embedding from both of its uses; for a teacher, call
    under `torch.no_grad()`. `project(model, **inputs).logits()` equals `model(**inputs).logits` up to rounding:

        >>> loss_fn = fastkd.KDLoss(shift=True)
        >>> batch = {"input_ids": input_ids, "attention_mask": attention_mask}
        >>> with torch.no_grad():
        ...     teacher_logits = fastkd.project(teacher, **batch)
        >>> loss = loss_fn(fastkd.project(student, **batch), teacher_logits, labels)
        >>> loss.backward()

    Args:
        model: a transformers causal LM whose output head is an `nn.Linear` with a floating-point weight; alone or
            wrapped by PEFT (the adapters take part) or by DistributedDataParallel; sharded by FSDP2 or ZeRO-3.
        inputs: keyword arguments of `model`: `input_ids [batch, tokens]` or `inputs_embeds [batch, tokens, H]`,
            `attention_mask`, and so on. `use_cache` is False unless given. Not `labels`, which go to the loss.
        return_outputs: return what the model returns too.

    Returns:
        Projection with `hidden [batch, tokens, H]` as the head gets it, the head's own `weight [vocab, H]` and `bias`
        parameters, and the softcap and factor that the model's forward applies to logits. With `return_outputs` a pair:
        the Projection and the model's own outputs without their logits, such as `hidden_states` and `attentions` if
        `inputs` ask for them, `past_key_values`, or a mixture of experts' `aux_loss`. Gradients flow through these too.

    Raises:
        TypeError: `model` is not a causal LM, is an encoder-decoder, is compiled as a whole, is in a
            DistributedDataParallel with a static graph, or its output head is quantised, adapted (LoRA) or otherwise
            not a plain `nn.Linear`.
        ValueError: `labels` are given, `return_outputs` is asked of a model that returns a tuple, the head's weight is
            sharded by other means (tensor parallelism, FSDP1) or offloaded, or the model's forward, or a hook or a
            replaced forward of the head, does to logits what a Projection cannot hold.

    Under FSDP2 (`fully_shard`, whatever its units) the weight is the head's own, made whole, and its gradient is
    reduced by the head's unit with the unit's settings: by default to the mean over ranks. Where nothing requires a
    gradient the weight may be a DTensor, which a loss gathers and frees. Under ZeRO-3 weight and bias share the memory
    that the forward had, and DeepSpeed reduces their gradients. Every rank must call, as for the model's own forward.
    Compute the loss before the head's unit is sharded again: it raises ValueError where the memory is gone.
    """
    if inputs.get("labels") is not None:
        raise ValueError("labels go to the loss, not to project(): take them out of inputs, then loss(..., labels)")
    lm = _causal_lm(model)
    head = _output_head(lm)
    unit = sharded.unit_of(model, head)
    was_whole = not gathered.is_in_parts(head.weight)
    if "use_cache" not in inputs and _takes_use_cache(lm):
        inputs["use_cache"] = False

    seen: list[Tensor] = []
    tied: list[bool] = []  # filled when the backward of the hidden states passes through the logits
    parameters: list[tuple[Tensor, Tensor | None]] = []  # of the head, as the forward has them: whole
    probe = _probe(sharded.shape_of(head.weight)[0])

    def take_hidden(_module: nn.Module, args: tuple[Any, ...]) -> tuple[Tensor]:
        hidden: Tensor = args[0]
        seen.append(hidden)
        return (hidden[..., :0, :],)

    def answer_probe(_module: nn.Module, _args: tuple[Any, ...], output: Tensor) -> Tensor:
        if output.shape[-1] != probe.numel():  # tensor parallelism gathers outputs from parts of the weight
            raise ValueError(
                f"the output head of {_name(lm)} holds {probe.numel()} of its {output.shape[-1]} rows here"
            )
        parameters.append((sharded.held(head.weight), None if head.bias is None else sharded.held(head.bias)))
        return _Anchored.apply(probe.view(*(1,) * (output.dim() - 1), -1), output, tied)  # type: ignore[no-any-return,no-untyped-call]

    # First of the hooks on the output, last of those on the input: the others are then part of what is measured.
    handles = (head.register_forward_pre_hook(take_hidden), head.register_forward_hook(answer_probe, prepend=True))
    try:
        outputs = model(**inputs)
    finally:
        for handle in handles:
            handle.remove()
    if len(seen) != 1:
        raise ValueError(f"{_name(lm)} calls its output head {len(seen)} times in a forward, not once: {_BY_HAND}")
    logits = outputs["logits"] if isinstance(outputs, Mapping) else outputs[0]
    scale, softcap = _measure(lm, probe, seen[0].dim(), logits)
    hidden, (weight, bias) = seen[0], parameters[0]
    if unit is not None and gathered.is_in_parts(head.weight):  # sharded again after the forward
        offloaded = head.weight.device != weight.device
        if logits.requires_grad or was_whole or offloaded or "forward" in vars(head):
            unit.unshard()  # into the same memory
        else:  # a loss gathers it, and frees it
            dtype = weight.dtype
            weight, bias = head.weight.to(dtype), None if bias is None else head.bias.to(dtype)
    _check_forward(lm, head, hidden)
    if logits.requires_grad and (unit is not None or sharded.is_emptied(head.weight)):
        hidden, weight, bias = sharded.tied(logits, tied, hidden, weight, bias)
    found = Projection(hidden, weight, bias, softcap, scale)
    return (found, _without_logits(lm, outputs)) if return_outputs else found


def _without_logits(lm: Any, outputs: Any) -> Any:
    """The outputs, in their own class, without the probe that stands in the place of logits."""
    if not isinstance(outputs, Mapping):
        raise ValueError(f"{_name(lm)} returns a tuple, whose fields have no names: leave return_dict=False away")
    return type(outputs)(**{name: value for name, value in outputs.items() if name not in ("logits", "loss")})


class _Anchored(torch.autograd.Function):
    """Values that hang on the graph of another tensor.

    DistributedDataParallel(find_unused_parameters=True) looks for the parameters in use in the graph of the outputs.
    """

    @staticmethod
    def forward(ctx: Any, values: Tensor, anchor: Tensor, tied: list[bool]) -> Tensor:
        ctx.tied = tied
        return values.clone()  # some models write to their logits in place

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, None, None]:
        if not ctx.tied:
            raise RuntimeError("fastkd.project replaces the logits that the model returns; they have no gradient")
        return None, None, None


#: Heads whose own forward was replaced, as accelerate's dispatch does → the replacement that was found to be linear.
_linear: weakref.WeakKeyDictionary[nn.Linear, Any] = weakref.WeakKeyDictionary()


@torch.no_grad()
def _check_forward(lm: Any, head: nn.Linear, hidden: Tensor) -> None:
    """Raise ValueError where a forward put in the place of the head's own computes something else."""
    replaced = vars(head).get("forward")
    if replaced is None or _linear.get(head) is replaced:
        return
    row = torch.linspace(-1, 1, head.in_features, dtype=hidden.dtype, device=hidden.device)
    rows = torch.stack((row, 256 * row))  # the second, that a cap is seen
    expected = nn.functional.linear(rows, head.weight, head.bias)
    found = replaced(rows)
    tolerance = 8 * torch.finfo(expected.dtype).eps
    if found.shape != expected.shape or not all(
        torch.allclose(a.to(b), b, rtol=tolerance, atol=tolerance * float(b.abs().max()))
        for a, b in zip(found, expected, strict=True)
    ):
        raise ValueError(
            f"the output head of {_name(lm)} has a replaced forward that does more than its weight and bias say, "
            f"which is all that a Projection holds: {_BY_HAND}, or give the loss model(**inputs).logits"
        )
    _linear[head] = replaced


def _causal_lm(model: nn.Module) -> Any:
    """The transformers model within wrappers."""
    lm: Any = model
    while isinstance(lm, nn.Module):
        if hasattr(lm, "_orig_mod") or getattr(lm, "_compiled_call_impl", None) is not None:
            raise TypeError(
                "project() cannot look into a model that torch.compile took as a whole: "
                "compile its body instead, model.base_model.compile()"
            )
        if getattr(lm, "static_graph", False):
            # It starts its reduction from the gradient of the outputs, and a Projection is not one of them.
            raise TypeError("project() would leave gradients of DistributedDataParallel(static_graph=True) unreduced")
        unwrap: Any = getattr(lm, "get_base_model", None)
        if unwrap is not None:  # PEFT
            lm = unwrap()
        elif hasattr(lm, "get_output_embeddings"):
            break
        else:
            lm = getattr(lm, "module", None)  # DistributedDataParallel
    else:
        raise TypeError(f"project() needs a transformers causal LM, got {_name(model)}; for other models, {_BY_HAND}")
    if getattr(getattr(lm, "config", None), "is_encoder_decoder", False):
        raise TypeError(f"project() needs a causal LM, got the encoder-decoder {_name(lm)}: {_BY_HAND}")
    return lm


def _output_head(lm: Any) -> nn.Linear:
    head: nn.Linear | None = lm.get_output_embeddings()
    if head is None:
        raise TypeError(f"{_name(lm)} has no output head: load it with AutoModelForCausalLM, not AutoModel")
    # Exact types: quantised and adapted layers are subclasses of nn.Linear, and quantised weights of Parameter.
    in_parts = gathered.is_in_parts(head.weight) if sharded.is_linear(head) else False
    if not sharded.is_linear(head) or not (in_parts or type(head.weight) in (nn.Parameter, Tensor)):
        weight = type(getattr(head, "weight", None)).__name__
        raise TypeError(
            f"the output head of {_name(lm)} is a {type(head).__module__}.{type(head).__name__} with a weight of type "
            f"{weight}, not a plain nn.Linear: leave the head out of quantisation (llm_int8_skip_modules) "
            "and adapters (target_modules, modules_to_save), or merge the adapter (merge_and_unload)"
        )
    if head.weight.is_meta or len(shape := sharded.shape_of(head.weight)) != 2 or 0 in shape:
        raise ValueError(
            f"the output head of {_name(lm)} has a weight {tuple(head.weight.shape)} on {head.weight.device}: "
            "project() needs it whole, or sharded by fully_shard or ZeRO-3, neither flattened (FSDP1) nor offloaded"
        )
    return head


def _takes_use_cache(lm: Any) -> bool:
    # Of the classes: wrappers of an instance's forward, such as accelerate's, may hide the names.
    parameters = inspect.signature(type(lm).forward).parameters
    if "use_cache" in parameters:
        return True
    body = type(getattr(lm, "base_model", lm))
    passes_on = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    return passes_on and "use_cache" in inspect.signature(body.forward).parameters


@functools.lru_cache(maxsize=4)
@torch.inference_mode(False)  # a cached inference tensor would be of no use to a later call outside that mode
def _probe(vocab_size: int) -> Tensor:
    """Values `[V]` of both signs from 2⁻²⁰, where tanh is the identity, to 2⁶⁰, where it is 1.

    On the CPU whatever the model's device, so that reading the answer does not wait for the model; in float64, so
    that the scalars are exact to 12 digits.
    """
    probe = torch.logspace(-20, 60, vocab_size, base=2, dtype=torch.float64, device="cpu")
    probe[1::2].neg_()
    return probe


def _measure(lm: Any, probe: Tensor, dim: int, logits: Tensor) -> tuple[float, float | None]:
    """Factor and softcap that took the probe to the logits."""
    if logits.dim() != dim or logits.numel() != probe.numel():
        raise ValueError(
            f"{_name(lm)} makes logits {tuple(logits.shape)} of its head's {probe.numel()} outputs for one position: "
            f"{_BY_HAND}"
        )
    logits = logits.detach().flatten().to(probe)
    scale = float(f"{(logits[0] / probe[0]).item():.12g}")
    largest = abs(logits[-1].item())
    expected, softcap = scale * probe, None
    if largest < 0.5 * abs(expected[-1].item()):
        softcap = float(f"{largest:.12g}")
        expected = softcap * torch.tanh(expected / softcap) if softcap > 0 else torch.zeros_like(expected)
    # The tolerance is for models that apply a softcap in fp32.
    if not (scale > 0 and torch.allclose(logits, expected, rtol=1e-5, atol=0)):
        raise ValueError(
            f"{_name(lm)} does more to the logits of its output head than a factor and a softcap, "
            f"which is all that a Projection holds: {_BY_HAND}, or give the loss model(**inputs).logits"
        )
    return scale, softcap


def _name(value: object) -> str:
    return type(value).__name__
