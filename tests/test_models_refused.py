"""project() refuses models whose logits are not those of a plain output head, and measures what their forward does."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastkd.projection.models import project
from tests.causal_lms import B, H, T, V, batch, llama

transformers = pytest.importorskip("transformers")


@pytest.mark.parametrize(
    "compile_whole",
    [lambda model: torch.compile(model, backend="eager"), lambda model: model.compile(backend="eager") or model],
)
def test_refuses_a_model_compiled_as_a_whole(compile_whole: Callable[[Any], Any]) -> None:
    with pytest.raises(TypeError, match="compile its body"):
        project(compile_whole(llama()), **batch())


def test_refuses_labels() -> None:
    inputs = batch()
    with pytest.raises(ValueError, match="labels go to the loss"):
        project(llama(), **inputs, labels=inputs["input_ids"])


def test_refuses_what_is_not_a_causal_lm() -> None:
    with pytest.raises(TypeError, match="needs a transformers causal LM, got Linear"):
        project(nn.Linear(2, 3), **batch())
    with pytest.raises(TypeError, match="LlamaModel has no output head"):
        project(llama().base_model, **batch())
    config = transformers.T5Config(
        vocab_size=V, d_model=H, d_kv=8, d_ff=8, num_layers=1, num_heads=2, decoder_start_token_id=0
    )
    with pytest.raises(TypeError, match="encoder-decoder T5ForConditionalGeneration"):
        project(transformers.T5ForConditionalGeneration(config), **batch())


class QuantisedLinear(nn.Linear):
    pass


class QuantisedTensor(Tensor):
    pass


def quantised_layer(model: Any) -> None:
    model.lm_head = QuantisedLinear(H, V)


def quantised_weight(model: Any) -> None:
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().as_subclass(QuantisedTensor))


def sharded_weight(model: Any) -> None:
    model.lm_head.weight.data = torch.empty(0)


def offloaded_weight(model: Any) -> None:
    model.lm_head.to("meta")


@pytest.mark.parametrize(
    ("spoil", "error", "message"),
    [
        (quantised_layer, TypeError, "QuantisedLinear with a weight of type Parameter, not a plain nn.Linear"),
        (quantised_weight, TypeError, "weight of type QuantisedTensor, not a plain nn.Linear"),
        (sharded_weight, ValueError, r"weight \(0,\) on cpu: project\(\) needs it whole"),
        (offloaded_weight, ValueError, "on meta: project.. needs it whole"),
    ],
)
def test_refuses_a_head_that_is_not_a_plain_linear(
    spoil: Callable[[Any], None], error: type[Exception], message: str
) -> None:
    model = llama(tie_word_embeddings=False)
    spoil(model)
    with pytest.raises(error, match=message):
        project(model, **batch())


class Custom(nn.Module):
    """What a model of remote code might do after its body."""

    def __init__(self, tail: Callable[[nn.Linear, Tensor], Tensor]) -> None:
        super().__init__()
        self.head = nn.Linear(H, V)
        self.tail = tail

    def get_output_embeddings(self) -> nn.Linear:
        return self.head

    def forward(self, hidden: Tensor) -> dict[str, Tensor]:
        return {"logits": self.tail(self.head, hidden)}


def masked(head: nn.Linear, hidden: Tensor) -> Tensor:
    logits: Tensor = head(hidden)
    logits[..., 5] = torch.finfo(logits.dtype).min
    return logits


def gathered(head: nn.Linear, hidden: Tensor) -> Tensor:
    handle = head.register_forward_hook(lambda module, args, output: torch.cat((output, output), -1))
    # Before project's own hook, as tensor parallelism puts it there at load time.
    head._forward_hooks = OrderedDict(sorted(head._forward_hooks.items(), key=lambda item: item[0] != handle.id))
    logits: Tensor = head(hidden)
    return logits


@pytest.mark.parametrize("scale", [1.0, 0.0625, 1 / 7, 12.0])
@pytest.mark.parametrize("softcap", [None, 0.5, 30.0, 100.0])
def test_any_factor_and_softcap_are_measured(scale: float, softcap: float | None) -> None:
    def tail(head: nn.Linear, hidden: Tensor) -> Tensor:
        logits = scale * head(hidden).float()
        return logits if softcap is None else softcap * torch.tanh(logits / softcap)

    model, hidden = Custom(tail), torch.randn(B, T, H)
    projection = project(model, hidden=hidden)
    assert projection.logit_scale == pytest.approx(scale, rel=1e-6)
    assert projection.softcap == (None if softcap is None else pytest.approx(softcap, rel=1e-6))
    torch.testing.assert_close(projection.logits(), model(hidden)["logits"])


@pytest.mark.parametrize(
    ("tail", "message"),
    [
        (lambda head, hidden: head(hidden) + 0.1, "does more to the logits"),
        (lambda head, hidden: -head(hidden), "does more to the logits"),
        (lambda head, hidden: 0 * head(hidden), "does more to the logits"),
        (lambda head, hidden: torch.nan * head(hidden), "does more to the logits"),
        (lambda head, hidden: head(hidden).clamp(-30, 30), "does more to the logits"),
        (lambda head, hidden: head(hidden).log_softmax(-1), "does more to the logits"),
        (lambda head, hidden: head(hidden) * torch.linspace(1, 2, V), "does more to the logits"),
        (masked, "does more to the logits"),
        (lambda head, hidden: head(hidden)[..., : V - 2], r"makes logits \(1, 1, 59\) of its head's 61 outputs"),
        (lambda head, hidden: head(hidden)[0], r"makes logits \(1, 61\) of its head's 61 outputs"),
        (lambda head, hidden: head(hidden) + head(hidden), "calls its output head 2 times"),
        (lambda head, hidden: hidden @ head.weight.T, "calls its output head 0 times"),
        (gathered, "holds 61 of its 122 rows"),
    ],
)
def test_refuses_logits_that_a_projection_cannot_hold(
    tail: Callable[[nn.Linear, Tensor], Tensor], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        project(Custom(tail), hidden=torch.randn(B, T, H))


def hooked(change: Callable[[Tensor], Tensor]) -> Callable[[Any], None]:
    return lambda model: model.lm_head.register_forward_hook(lambda module, args, output: change(output))


def patched(change: Callable[[Tensor], Tensor]) -> Callable[[Any], None]:
    def spoil(model: Any) -> None:
        plain = model.lm_head.forward
        model.lm_head.forward = lambda hidden: change(plain(hidden))

    return spoil


def pre_hooked(model: Any) -> None:
    model.lm_head.register_forward_pre_hook(lambda module, args: (2 * args[0],))


def cap(logits: Tensor) -> Tensor:
    return 3 * torch.tanh(logits / 3)


@pytest.mark.parametrize("change", [hooked(lambda z: 0.5 * z), hooked(cap), pre_hooked, patched(lambda z: z)])
def test_what_hooks_of_the_head_do_is_in_the_projection(change: Callable[[Any], None]) -> None:
    model, inputs = llama(tie_word_embeddings=False), batch()
    change(model)
    torch.testing.assert_close(project(model, **inputs).logits(), model(**inputs).logits)


@pytest.mark.parametrize(
    "change",
    [
        hooked(lambda z: z.clamp(-1, 1)),
        hooked(lambda z: z.masked_fill(torch.arange(V) == 5, -torch.inf)),
        patched(lambda z: 0.5 * z),
        patched(cap),
        patched(lambda z: z.masked_fill(torch.arange(V) == 5, -torch.inf)),
    ],
)
def test_refuses_a_head_that_does_more_than_its_weight_says(change: Callable[[Any], None]) -> None:
    model = llama(tie_word_embeddings=False)
    project(model, **batch())
    change(model)
    with pytest.raises(ValueError, match="does more t"):
        project(model, **batch())
