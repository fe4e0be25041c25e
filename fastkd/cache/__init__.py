"""The teacher runs once: its predictions for every token, in a few bytes, found by the content of a sequence.

    cache = fastkd.cache.write(teacher, batches, "cache/", temperature=2.0, tokenizer=tokenizer)

    cache = fastkd.cache.open("cache/")
    cache.check(tokenizer=tokenizer, teacher=teacher, loss=kd)
    loader = DataLoader(dataset, 32, shuffle=True, collate_fn=fastkd.cache.Collator(cache), num_workers=2)
    for batch in loader:
        student_logits = fastkd.project(student, input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
        loss = kd(student_logits, batch["teacher"], batch["labels"])

What is kept of a row, by `format`; bytes per token at a vocabulary of 50257 and the default k, beside about 24 bytes
per sequence:

| format          | bytes per token | read as                 | error of what is stored                                |
|-----------------|-----------------|-------------------------|--------------------------------------------------------|
| sampled, k = 12 | 38              | SparseTargets "sampled" | weights 5.1 % at most, right in expectation; under 2e-6|
|                 |                 |                         | they become that or 0. Entropies 0.05 %                |
| topk, k = 64    | 260             | SparseTargets "ghost"   | probabilities 6e-5 at most; those below e⁻³² read e⁻³² |
| packed=False    | 8·k + 4         | the same                | none: fp32                                             |
| dense           | 100,514         | logits [.., vocab_size] | log-probabilities 0.05 % (float16), 0.4 % (bfloat16)   |

`sampled` is the one to begin with: a random k tokens whose weights make the loss and its gradient unbiased estimates of
dense forward KL (`fastkd.backend.Backend.sample`); its noise averages out over tokens. `topk` keeps the likeliest k and
the mass of all others. It is biased: the bias does not average out, but is small where the student is close to the
teacher. It allows other divergences. `dense` is for small vocabularies and for checking.

A cache belongs to one teacher's weights (`fingerprint`). A teacher that was trained further cannot continue a write
or pass a check. The first row that a process takes of a shard has the shard's checksum compared, 0.65 s per GB.

Needs numpy and safetensors: `pip install 'fastkd[train]'`.
"""

try:
    import numpy  # noqa: F401
    import safetensors  # noqa: F401
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"fastkd.cache needs {error.name}: pip install 'fastkd[train]'", name=error.name
    ) from error

from fastkd.cache.collator import Collator
from fastkd.cache.disk import CacheError
from fastkd.cache.fingerprints import fingerprint
from fastkd.cache.manifest import Settings
from fastkd.cache.reader import Cache, open
from fastkd.cache.writer import Progress, write

__all__ = ["Cache", "CacheError", "Collator", "Progress", "Settings", "fingerprint", "open", "write"]
