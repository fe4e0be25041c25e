"""Students made from their teachers: fewer of its blocks, or narrower ones, with its weights."""

from fastkd.students.choosing import choose_layers
from fastkd.students.layers import keep_layers, parse_layers
from fastkd.students.width import narrow

__all__ = ["choose_layers", "keep_layers", "narrow", "parse_layers"]
