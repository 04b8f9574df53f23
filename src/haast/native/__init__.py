"""Typed wrappers of the compiled CPU kernels (kernels.cpp), on torch tensors through ctypes.

All tensors are fp32 on the CPU, except that keys and values of a KV pool may have 16 bits. Results are row independent:
a row or node has the same bits with any other rows and nodes in the batch and any number of threads. No function here
is differentiable: call them under `torch.no_grad()`.
"""

from haast.native.judge import judge
from haast.native.library import LANES, accelerated, available, features, huge_bytes, narrow_path, sole_threads, why_not
from haast.native.operators import (
    BLOCK_FORMS,
    MOST_TOP,
    WEIGHT_FORMS,
    linear,
    pack_blocks,
    pack_f16,
    pack_q8,
    panel_bytes,
    rms_norm,
    rotate_,
    swiglu,
    top,
    tree_attention,
    unpack_rows,
)
from haast.native.roofline import multiply_peak, read_bandwidth
from haast.native.stack import keep

__all__ = [
    "BLOCK_FORMS",
    "LANES",
    "MOST_TOP",
    "WEIGHT_FORMS",
    "accelerated",
    "available",
    "features",
    "huge_bytes",
    "judge",
    "keep",
    "linear",
    "multiply_peak",
    "narrow_path",
    "pack_blocks",
    "pack_f16",
    "pack_q8",
    "panel_bytes",
    "read_bandwidth",
    "rms_norm",
    "rotate_",
    "sole_threads",
    "swiglu",
    "top",
    "tree_attention",
    "unpack_rows",
    "why_not",
]
