"""project(): the hidden states, output head and logit transform of a transformers model are those its forward uses."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, nn

from fastkd.projection.models import project
from tests.causal_lms import DECODER, B, H, T, V, agrees, batch, build, gradients, llama, same_gradients

transformers = pytest.importorskip("transformers")

# (model_type, config, expected factor, expected softcap)
ARCHITECTURES: dict[str, tuple[str, dict[str, Any], float, float | None]] = {
    "gpt2": ("gpt2", {"vocab_size": V, "n_embd": H, "n_layer": 2, "n_head": 2, "n_positions": 32}, 1.0, None),
    "gpt_neox": ("gpt_neox", DECODER, 1.0, None),
    "llama": ("llama", {**DECODER, "tie_word_embeddings": False}, 1.0, None),
    "llama_tied": ("llama", {**DECODER, "tie_word_embeddings": True}, 1.0, None),
    "phi_biased_head": ("phi", DECODER, 1.0, None),
    "gemma2": ("gemma2", {**DECODER, "final_logit_softcapping": 2.0}, 1.0, 2.0),
    "gemma2_uncapped": ("gemma2", {**DECODER, "final_logit_softcapping": None}, 1.0, None),
    "gemma3": ("gemma3_text", {**DECODER, "final_logit_softcapping": 2.0}, 1.0, 2.0),
    "cohere": ("cohere", {**DECODER, "logit_scale": 0.25, "tie_word_embeddings": False}, 0.25, None),
    "cohere_tied": ("cohere", {**DECODER, "logit_scale": 0.25, "tie_word_embeddings": True}, 0.25, None),
    "granite": ("granite", {**DECODER, "logits_scaling": 3.0}, 1 / 3, None),
    "hyperclovax": ("hyperclovax", {**DECODER, "logits_scaling": 3.0}, 3.0, None),
    "mamba": ("mamba", {"vocab_size": V, "hidden_size": H, "state_size": 4, "num_hidden_layers": 2}, 1.0, None),
    "mpt": ("mpt", {"vocab_size": V, "d_model": H, "n_layers": 2, "n_heads": 2, "logit_scale": 0.5}, 1.0, None),
    "recurrent_gemma": (
        "recurrent_gemma",
        {**DECODER, "logits_soft_cap": 2.0, "lru_width": H, "attention_window_size": 16, "num_hidden_layers": 3},
        1.0,
        2.0,
    ),
}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_logits_and_gradients_are_those_of_the_forward(architecture: str) -> None:
    model_type, config, scale, softcap = ARCHITECTURES[architecture]
    model = build(model_type, **config)
    if model_type in ("mamba", "mpt"):  # whose forwards do not keep to float64
        model = model.float()
    projection = agrees(model, **batch())
    head = model.get_output_embeddings()
    assert projection.weight is head.weight
    assert projection.bias is head.bias
    assert projection.softcap == softcap
    assert projection.logit_scale == pytest.approx(scale, rel=1e-6)
    if softcap is not None:
        assert projection.logits().abs().max() > 0.9 * softcap


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("model_type", ["llama", "gemma2"])
def test_padding(model_type: str, padding: str) -> None:
    # In float64, Gemma's attention to nothing but padding is NaN.
    agrees(build(model_type, **DECODER).float(), **batch(padding))


def test_nested_text_config() -> None:
    vision = {
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "image_size": 8,
        "patch_size": 4,
    }
    text = {**DECODER, "final_logit_softcapping": None}
    config = transformers.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    model = transformers.Gemma3ForConditionalGeneration(config).double().eval()
    input_ids = torch.randint(3, V, (B, T))
    projection = project(model, input_ids=input_ids)
    torch.testing.assert_close(projection.logits(), model(input_ids=input_ids).logits, rtol=1e-9, atol=1e-9)


def test_tied_weight_is_the_embedding() -> None:
    model = llama(tie_word_embeddings=True)
    projection = project(model, **batch())
    assert projection.weight is model.get_input_embeddings().weight
    (through_head,) = torch.autograd.grad(projection.hidden.detach().sum() * projection.weight.sum(), projection.weight)
    (both,) = torch.autograd.grad(projection.hidden.sum() * projection.weight.sum(), projection.weight)
    assert not torch.allclose(through_head, both)


@pytest.mark.parametrize("architecture", ["gpt2", "llama", "gemma2"])
def test_what_else_a_forward_returns(architecture: str) -> None:
    """Hidden states and attentions are those of a plain forward, and gradients flow through them."""
    model_type, config, _, _ = ARCHITECTURES[architecture]
    model = build(model_type, **config, attn_implementation="eager")
    inputs = {**batch(), "output_hidden_states": True, "output_attentions": True}
    plain = model(**inputs)
    projection, outputs = project(model, return_outputs=True, **inputs)
    assert type(outputs) is type(plain)
    assert outputs.logits is None
    for name in ("hidden_states", "attentions"):
        for ours, theirs in zip(getattr(outputs, name), getattr(plain, name), strict=True):
            torch.testing.assert_close(ours, theirs)
    one = torch.ones((), dtype=torch.float64)
    truth = gradients(model, plain.hidden_states[1].square().sum() + plain.logits.square().sum(), one)
    found = gradients(model, outputs.hidden_states[1].square().sum() + projection.logits().square().sum(), one)
    same_gradients(found, truth)


def test_a_routers_loss_is_among_the_outputs() -> None:
    sizes = {"num_local_experts": 4, "output_router_logits": True}
    model = build("mixtral", **DECODER, **sizes).float()
    inputs = batch()
    _, outputs = project(model, return_outputs=True, **inputs)
    torch.testing.assert_close(outputs.aux_loss, model(**inputs).aux_loss)
    assert outputs.aux_loss.requires_grad


def test_a_tuple_has_no_names() -> None:
    with pytest.raises(ValueError, match="returns a tuple"):
        project(llama(), return_outputs=True, return_dict=False, **batch())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_lower_precision(dtype: torch.dtype) -> None:
    model = build("granite", **DECODER, logits_scaling=3.0).to(dtype)
    inputs = batch()
    projection = project(model, **inputs)
    assert projection.hidden.dtype == projection.weight.dtype == dtype
    assert projection.logit_scale == pytest.approx(1 / 3, rel=1e-11)
    resolution = torch.finfo(dtype).eps
    expected = model(**inputs).logits.detach()
    torch.testing.assert_close(
        projection.logits().detach(), expected, rtol=4 * resolution, atol=resolution * float(expected.abs().max())
    )


def test_small_logits_do_not_hide_a_softcap() -> None:
    model = build("gemma2", **DECODER, final_logit_softcapping=30.0)
    nn.init.zeros_(model.get_output_embeddings().weight)
    assert project(model, **batch()).softcap == 30.0


def test_config_changed_between_calls() -> None:
    model = build("gemma2", **DECODER, final_logit_softcapping=30.0)
    assert project(model, **batch()).softcap == 30.0
    model.config.final_logit_softcapping = 2.0
    assert project(model, **batch()).softcap == 2.0
    model.config.final_logit_softcapping = None
    assert project(model, **batch()).softcap is None


def test_teacher() -> None:
    model, inputs = llama(), batch()
    with torch.inference_mode():
        project(model, **inputs)
    with torch.no_grad():
        assert not project(model, **inputs).hidden.requires_grad
    assert project(model, **inputs).hidden.requires_grad
    assert not project(model.requires_grad_(False), **inputs).hidden.requires_grad


def test_gradient_checkpointing() -> None:
    model, inputs = llama().train(), batch()
    upstream = torch.randn(B, T, V, dtype=torch.float64)
    expected = gradients(model, model(**inputs).logits, upstream)
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    enable()
    ours = gradients(model, project(model, **inputs).logits(), upstream)
    same_gradients(ours, expected)


def test_inputs_are_the_models_own() -> None:
    model, inputs = llama(), batch()
    embeddings = model.get_input_embeddings()(inputs["input_ids"]).detach()
    agrees(model, inputs_embeds=embeddings, attention_mask=inputs["attention_mask"])
    assert project(model, **inputs, labels=None).shape == (B, T, V)
    assert project(model, **inputs, logits_to_keep=2).shape == (B, 2, V)
    assert project(model, **inputs, return_dict=False).shape == (B, T, V)


@pytest.mark.parametrize("model_type", ["llama", "granitemoe"])  # the latter's forward takes it among **kwargs
def test_no_cache_unless_asked(model_type: str) -> None:
    model, inputs = build(model_type, **DECODER).float(), batch()
    asked = []
    model.base_model.register_forward_pre_hook(
        lambda module, args, kwargs: asked.append(kwargs.get("use_cache")), with_kwargs=True
    )
    project(model, **inputs)
    project(model, **inputs, use_cache=True)
    assert asked == [False, True]


def test_head_sees_no_tokens_and_keeps_no_hooks() -> None:
    model, inputs = llama(), batch()
    head, shapes = model.get_output_embeddings(), []
    handle = head.register_forward_hook(lambda module, args, output: shapes.append(tuple(output.shape)))
    project(model, **inputs)
    handle.remove()
    assert shapes == [(1, 1, V)]  # the probe
    with pytest.raises((TypeError, ValueError)):
        project(model)
    assert not head._forward_hooks
    assert not head._forward_pre_hooks


def test_resized_vocabulary() -> None:
    for tied in (False, True):
        model = llama(tie_word_embeddings=tied)
        model.resize_token_embeddings(V + 3)
        assert agrees(model, **batch()).shape == (B, T, V + 3)


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    if not distributed.is_available() or not distributed.is_gloo_available():
        pytest.skip("torch is built without gloo")
    distributed.init_process_group("gloo", init_method=(tmp_path / "store").as_uri(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.mark.parametrize("find_unused_parameters", [False, True])
@pytest.mark.usefixtures("process_group")
def test_distributed_data_parallel(find_unused_parameters: bool) -> None:
    model, inputs = llama().train(), batch()
    upstream = torch.randn(B, T, V, dtype=torch.float64)
    expected = gradients(model, model(**inputs).logits, upstream)
    replica = nn.parallel.DistributedDataParallel(model, find_unused_parameters=find_unused_parameters)
    synchronised: list[int] = []
    replica.register_comm_hook(None, lambda state, bucket: record(synchronised, bucket))
    for _ in range(2):  # a reducer out of step fails at the next forward
        ours = gradients(model, project(replica, **inputs).logits(), upstream)
    assert synchronised
    same_gradients(ours, expected)


@pytest.mark.usefixtures("process_group")
def test_refuses_a_static_graph() -> None:
    replica = nn.parallel.DistributedDataParallel(llama(), static_graph=True)
    with pytest.raises(TypeError, match="static_graph"):
        project(replica, **batch())


def record(synchronised: list[int], bucket: Any) -> torch.futures.Future[Tensor]:
    synchronised.append(bucket.index())
    future: torch.futures.Future[Tensor] = torch.futures.Future()
    future.set_result(bucket.buffer())
    return future


def test_compiled_body() -> None:
    model = llama()
    model.base_model.compile(backend="eager")
    agrees(model, **batch())


def test_peft_adapters() -> None:
    peft = pytest.importorskip("peft")

    def adapted(**options: Any) -> Any:
        config = peft.LoraConfig(task_type="CAUSAL_LM", r=2, init_lora_weights=False, **options)
        return peft.get_peft_model(llama(tie_word_embeddings=False), config).double().eval()

    body = adapted(target_modules=["q_proj", "down_proj"])
    projection = agrees(body, **batch())
    assert projection.hidden.requires_grad
    assert not projection.weight.requires_grad
    head = adapted(target_modules=["q_proj", "lm_head"])
    with pytest.raises(TypeError, match=r"peft.*not a plain nn.Linear.*merge_and_unload"):
        project(head, **batch())
    agrees(head.merge_and_unload().requires_grad_(True), **batch())
    with pytest.raises(TypeError, match="ModulesToSaveWrapper"):
        project(adapted(target_modules=["q_proj"], modules_to_save=["lm_head"]), **batch())
