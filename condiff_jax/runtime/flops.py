"""FLOP counts of JAX functions (matrix products, convolutions), and peak figures of devices."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import jax
from jax.extend import core


@dataclasses.dataclass(frozen=True)
class Chip:
    """Vendor's figures of one device.

    kinds: its names as `device_kind`. tflops: dense bf16 peak. memory: HBM, GiB. link: bandwidth of
    sending to other devices of the slice or machine over all links together, GB/s. clock: of a
    TPU's matrix units, GHz; None where compiled programs contain no cycle estimates.
    """

    kinds: tuple[str, ...]
    tflops: float
    memory: float
    link: float
    clock: float | None = None


# TPUs: the pages "TPU v4", "TPU v5e", "TPU v5p", "TPU v6e" of the Cloud TPU documentation, whose
# bandwidths between chips count both directions, except v4's. GPUs: NVIDIA's data sheets (900 and
# 600 GB/s of NVLink, both directions); the memory is what a GPU sold as "80 GB" has in GiB.
CHIPS = {
    "v4": Chip(("TPU v4",), 275, 32, 300, 1.05),
    "v5e": Chip(("TPU v5 lite", "TPU v5e"), 197, 16, 200, 1.5),
    "v5p": Chip(("TPU v5", "TPU v5p"), 459, 95, 600, 1.75),
    "v6e": Chip(("TPU v6 lite", "TPU v6e"), 918, 32, 400, 1.75),
    "a100": Chip(("NVIDIA A100-SXM4-80GB",), 312, 79.2, 300),
    "a100-40": Chip(("NVIDIA A100-SXM4-40GB",), 312, 39.5, 300),
    "h100": Chip(("NVIDIA H100 80GB HBM3",), 989, 79.1, 450),
    "h200": Chip(("NVIDIA H200",), 989, 140, 450),
}


def peak_tflops() -> float | None:
    """Return the dense bf16 peak of the first device; None for kinds that are not in CHIPS."""
    kind = jax.devices()[0].device_kind
    return next((chip.tflops for chip in CHIPS.values() if kind in chip.kinds), None)


def count(function: Callable, *args) -> int:
    """Count the FLOPs of one call (multiply-add = 2) without executing it.

    args may be ShapeDtypeStructs. XLA's own cost analysis counts the body of a scan once; this
    multiplies by its length. The body of a `while` counts once, and so does each branch of a
    `cond`.
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
    """Collect the jaxprs in the parameters of an equation: loop bodies, branches, calls."""
    out = []
    for value in params.values():
        for item in value if isinstance(value, (tuple, list)) else (value,):
            if isinstance(item, core.ClosedJaxpr):
                out.append(item.jaxpr)
            elif isinstance(item, core.Jaxpr):
                out.append(item)
    return out
