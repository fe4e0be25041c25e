"""`KDTrainer` computes the loss it promises: over accumulated batches, from caches, in bf16, on two processes."""

from __future__ import annotations

import copy
import itertools
import math
import time

import pytest
import torch
import transformers

import fastkd
import fastkd.cache
from fastkd.training.data import Windows, collate
from fastkd.training.trainer import Course, KDTrainer

LENGTH, VOCAB = 12, 60


def model(seed: int, wide: int = 16) -> transformers.PreTrainedModel:
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=wide,
        intermediate_size=2 * wide,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=LENGTH,
        initializer_range=0.3,
    )
    return transformers.LlamaForCausalLM(config)


def teacher() -> transformers.PreTrainedModel:
    return model(1, 24).eval().requires_grad_(False)


def windows(count: int = 32) -> torch.Tensor:
    return torch.randint(VOCAB, (count, LENGTH), generator=torch.Generator().manual_seed(2))


class Ragged(Windows):
    """Rows of different numbers of labels: what a mean of batch means gets wrong."""

    def __getitem__(self, index):
        example = super().__getitem__(index)
        example["labels"][: 1 + index % (LENGTH - 2)] = -100
        return example


def trainer(path, student, *, kd=None, data=None, kind=KDTrainer, **settings):
    wanted = {"per_device_train_batch_size": 4, "max_steps": 3, "learning_rate": 1e-2, "max_grad_norm": 0.0}
    known = set(transformers.TrainingArguments.__dataclass_fields__) & settings.keys()
    wanted |= {name: settings.pop(name) for name in known}
    arguments = transformers.TrainingArguments(
        output_dir=str(path),
        use_cpu=True,
        report_to="none",
        remove_unused_columns=wanted.pop("remove_unused_columns", False),
        logging_steps=1,
        lr_scheduler_type="constant",
        optim="sgd",
        save_strategy=wanted.pop("save_strategy", "no"),
        disable_tqdm=True,
        ddp_find_unused_parameters=False,
        **wanted,
    )
    return kind(
        student,
        arguments,
        kd=kd or fastkd.KDLoss(2.0),
        train_dataset=Ragged(windows()) if data is None else data,
        data_collator=settings.pop("data_collator", collate),
        **settings,
    )


def weights(student):
    return torch.cat([weight.detach().flatten() for weight in student.parameters()])


def logged(found, name):
    return [line[name] for line in found.state.log_history if name in line and "loss" in line]


def test_a_step_is_the_gradient_of_the_loss(tmp_path):
    """Against a loop of four lines, with the logits in full."""
    student = model(0)
    twin = copy.deepcopy(student)
    found = trainer(tmp_path, student, teacher=teacher(), max_steps=1)
    batch = next(iter(found.get_train_dataloader()))
    found.train()
    kd = fastkd.KDLoss(2.0, shift=True, return_parts=True)
    ids = batch["input_ids"]
    parts = kd(twin(ids).logits, teacher()(ids).logits, batch["labels"])
    parts.loss.backward()
    with torch.no_grad():
        for weight in twin.parameters():
            weight -= 1e-2 * weight.grad
    torch.testing.assert_close(weights(student), weights(twin), rtol=1e-5, atol=1e-6)
    line = found.state.log_history[0]
    expected = (parts.loss.item(), parts.soft.item(), parts.hard.item(), (parts.hard / parts.soft).item())
    assert [line[name] for name in ("loss", "soft", "hard", "ratio")] == pytest.approx(expected, rel=1e-5)
    assert line["tokens_per_second"] > 0


def test_speed_is_of_the_steps_alone(tmp_path):
    """What a callback does before the first step, such as drawing samples, is no training."""

    class Slow(transformers.TrainerCallback):
        def on_train_begin(self, *args, **kwargs):
            time.sleep(1)

    found = trainer(tmp_path, model(0), teacher=teacher(), max_steps=1, callbacks=[Slow()])
    started = time.perf_counter()
    found.train()
    line = found.state.log_history[0]
    tokens = next(iter(found.get_train_dataloader()))["input_ids"].numel()
    assert tokens / line["tokens_per_second"] < time.perf_counter() - started - 1


def test_accumulation_is_exact(tmp_path):
    """Four batches of 4 are one of 16, although their rows have different numbers of labels."""
    one, four = model(0), model(0)
    whole = trainer(tmp_path, one, teacher=teacher(), per_device_train_batch_size=16)
    parts = trainer(tmp_path, four, teacher=teacher(), gradient_accumulation_steps=4)
    whole.train()
    parts.train()
    torch.testing.assert_close(weights(one), weights(four), rtol=1e-5, atol=1e-6)
    for name in ("loss", "soft", "hard"):
        assert logged(whole, name) == pytest.approx(logged(parts, name), rel=1e-5)


@pytest.mark.parametrize("accumulated", [1, 2])
def test_the_first_label_is_not_counted(tmp_path, accumulated):
    """Labels that are the token ids, as most collators make them: the loss is the mean over what is predicted."""
    ids = windows(8)
    data = [{"input_ids": row, "labels": row} for row in ids]
    config = transformers.GPT2Config(vocab_size=VOCAB, n_positions=LENGTH, n_embd=24, n_layer=1, n_head=2)
    torch.manual_seed(0)
    student = transformers.GPT2LMHeadModel(config).eval()  # Trainer knows Llama's loss to shift labels, not this one's
    student.train = lambda mode=True: student  # without dropout
    kd = fastkd.KDLoss(2.0, shift=True)
    with torch.no_grad():
        expected = kd(student(ids).logits, teacher()(ids).logits, ids).item()
    options = {"per_device_train_batch_size": 8 // accumulated, "gradient_accumulation_steps": accumulated}
    running = trainer(
        tmp_path,
        student,
        teacher=teacher(),
        data=data,
        data_collator=transformers.default_data_collator,
        max_steps=1,
        **options,
    )
    running.train()
    assert logged(running, "loss") == pytest.approx([expected], rel=1e-5)


@pytest.mark.parametrize(("format", "tolerance"), [("dense", 2e-3), ("topk", 2e-3), ("sampled", 0.25)])
def test_cached_is_live(tmp_path, format, tolerance):
    """A dense cache and one of all tokens give the live losses; a sample gives them in expectation."""
    live, other = model(0), model(0)
    temperature = 1.0 if format == "dense" else 2.0
    batches = [{"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in windows().split(5)]
    settings = {} if format == "dense" else {"k": VOCAB if format == "topk" else 12}
    cache = fastkd.cache.write(
        teacher(), batches, tmp_path / "cache", format=format, temperature=temperature, **settings
    )
    first = trainer(tmp_path, live, teacher=teacher(), data=Windows(windows()))
    second = trainer(tmp_path, other, data=Windows(windows()), data_collator=fastkd.cache.Collator(cache))
    first.train()
    second.train()
    for name in ("loss", "soft", "hard"):
        assert logged(second, name) == pytest.approx(logged(first, name), rel=tolerance)
    assert logged(second, "soft") != logged(first, "soft")
    if format != "sampled":
        torch.testing.assert_close(weights(other), weights(live), rtol=1e-2, atol=2e-4)


def test_courses(tmp_path):
    student = model(0)
    found = trainer(
        tmp_path,
        student,
        teacher=teacher(),
        max_steps=4,
        temperature=Course(4.0, 2.0, "linear"),
        soft_weight=Course(0.8, 0.0, "cosine"),
    )
    found.train()
    assert logged(found, "temperature") == pytest.approx([4, 3.5, 3, 2.5])
    expected = [0.8 * (1 + math.cos(math.pi * share)) / 2 for share in (0, 0.25, 0.5, 0.75)]
    assert logged(found, "soft_weight") == pytest.approx(expected)
    lines = zip(*(logged(found, name) for name in ("loss", "soft", "hard", "soft_weight")), strict=True)
    for loss, soft, hard, weight in lines:
        assert loss == pytest.approx(weight * soft + (1 - weight) * hard, rel=1e-5)


def test_validation_is_the_mean_over_tokens(tmp_path):
    """With an incomplete last batch, which training would drop, and rows of different numbers of labels."""
    student = model(0)
    data = Ragged(windows(7))
    found = trainer(
        tmp_path, student, teacher=teacher(), eval_dataset=data, per_device_eval_batch_size=4, dataloader_drop_last=True
    )
    batch = collate([data[index] for index in range(7)])
    logits = student(batch["input_ids"]).logits[:, :-1].flatten(0, 1)
    expected = torch.nn.functional.cross_entropy(logits, batch["labels"][:, 1:].flatten()).item()
    measured = found.evaluate()
    assert measured["eval_hard"] == pytest.approx(expected, rel=1e-5)
    assert measured["eval_perplexity"] == pytest.approx(math.exp(expected), rel=1e-5)


def test_mixed_precision_is_near(tmp_path):
    one, two = model(0), model(0)
    exact, mixed = trainer(tmp_path, one, teacher=teacher()), trainer(tmp_path, two, teacher=teacher(), bf16=True)
    exact.train()
    mixed.train()
    assert logged(mixed, "loss") == pytest.approx(logged(exact, "loss"), rel=2e-2)
    assert logged(mixed, "loss") != logged(exact, "loss")


def test_resumed_is_uninterrupted(tmp_path):
    whole, rest = model(0), model(0)
    one = trainer(tmp_path / "one", whole, teacher=teacher(), max_steps=12, save_strategy="steps", save_steps=5)
    one.train()
    two = trainer(tmp_path / "two", rest, teacher=teacher(), max_steps=12)
    two.train(resume_from_checkpoint=str(tmp_path / "one" / "checkpoint-5"))
    for name in ("loss", "soft", "hard", "ratio"):
        assert logged(two, name) == logged(one, name)
    assert torch.equal(weights(whole), weights(rest))


def test_a_recipe_adds_a_term(tmp_path):
    """The seam for losses beside the logits': one method."""

    class WithDecay(KDTrainer):
        def distillation_loss(self, model, inputs, teacher, labels, num_items):
            loss = super().distillation_loss(model, inputs, teacher, labels, num_items)
            return loss + sum(weight.square().sum() for weight in model.parameters())

    plain, decayed = model(0), model(0)
    trainer(tmp_path, plain, teacher=teacher(), max_steps=1).train()
    trainer(tmp_path, decayed, teacher=teacher(), max_steps=1, kind=WithDecay).train()
    torch.testing.assert_close(weights(plain) - weights(decayed), 2e-2 * weights(model(0)), rtol=1e-4, atol=1e-6)


def test_teachers_must_be_frozen(tmp_path):
    for wrong in (model(1).eval(), model(1).requires_grad_(False).train()):
        with pytest.raises(ValueError, match="frozen and in eval mode"):
            trainer(tmp_path, model(0), teacher=wrong)
    with pytest.raises(ValueError, match="there is no teacher"):
        trainer(tmp_path, model(0)).train()


NOT_TAKEN = [
    {"label_smoothing_factor": 0.1},
    {"compute_loss_func": lambda *_, **__: 0.0},
    {"compute_metrics": lambda found: {}},
    {"preprocess_logits_for_metrics": lambda logits, labels: logits},
    {"include_for_metrics": ["inputs"]},
    {"batch_eval_metrics": True},
    {"eval_do_concat_batches": False},
    {"label_names": ["targets"]},
    {"torch_compile": True},
]


@pytest.mark.parametrize("settings", NOT_TAKEN, ids=lambda settings: next(iter(settings)))
def test_arguments_that_take_no_part_are_refused(tmp_path, settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        trainer(tmp_path, model(0), teacher=teacher(), **settings)


def test_a_router_loss_is_a_term(tmp_path):
    """The mean of the batches' own, by their tokens, with the weight of the configuration; two batches make a step."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.MixtralConfig(vocab_size=VOCAB, num_key_value_heads=1, num_local_experts=4, **sizes)
    config.output_router_logits, config.router_aux_loss_coef = True, 0.25
    student = transformers.MixtralForCausalLM(config)
    twin = copy.deepcopy(student)
    found = trainer(tmp_path, student, teacher=teacher(), max_steps=1, gradient_accumulation_steps=2)
    batches = list(itertools.islice(found.get_train_dataloader(), 2))
    found.train()
    counts = [int((batch["labels"][:, 1:] != -100).sum()) for batch in batches]
    values = [twin(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).aux_loss for batch in batches]
    router = sum(value.item() * count for value, count in zip(values, counts, strict=True)) / sum(counts)
    (logged_router,), (loss,), (soft,), (hard,) = (logged(found, name) for name in ("router", "loss", "soft", "hard"))
    assert logged_router == pytest.approx(router, rel=1e-5)
    assert loss == pytest.approx(0.5 * soft + 0.5 * hard + 0.25 * router, rel=1e-5)


def test_a_router_loss_needs_a_router(tmp_path):
    student = model(0)
    student.config.output_router_logits = True
    with pytest.raises(ValueError, match="no router_aux_loss_coef"):
        trainer(tmp_path, student, teacher=teacher())


def test_a_batch_cannot_ask_for_a_router_loss(tmp_path):
    batch = {**collate([Ragged(windows())[0]]), "output_router_logits": True}
    student = model(0)
    with pytest.raises(ValueError, match="a batch has output_router_logits=True"):
        trainer(tmp_path, student, teacher=teacher()).compute_loss(student, batch)


def test_a_loss_of_another_reduction_is_refused(tmp_path):
    with pytest.raises(ValueError, match="reduction='mean', got 'sum'"):
        trainer(tmp_path, model(0), kd=fastkd.KDLoss(reduction="sum"), teacher=teacher())


def test_the_best_model_is_found_without_naming_a_metric(tmp_path):
    found = trainer(
        tmp_path,
        model(0),
        teacher=teacher(),
        eval_dataset=Ragged(windows(7)),
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
    )
    found.train()
    values = [line["eval_hard"] for line in found.state.log_history if "eval_hard" in line]
    assert found.state.best_metric == min(values)
    assert len(values) == 3


def test_the_loss_given_is_not_changed(tmp_path):
    kd = fastkd.KDLoss(2.0)
    before = dict(vars(kd))
    trainer(tmp_path, model(0), kd=kd, teacher=teacher(), temperature=Course(4.0, 1.0, "linear")).train()
    assert dict(vars(kd)) == before


def test_the_loss_has_a_default(tmp_path):
    arguments = transformers.TrainingArguments(str(tmp_path), use_cpu=True, report_to="none")
    assert KDTrainer(model(0), arguments, teacher=teacher()).kd.temperature == fastkd.KDLoss().temperature
