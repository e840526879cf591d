"""Every architecture equals its original implementation; the recorded table is complete."""

import dataclasses
import json
from functools import partial

import pytest

from benchmarks import parity
from condiff_jax.models import kl, unet, unet2d

# Compiling takes most of the time, so these networks have one or two levels with the fewest blocks
# and are compared at one resolution. Heads are given by number or by size.
SMALL = {
    "unet, text": unet.Size((8, 16), (True, False), parity.TEXT, heads=2, resnets=1),
    "unet, classes": unet.Size((16,), (True,), parity.TEXT, head_size=8, resnets=1),
    "unet2d": unet2d.Size((8, 16), (False, True), resnets=1, groups=4),
    "autoencoder": kl.Size((8, 16), latent=3, resnets=1),
}


def check(case, side):
    output, gradient = parity.compare(case, side)
    assert output < 1e-4
    assert gradient < 1e-3


def small(case):
    """The same comparison with small networks."""
    if case.name not in SMALL:
        return case
    size = SMALL[case.name]
    return dataclasses.replace(
        case,
        create=lambda side: case.create(side).clone(size=size),
        reference=partial(case.reference, size=size),
    )


def name(case):
    return f"{case.name}-{case.original}"


# "mmdit full" differs only in the norms; the PyTorch models are compared without them too.
DEFAULT = [case for case in parity.CASES if case.name != "mmdit full"]


@pytest.mark.parametrize("case", DEFAULT, ids=name)
def test_equals_the_original(case):
    check(small(case), 4 if case.name in SMALL else 8)


@pytest.mark.slow
@pytest.mark.parametrize("side", parity.SIDES)
@pytest.mark.parametrize("case", parity.CASES, ids=name)
def test_equals_the_original_as_recorded(case, side):
    """Full sizes, at two resolutions."""
    check(case, side)


def test_record_has_every_case():
    rows = json.loads(parity.RESULTS.read_text())["rows"]
    recorded = [(row["architecture"], row["reference"]) for row in rows]
    assert recorded == [(case.name, case.original) for case in parity.CASES]
    assert all(row["output"] < 1e-4 and row["gradient"] < 1e-3 for row in rows)
