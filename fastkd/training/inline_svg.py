"""A figure as SVG that stands in an HTML page beside others: small, and in the page's own font and colour of text."""

from __future__ import annotations

import io
import re
from xml.etree import ElementTree

import matplotlib
from matplotlib.figure import Figure

__all__ = ["inline_svg"]

_REFERENCE = re.compile(r"#([\w.-]+)")
_NUMBER = re.compile(r"-?\d+\.\d+(?:e[-+]?\d+)?")
_FONT = re.compile(r"font:[^;]*?([\d.]+px)[^;]*")
_DRAWN = ("d", "transform", "x", "y", "width", "height", "points")  # attributes that are coordinates
_DROPPED = ("metadata", "style")  # addresses of vocabularies; a rule that would reach the whole page
_UNSAID = {"Date": None, "Creator": None, "Format": None, "Type": None}


def inline_svg(figure: Figure, name: str, label: str) -> str:
    """`figure` as an `<svg>` element without width and height, which fills the box it is put in.

    Text stays text, which the page's fonts show in every script. Black becomes `currentColor`, so that a dark page has
    light axes. `name` begins every id, which is unique in a page if `name` is. `label` is what screen readers say.
    """
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", transparent=True, metadata=_UNSAID)
    root = ElementTree.fromstring(buffer.getvalue())
    referenced = {
        found
        for element in root.iter()
        for key, value in element.attrib.items()
        if key.endswith("href") or "url(#" in value
        for found in _REFERENCE.findall(value)
    }
    for element in root.iter():
        element.tag = _local(element.tag)
        for child in [one for one in element if _local(one.tag) in _DROPPED]:
            element.remove(child)
        old = dict(element.attrib)
        element.attrib.clear()
        for key, value in old.items():
            if key == "id":
                if value in referenced:
                    element.set("id", f"{name}-{value}")
            elif key.endswith("href") or "url(#" in value:
                element.set(_local(key), _REFERENCE.sub(rf"#{name}-\1", value))
            elif key == "style":
                element.set("style", _FONT.sub(r"font-size: \1", value.replace("#000000", "currentColor")))
            else:
                element.set(_local(key), _NUMBER.sub(_rounded, value) if key in _DRAWN else value)
    root.attrib = {"viewBox": root.attrib["viewBox"], "role": "img", "aria-label": label, "fill": "currentColor"}
    return ElementTree.tostring(root, encoding="unicode")


def _local(name: str) -> str:
    """Without the namespace: HTML gives `<svg>` and what is in it theirs."""
    return name.rpartition("}")[2]


def _rounded(number: re.Match[str]) -> str:
    return f"{float(number[0]):.2f}".rstrip("0").rstrip(".")
