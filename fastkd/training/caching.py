"""Run a teacher over text and keep what it says in a cache.

    fastkd cache write                                                  # packaged teacher and reviews
    fastkd cache write --teacher gpt2 --data reviews.txt --output gpt2  # your own
    fastkd cache info gpt2

The windows of tokens are those that `fastkd distill` trains on with the same data, seed and context.
"""

from __future__ import annotations

import time
from typing import cast

import torch
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import fastkd.cache
from fastkd.cache import Cache, Progress
from fastkd.cache.writer import Format
from fastkd.training.data import read_documents, split, token_windows
from fastkd.training.loading import check_positions, check_tokenizer, device_called, load
from fastkd.training.options import CacheOptions, InputError

__all__ = ["write_cache"]


def write_cache(options: CacheOptions) -> Cache:
    """Write the cache, or go on with one that was stopped.

    Raises InputError before the teacher runs where the options cannot be met, CacheError where the cache cannot be
    written. Interrupted, it leaves a cache that the same call completes.
    """
    device = device_called(options.device)
    documents = read_documents(options.data)
    total = len(documents)
    if options.documents == "train":
        documents, _ = split(documents, options.seed)
    config, tokenizer = load(AutoConfig, options.teacher), load(AutoTokenizer, options.teacher)
    check_tokenizer(config, tokenizer)
    check_positions("teacher", config, options.context)
    most = options.windows or sum(map(len, documents))  # no more windows than characters
    windows = token_windows(documents, tokenizer, options.context, most)
    if not len(windows):
        raise InputError(f"{options.data} gives no window of {options.context} tokens: use a smaller --context")
    print(
        f"data: {len(documents):,} of {total:,} documents ({options.documents}); of them {len(windows):,} windows of "
        f"{options.context} tokens"
    )
    teacher = load(AutoModelForCausalLM, options.teacher, dtype=torch.float32).to(device)
    batches = ({"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in windows.split(options.batch_size))
    with tqdm(total=windows.numel(), desc="cache", unit="token", unit_scale=True) as bar:
        return fastkd.cache.write(
            teacher,
            batches,
            options.output,
            format=cast(Format, options.format),
            temperature=options.temperature,
            k=options.k or None,
            packed=not options.plain,
            seed=options.seed,
            shard_tokens=options.shard_tokens,
            tokenizer=tokenizer,
            teacher_name=options.teacher,
            progress=_Shown(bar),
        )


class _Shown:
    """Progress on a bar, whose rate and time left are those of the tokens that had to be computed."""

    def __init__(self, bar: tqdm) -> None:
        self._bar = bar
        self._started = time.perf_counter()

    def __call__(self, progress: Progress) -> None:
        found = progress.tokens - progress.computed
        self._bar.initial = found  # tqdm leaves these out of its rate
        self._bar.n = progress.tokens
        speed = progress.computed / (time.perf_counter() - self._started)
        self._bar.set_postfix({"tokens/s": f"{speed:.0f}", "bytes/token": progress.bytes_per_token})
