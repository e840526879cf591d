"""Records of a latent cache hold the control scalars of their views, colors included."""

import numpy as np
import pytest

from condiff_jax.conditioning.control import scalar_names
from condiff_jax.data.latent_cache import head_dtype, pack, views


@pytest.mark.parametrize("color", [0.0, 0.5])
def test_records_hold_all_scalars_of_their_views(color):
    image = np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)
    options = {"count": 2, "resolution": 8, "crop": (0.5, 1.0), "flip": True, "color": color}
    images, controls = views({"image": image}, seed=(0, 1), **options)
    names = scalar_names(jitter=bool(color))
    assert len(images) == len(controls) == 4 and len(names) == (11 if color else 8)
    for first, second in (controls[:2], controls[2:]):  # a view and its mirror image
        assert first | {"flip": 1} == second
    record = {"label": 3, "caption": "a ring", "controls": controls}
    _, *stored = pack(record | {"moments": np.zeros((4, 2, 2, 8), np.float32)})
    head = head_dtype(len(names))
    for control, data in zip(controls, stored, strict=True):
        values = np.frombuffer(data[: head.itemsize], head)[0]
        assert values["label"] == 3
        np.testing.assert_array_equal(values["control"], [control[name] for name in names])
