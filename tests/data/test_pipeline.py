"""Tests of the input pipeline: one stream for any number of hosts, workers and restarts."""

import jax
import numpy as np
import pytest

from condiff_jax.conditioning.control import ControlSpec, scalar_names
from condiff_jax.data.pipeline import batches, create_source, first_controls
from tests import tiny
from tests.data.builders import archives

CONFIG = tiny.config()


def stream(config=CONFIG, **hosts):
    return batches(config, create_source(config), tiny.objective(config).encode_text, **hosts)


def assert_equal(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)


def test_batches_have_the_shapes_the_objective_expects():
    batch, example = next(stream()), tiny.objective(CONFIG).example(16)
    assert jax.tree.structure(batch) == jax.tree.structure(example)
    for a, b in zip(jax.tree.leaves(batch), jax.tree.leaves(example), strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype


@pytest.mark.parametrize("workers", [0, 2])
def test_the_stream_starts_at_any_batch(workers):
    whole = stream()
    expected = [next(whole) for _ in range(6)]
    second = stream(tiny.config(**{"data.workers": workers}), first=3)
    for batch in expected[3:]:
        assert_equal(batch, next(second))


@pytest.mark.parametrize("first", [0, 3])
@pytest.mark.parametrize("processes", [2, 4])
def test_the_global_batches_do_not_depend_on_the_number_of_hosts(processes, first):
    """A run can resume on another number of hosts, with the same noise for each example."""
    single = stream(first=first)
    parts = [stream(first=first, process=p, processes=processes) for p in range(processes)]
    for _ in range(2):
        merged = jax.tree.map(lambda *a: np.concatenate(a), *[next(part) for part in parts])
        assert_equal(next(single), merged)


def test_every_epoch_has_another_order_and_augmentation():
    source = create_source(CONFIG)
    records = [source[i] for i in range(16)]
    data = batches(CONFIG, records, tiny.objective(CONFIG).encode_text)
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
    assert set(batch["control"]) == set(scalar_names(jitter=False))
    control = ControlSpec(("crop", "flip", "size")).control(batch["control"])
    assert control.high.shape == (16, 5) and control.low.shape == (16, 2)
    np.testing.assert_allclose(control.low[:, 0], batch["control"]["height"])
    assert set(np.unique(control.high[:, 4])) <= {0.0, 1000.0}


def test_first_controls_are_those_of_the_training_batches():
    data, n = stream(), 24
    seen = [next(data)["control"] for _ in range(2)]
    expected = np.stack(
        [np.concatenate([part[k] for part in seen]) for k in scalar_names(jitter=False)], 1
    )[:n]
    np.testing.assert_array_equal(first_controls(CONFIG, create_source(CONFIG), n), expected)


@pytest.mark.slow
def test_a_worker_process_changes_nothing():
    single = stream()
    workers = stream(tiny.config(**{"data.workers": 1}))
    for _ in range(3):
        assert_equal(next(single), next(workers))


def test_a_damaged_image_uses_no_random_numbers(tmp_path):
    """The next image takes its place, with the crop that an intact image there would have had."""
    good = [archives.jpeg(i, 60 + i, 90) for i in range(3)]
    streams = []
    for name, second in (("broken", archives.jpeg(5, 200, 99)[:-300]), ("whole", good[2])):
        images = [good[0], second, good[2]]
        members = [(f"{i}.jpg", data) for i, data in enumerate(images)]
        (tmp_path / name).mkdir()
        (tmp_path / name / "0.tar").write_bytes(archives.tar(members))
        path = str(tmp_path / name)
        config = tiny.config(**{"data.name": "webdataset", "data.path": path})
        streams.append(stream(config))
    broken, whole = map(next, streams)
    assert 0 < broken.pop("broken").sum() < 16 and not whole.pop("broken").any()
    assert_equal(broken, whole)


def test_data_that_is_not_on_a_file_system_is_an_error():
    config = tiny.config(**{"data.name": "tfds", "data.path": "gs://bucket/imagenet"})
    with pytest.raises(ValueError, match="gs://bucket/imagenet is not a folder; mount it"):
        create_source(config)
