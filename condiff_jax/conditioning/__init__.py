"""The conditioning mechanisms of the paper.

`Cond` holds all conditioning inputs of a denoiser: semantics (labels or `Text`) and `Control`
metadata (Eq. 1), which `ControlEmbed` embeds with the `Weighting` gamma_c. `pad` fills text to a
fixed length (Eq. 7). `drop_flags` draws what is dropped in training (Eq. 2). `SCALARS`,
`WEIGHTINGS` and `PADDINGS` are registries, see docs/extending.md.
"""

from condiff_jax.conditioning.cond import Cond, Control, Text
from condiff_jax.conditioning.control import (
    SCALARS,
    WEIGHTINGS,
    ControlEmbed,
    ControlSpec,
    Scalar,
    View,
    Weighting,
)
from condiff_jax.conditioning.dropout import drop_flags
from condiff_jax.conditioning.text import PADDINGS, Padding, pad

__all__ = [
    "PADDINGS",
    "SCALARS",
    "WEIGHTINGS",
    "Cond",
    "Control",
    "ControlEmbed",
    "ControlSpec",
    "Padding",
    "Scalar",
    "Text",
    "View",
    "Weighting",
    "drop_flags",
    "pad",
]
