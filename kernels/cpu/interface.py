"""The C interface of the native library: every struct of `api.h`, field by field, and every entry point."""

from __future__ import annotations

import ctypes
from typing import Any

__all__ = [
    "ENTRIES",
    "STRUCTURES",
    "KDLoss",
    "KDRows",
    "LogSoftmax",
    "Matrix",
    "MixRows",
    "RowScales",
    "RowState",
    "Selection",
    "SparseInput",
    "SparseTeacher",
    "Statistics",
    "WeightedTotal",
]


class Matrix(ctypes.Structure):
    """Rows of `width` elements; row i starts at (i // inner)·outer_stride + (i % inner)·inner_stride."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("dtype", ctypes.c_int64),
        ("width", ctypes.c_int64),
        ("inner", ctypes.c_int64),
        ("outer_stride", ctypes.c_int64),
        ("inner_stride", ctypes.c_int64),
    )


class SparseTeacher(ctypes.Structure):
    _fields_ = (
        ("ids", ctypes.c_void_p),
        ("logprobs", ctypes.c_void_p),
        ("rest", ctypes.c_void_p),
        ("offset", ctypes.c_void_p),
        ("picked", ctypes.c_void_p),
        ("count", ctypes.c_int64),
    )


class RowState(ctypes.Structure):
    """What is known of a row between tiles."""

    _fields_ = (
        ("student_max", ctypes.c_float),
        ("teacher_max", ctypes.c_float),
        ("student", ctypes.c_double),
        ("teacher", ctypes.c_double),
        ("hard", ctypes.c_double),
        ("gap", ctypes.c_double),
        ("forward", ctypes.c_double),
        ("reverse", ctypes.c_double),
        ("top_student", ctypes.c_float),
        ("top_teacher", ctypes.c_float),
        ("label_logit", ctypes.c_double),
        ("value", ctypes.c_double),
        ("total_g", ctypes.c_double),
    )


class KDRows(ctypes.Structure):
    _fields_ = (
        ("student", Matrix),
        ("teacher", Matrix),
        ("grad", Matrix),
        ("labels", ctypes.c_void_p),
        ("soft_scale", ctypes.c_void_p),
        ("hard_scale", ctypes.c_void_p),
        ("soft", ctypes.c_void_p),
        ("hard", ctypes.c_void_p),
        ("rows", ctypes.c_int64),
        ("vocab_size", ctypes.c_int64),
        ("divergence", ctypes.c_char_p),
        ("threads", ctypes.c_int64),
        ("parameters", ctypes.POINTER(ctypes.c_double)),
        ("parameter_count", ctypes.c_int64),
        ("temperature", ctypes.c_double),
        ("teacher_temperature", ctypes.c_double),
        ("soft_weight", ctypes.c_double),
        ("hard_weight", ctypes.c_double),
        ("stage", ctypes.c_int64),
        ("first", ctypes.c_int64),
        ("origin", ctypes.c_int64),
        ("state", ctypes.c_void_p),
        ("sparse", SparseTeacher),
    )


class MixRows(ctypes.Structure):
    _fields_ = (
        ("teachers", ctypes.POINTER(Matrix)),
        ("weights", ctypes.POINTER(ctypes.c_double)),
        ("out", Matrix),
        ("scale", ctypes.c_void_p),
        ("count", ctypes.c_int64),
        ("rows", ctypes.c_int64),
        ("threads", ctypes.c_int64),
        ("temperature", ctypes.c_double),
    )


class Statistics(ctypes.Structure):
    _fields_ = (
        ("logits", Matrix),
        ("labels", ctypes.c_void_p),
        ("log_sum_exp", ctypes.c_void_p),
        ("entropy", ctypes.c_void_p),
        ("argmax", ctypes.c_void_p),
        ("label_logprob", ctypes.c_void_p),
        ("normaliser", ctypes.c_void_p),
        ("rows", ctypes.c_int64),
        ("threads", ctypes.c_int64),
        ("temperature", ctypes.c_double),
    )


class LogSoftmax(ctypes.Structure):
    _fields_ = (
        ("logits", Matrix),
        ("upstream", Matrix),  # backward only
        ("out", Matrix),
        ("normaliser", ctypes.c_void_p),
        ("total", ctypes.c_void_p),  # backward only
        ("rows", ctypes.c_int64),
        ("threads", ctypes.c_int64),
        ("temperature", ctypes.c_double),
    )


class Selection(ctypes.Structure):
    _fields_ = (
        ("logits", Matrix),
        ("ids", ctypes.c_void_p),
        ("log_weights", ctypes.c_void_p),
        ("summary", ctypes.c_void_p),
        ("uniforms", ctypes.c_void_p),
        ("k", ctypes.c_int64),
        ("rows", ctypes.c_int64),
        ("threads", ctypes.c_int64),
        ("temperature", ctypes.c_double),
    )


class SparseInput(ctypes.Structure):
    _fields_ = (
        ("ids", ctypes.c_void_p),
        ("logprobs", ctypes.c_void_p),
        ("rest", ctypes.c_void_p),
        ("entropy", ctypes.c_void_p),
        ("live", ctypes.c_void_p),
        ("ids_out", ctypes.c_void_p),
        ("logprobs_out", ctypes.c_void_p),
        ("rest_out", ctypes.c_void_p),
        ("offset_out", ctypes.c_void_p),
        ("rows", ctypes.c_int64),
        ("count", ctypes.c_int64),
        ("vocab_size", ctypes.c_int64),
        ("kind", ctypes.c_int64),
        ("threads", ctypes.c_int64),
        ("slack", ctypes.c_double),
        ("nothing", ctypes.c_double),
    )


class RowScales(ctypes.Structure):
    _fields_ = (
        ("labels", ctypes.c_void_p),
        ("weights", ctypes.c_void_p),
        ("every", ctypes.c_void_p),
        ("masked", ctypes.c_void_p),
        ("moved", ctypes.c_void_p),
        ("rows", ctypes.c_int64),
        ("length", ctypes.c_int64),
        ("ignore_index", ctypes.c_int64),
        ("count", ctypes.c_int64),
        ("divisor", ctypes.c_double),
    )


class WeightedTotal(ctypes.Structure):
    _fields_ = (
        ("soft", ctypes.c_void_p),
        ("hard", ctypes.c_void_p),
        ("soft_scale", ctypes.c_void_p),
        ("hard_scale", ctypes.c_void_p),
        ("total", ctypes.c_void_p),
        ("rows", ctypes.c_int64),
        ("soft_weight", ctypes.c_double),
        ("hard_weight", ctypes.c_double),
    )


class KDLoss(ctypes.Structure):
    _fields_ = (
        ("rows", KDRows),
        ("scales", RowScales),
        ("soft", ctypes.c_int64),
        ("hard", ctypes.c_int64),
        ("masked_apart", ctypes.c_int64),
        ("total", ctypes.c_int64),
    )


#: The argument structs and the state of a row, by their names in C++.
STRUCTURES = {
    structure.__name__: structure
    for structure in (
        KDRows,
        MixRows,
        Statistics,
        LogSoftmax,
        Selection,
        SparseInput,
        RowScales,
        WeightedTotal,
        KDLoss,
        RowState,
    )
}

#: Every entry point: what it returns, and what it takes.
ENTRIES: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "fastkd_abi": (ctypes.c_int, ()),
    "fastkd_isa": (ctypes.c_char_p, ()),
    "fastkd_knows": (ctypes.c_int, (ctypes.c_char_p,)),
    "fastkd_size": (ctypes.c_int64, (ctypes.c_char_p,)),
    "fastkd_kd_rows": (ctypes.c_int, (ctypes.POINTER(KDRows),)),
    "fastkd_kd_loss": (ctypes.c_int, (ctypes.c_char_p, *[ctypes.c_void_p] * 7, ctypes.c_double, ctypes.c_int64)),
    "fastkd_mix_rows": (ctypes.c_int, (ctypes.POINTER(MixRows),)),
    "fastkd_row_statistics": (ctypes.c_int, (ctypes.POINTER(Statistics),)),
    "fastkd_log_softmax": (ctypes.c_int, (ctypes.POINTER(LogSoftmax),)),
    "fastkd_log_softmax_backward": (ctypes.c_int, (ctypes.POINTER(LogSoftmax),)),
    "fastkd_select": (ctypes.c_int, (ctypes.POINTER(Selection),)),
    "fastkd_sparse_rows": (ctypes.c_int, (ctypes.POINTER(SparseInput),)),
    "fastkd_row_scales": (ctypes.c_int, (ctypes.POINTER(RowScales),)),
    "fastkd_weighted_total": (ctypes.c_int, (ctypes.POINTER(WeightedTotal),)),
    "fastkd_advise_huge_pages": (None, (ctypes.c_void_p, ctypes.c_int64)),
}
