"""Tests that procedural scenes are deterministic, balanced and consistent with captions."""

import itertools
import pickle
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from condiff_jax.data import shapes
from condiff_jax.data.shapes import Shapes, held_out, make_scene, prompts, render

COUNT = 3000


@pytest.fixture(scope="module")
def scenes():
    return [make_scene("train", index) for index in range(COUNT)]


@pytest.fixture(scope="module")
def unseen():
    return [make_scene("validation", index) for index in range(1000)]


def test_same_bytes_in_any_order_and_after_pickling():
    source = Shapes()
    order = [7, 0, 123_456_789, 3, len(source) - 1]
    first = {i: source[i] for i in order}
    copy = pickle.loads(pickle.dumps(source))
    for i in sorted(order):
        record = copy[i]
        assert record["image"].tobytes() == first[i]["image"].tobytes()
        assert record["image"].dtype == np.uint8 and record["label"].dtype == np.int32
        assert (record["caption"], record["label"]) == (first[i]["caption"], first[i]["label"])


def test_indices_and_splits_differ():
    captions = [[Shapes(split)[i]["caption"] for i in range(50)] for split in shapes.SPLITS]
    assert captions[0] != captions[1]
    assert len(set(captions[0])) > 40


def test_held_out_triples_are_disjoint(scenes, unseen):
    def triple(item):
        return item.colour, item.shape, item.position

    train = {triple(item) for scene in scenes for item in scene.objects}
    validation = {triple(scene.objects[0]) for scene in unseen}
    assert not any(held_out(*t) for t in train)
    assert all(held_out(*t) for t in validation)
    assert len(train) == 232 and len(validation) == 38  # every allowed triple occurs
    assert len({(c, s) for c, s, _ in validation}) == 30  # of all colors and shapes


def test_captions_have_2_to_24_plain_words_of_the_vocabulary(scenes, unseen):
    words = [scene.caption.split() for scene in scenes + unseen]
    lengths = [len(w) for w in words]
    assert min(lengths) == 2 and 20 < max(lengths) <= 24
    vocabulary = Shapes().vocabulary()
    assert list(vocabulary) == sorted(set(vocabulary))
    used = set(itertools.chain.from_iterable(words))
    used |= {word for name in Shapes().classes for word in name.split()}
    assert used == set(vocabulary)
    assert all(word.isalpha() and word.islower() for word in vocabulary)


def test_captions_state_what_they_mention(scenes):
    for scene in scenes:
        main, padded = scene.objects[0], f" {scene.caption} "
        assert {"colour", "shape"} <= scene.mentions
        assert f" {main.colour} {main.shape} " in padded
        if "position" in scene.mentions:
            assert f" {main.position} " in padded
        if "relation" in scene.mentions:
            second = scene.objects[1]
            before, after = padded.split(f" {scene.relation} ", 1)
            assert main.shape in before and f"{second.colour} {second.shape}" in after
        assert ("size" in scene.mentions) == (f" {main.size} {main.colour}" in padded)


def test_label_is_the_class_of_the_main_object():
    coarse, fine = shapes.Shapes("train"), shapes.Shapes("train", classes=30)
    assert len(coarse.classes) == 10 and len(fine.classes) == 30
    for index in range(20):
        main = shapes.make_scene("train", index).objects[0]
        heat = "warm" if main.colour in ("red", "yellow", "purple") else "cool"
        assert coarse.classes[coarse[index]["label"]] == f"{heat} {main.shape}"
        assert fine.classes[fine[index]["label"]] == f"{main.colour} {main.shape}"


def test_entangled_sizes_determine_the_tone_and_change_nothing_else():
    share, n, sizes = 0.6, 300, (12, 48)
    plain = [shapes.make_scene("train", i, sizes) for i in range(n)]
    entangled = [shapes.make_scene("train", i, sizes, share) for i in range(n)]
    agree = np.zeros(2)
    for before, after in zip(plain, entangled, strict=True):
        assert before.objects == after.objects
        assert (before.height, before.width) == (after.height, after.width)
        short = min(before.height, before.width)
        tone = ("dark", "grey", "pale")[(short >= 12 * 4 ** (1 / 3)) + (short >= 12 * 4 ** (2 / 3))]
        agree += [before.background.tone == tone, after.background.tone == tone]
    assert abs(agree[0] / n - 1 / 3) < 0.09 and abs(agree[1] / n - (share + (1 - share) / 3)) < 0.09


def assert_near_uniform(values, names, tolerance=0.25):
    counts = Counter(values)
    assert set(counts) == set(names)
    share = np.array([counts[name] for name in names]) / sum(counts.values()) * len(names)
    assert np.all(np.abs(share - 1) < tolerance), dict(counts)


def test_attributes_are_near_uniform(scenes):
    mains = [scene.objects[0] for scene in scenes]
    assert_near_uniform([item.colour for item in mains], shapes.COLORS)
    assert_near_uniform([item.shape for item in mains], shapes.SHAPES)
    assert_near_uniform([item.position for item in mains], shapes.POSITIONS)
    assert_near_uniform([item.size for item in mains], shapes.SIZES)
    assert_near_uniform([s.relation for s in scenes if s.relation], shapes.RELATIONS)
    assert_near_uniform([s.background.texture for s in scenes], shapes.TEXTURES)


def test_mixture_of_scenes(scenes):
    pairs = np.mean([len(scene.objects) == 2 for scene in scenes])
    placed = np.mean([len(s.objects) == 1 and "position" in s.mentions for s in scenes])
    assert abs(pairs - 0.25) < 0.03
    assert 0.55 < placed < 0.72


def test_positions_and_relations_agree_with_coordinates(scenes):
    for scene in scenes:
        for item in scene.objects:
            row, column = divmod(shapes.POSITIONS.index(item.position), 3)
            assert abs(item.x * 3 - column - 0.5) <= 0.301
            assert abs(item.y * 3 - row - 0.5) <= 0.301
        if scene.relation:
            main, second = scene.objects
            right, down = second.x - main.x, second.y - main.y
            offset = dict(zip(shapes.RELATIONS, (right, -right, down, -down), strict=True))
            assert offset[scene.relation] > 0.4


def test_objects_never_overlap(scenes):
    for scene in scenes:
        if len(scene.objects) == 2:
            main, second = scene.objects
            distance = max(abs(main.x - second.x), abs(main.y - second.y))
            assert distance > (main.diameter + second.diameter) / 2 + 0.05
            assert main.colour != second.colour


def test_some_objects_are_slightly_cut_by_borders(scenes):
    beyond = []
    for scene in scenes:
        for item in scene.objects:
            edge = min(item.x, item.y, 1 - item.x, 1 - item.y)
            beyond.append(0.5 - edge / item.diameter)
    assert max(beyond) < shapes.CUT_SHARE + 1e-6
    assert 0.1 < np.mean(np.array(beyond) > 0.03) < 0.7


@pytest.mark.parametrize(
    "shape, area",  # in units of the squared radius
    [("circle", np.pi), ("square", 4), ("triangle", 1.75), ("cross", 2.04), ("ring", 0.75 * np.pi)],
)
def test_shapes_have_their_areas(shape, area):
    x = np.arange(-30, 31, dtype=np.float32)
    covered = shapes._coverage(shape, x, x[:, None], 20.0)
    np.testing.assert_allclose(covered.sum() / 400, area, rtol=0.03)


def test_native_sizes_fill_their_range(scenes):
    short = [min(s.height, s.width) for s in scenes]
    aspect = [s.width / s.height for s in scenes]
    assert min(short) == 24 and max(short) == 96
    assert 0.86 < min(aspect) < 0.92 and 1.09 < max(aspect) < 1.16
    image = render(scenes[0])
    assert image.shape == (scenes[0].height, scenes[0].width, 3)


def test_sizes_change_the_resolution_only():
    for index in range(20):
        small = make_scene("train", index, (32, 32))
        assert min(small.height, small.width) == 32
        large = make_scene("train", index)
        assert (small.objects, small.caption) == (large.objects, large.caption)


def test_render_paints_the_object_at_its_position_at_any_size(scenes):
    for scene in scenes[:40]:
        item = scene.objects[0]
        if item.shape == "ring":
            continue
        for height, width in ((24, 24), (50, 64), (96, 72)):
            pixel = render(scene, height, width)[int(item.y * height), int(item.x * width)]
            assert np.abs(pixel - 255 * np.array(item.rgb)).max() < 12


def test_backgrounds_are_grayish_and_detailed(scenes):
    for scene in scenes[:60]:
        image = render(replace(scene, objects=()), 64, 64).astype(int)
        assert np.ptp(image, axis=2).max() < 45
        assert np.abs(np.diff(image[..., 0], axis=1)).mean() > 0.5


def test_prompts_are_distinct_unseen_single_objects():
    chosen = prompts(30)
    assert len(chosen) == 30
    assert prompts(10, offset=20) == chosen[20:]
    for scene in chosen:
        item = scene.objects[0]
        assert len(scene.objects) == 1 and held_out(item.colour, item.shape, item.position)
        assert {"colour", "shape", "position"} <= scene.mentions


def test_bad_arguments():
    with pytest.raises(ValueError, match="train, validation"):
        Shapes("test")
    with pytest.raises(ValueError, match="sizes"):
        Shapes(sizes=(96, 24))
    source = Shapes("validation")
    for index in (-1, len(source)):
        with pytest.raises(IndexError):
            source[index]
