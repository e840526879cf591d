"""Counting FLOPs of matrix products and convolutions, and what devices could do at best."""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
from jax.extend import core

# Dense bf16 peak of one device in TFLOP/s, from the vendors' data sheets.
PEAK_TFLOPS = {
    "TPU v4": 275,
    "TPU v5 lite": 197,
    "TPU v5e": 197,
    "TPU v5": 459,
    "TPU v5p": 459,
    "TPU v6 lite": 918,
    "TPU v6e": 918,
    "NVIDIA A100-SXM4-40GB": 312,
    "NVIDIA A100-SXM4-80GB": 312,
    "NVIDIA H100 80GB HBM3": 989,
    "NVIDIA H200": 989,
}


def peak_tflops() -> float | None:
    """Peak of this machine's first device; None for kinds that the table does not know."""
    return PEAK_TFLOPS.get(jax.devices()[0].device_kind)


def count(function: Callable, *args) -> int:
    """FLOPs of one call (multiply-add = 2), nothing executed; args may be ShapeDtypeStructs.

    XLA's own cost analysis counts the body of a scan once; this multiplies by its length. The
    body of a `while` counts once, and so does each branch of a `cond`.
    """
    return _count(jax.make_jaxpr(function)(*args).jaxpr)


def _count(jaxpr: core.Jaxpr) -> int:
    total = 0
    for eqn in jaxpr.eqns:
        name = eqn.primitive.name
        if name == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            shape = eqn.invars[0].aval.shape
            total += 2 * eqn.outvars[0].aval.size * math.prod(shape[i] for i in contracted)
        elif name == "conv_general_dilated":
            out_dim = eqn.params["dimension_numbers"].rhs_spec[0]
            kernel = eqn.invars[1].aval
            per_output = kernel.size // kernel.shape[out_dim]
            total += 2 * eqn.outvars[0].aval.size * per_output
        else:
            length = eqn.params["length"] if name == "scan" else 1
            total += length * sum(_count(inner) for inner in inner_jaxprs(eqn.params))
    return total


def inner_jaxprs(params: dict) -> list[core.Jaxpr]:
    """What an equation with these parameters has inside: bodies of loops, branches, calls."""
    out = []
    for value in params.values():
        for item in value if isinstance(value, (tuple, list)) else (value,):
            if isinstance(item, core.ClosedJaxpr):
                out.append(item.jaxpr)
            elif isinstance(item, core.Jaxpr):
                out.append(item)
    return out
