"""The input pipeline: the same stream for any number of hosts, workers and restarts."""

import json

import jax
import numpy as np
import pytest

from condiff_jax.conditioning.control import ControlSpec
from condiff_jax.data.augment import SCALARS
from condiff_jax.data.pipeline import batches, create_source, first_controls
from tests import tiny
from tests.data.builders import archives

CONFIG = tiny.config()


def stream(config=CONFIG, **hosts):
    return batches(config, create_source(config), tiny.system(config).encode_text, **hosts)


def assert_equal(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)


def test_batches_have_the_shapes_the_system_expects():
    batch, example = next(stream()), tiny.system(CONFIG).example(16)
    assert jax.tree.structure(batch) == jax.tree.structure(example)
    for a, b in zip(jax.tree.leaves(batch), jax.tree.leaves(example), strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype


@pytest.mark.parametrize("workers", [0, 2])
def test_state_resumes_the_exact_stream(workers):
    whole, config = stream(), tiny.config(**{"data.workers": workers})
    expected = [next(whole) for _ in range(6)]
    first = stream(config)
    for _ in range(3):
        next(first)
    state = json.loads(json.dumps(first.get_state()))  # as checkpoints keep it
    second = stream(config)
    second.set_state(state)
    for batch in expected[3:]:
        assert_equal(batch, next(second))


def test_two_hosts_see_the_stream_of_one():
    one, parts = stream(), [stream(process=p, processes=2) for p in range(2)]
    for _ in range(2):
        whole, halves = next(one), [next(part) for part in parts]
        merged = jax.tree.map(lambda a, b: np.stack([a, b], 1).reshape(-1, *a.shape[1:]), *halves)
        assert_equal(whole, merged)


def test_every_epoch_has_another_order_and_augmentation():
    source = create_source(CONFIG)
    few = [source[i] for i in range(16)]
    data = batches(CONFIG, few, tiny.system(CONFIG).encode_text)
    first, second = next(data), next(data)
    assert sorted(first["label"]) == sorted(second["label"])  # the same records
    assert not np.array_equal(first["ids"], second["ids"])
    crops = [
        np.stack(list(b["control"].values()), 1)[np.argsort(b["label"])] for b in (first, second)
    ]
    assert np.abs(crops[0] - crops[1])[:, :4].max() > 0.01


def test_another_seed_is_another_stream():
    other = stream(tiny.config(seed=1))
    assert not np.array_equal(next(stream())["image"], next(other)["image"])


def test_control_scalars_feed_the_spec():
    batch = next(stream())
    assert set(batch["control"]) == set(SCALARS)
    control = ControlSpec(("crop", "flip", "size")).control(batch["control"])
    assert control.high.shape == (16, 5) and control.low.shape == (16, 2)
    np.testing.assert_allclose(control.low[:, 0], batch["control"]["height"])
    assert set(np.unique(control.high[:, 4])) <= {0.0, 1000.0}


def test_first_controls_are_those_that_training_sees():
    data, n = stream(), 24
    seen = [next(data)["control"] for _ in range(2)]
    expected = np.stack([np.concatenate([part[k] for part in seen]) for k in SCALARS], 1)[:n]
    np.testing.assert_array_equal(first_controls(CONFIG, create_source(CONFIG), n), expected)


@pytest.mark.parametrize("workers", [1])
def test_worker_processes_change_nothing(workers):
    plain, worked = stream(), stream(tiny.config(**{"data.workers": workers}))
    for _ in range(3):
        assert_equal(next(plain), next(worked))


def test_a_picture_that_turns_out_damaged_takes_no_random_numbers(tmp_path):
    """Its place is taken by the next one, cropped as if that had stood there."""
    good = [archives.jpeg(i, 60 + i, 90) for i in range(3)]
    streams = []
    for name, second in (("broken", archives.jpeg(5, 200, 99)[:-300]), ("whole", good[2])):
        pictures = [good[0], second, good[2]]
        members = [(f"{i}.jpg", data) for i, data in enumerate(pictures)]
        (tmp_path / name).mkdir()
        (tmp_path / name / "0.tar").write_bytes(archives.tar(members))
        path = str(tmp_path / name)
        config = tiny.config(**{"data.name": "webdataset", "data.path": path})
        streams.append(stream(config))
    broken, whole = map(next, streams)
    assert 0 < broken.pop("broken").sum() < 16 and not whole.pop("broken").any()
    assert_equal(broken, whole)
