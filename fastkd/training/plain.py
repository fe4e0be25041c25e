"""Makes text from outside harmless for where it is shown: a terminal, Markdown, a figure. Standard library only."""

from __future__ import annotations

import re
import unicodedata

__all__ = ["figure_text", "markdown", "visible"]

_SHOWN = 80  # characters of a text in a figure


def visible(text: str) -> str:
    """`text` with control characters, direction marks and lone surrogates as escapes; line breaks and tabs stay."""
    return "".join(one if one in "\n\t" or one.isprintable() else _escaped(one) for one in text)


def markdown(text: str) -> str:
    """`text` as a line of Markdown that shows it as it is: no markup, no HTML and no mathematics in it."""
    return re.sub(r"([\\`*_\[\]<>#|$~&])", r"\\\1", " ".join(visible(text).split()))


def figure_text(text: str) -> str:
    """`text` as a line that matplotlib shows as it is, shortened: it takes what is between two $ for mathematics."""
    line = visible(text).replace("\n", "⏎").replace("\t", "⇥")
    shown = line if len(line) <= _SHOWN else line[: _SHOWN - 1] + "…"
    return shown.replace("$", r"\$")


def _escaped(one: str) -> str:
    if unicodedata.category(one) == "Zs":  # other blanks than the usual one
        return one
    return one.encode("unicode_escape", "surrogatepass").decode("ascii")
