"""Conditioning mechanisms and pre-training strategies for diffusion models, in JAX.

`load(workdir)` reads a trained run. JAX is imported when that is first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from condiff_jax.runs import load

__version__ = "0.1.0"
__all__ = ["__version__", "load"]


def __getattr__(name: str):
    if name != "load":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from condiff_jax.runs import load

    return load
