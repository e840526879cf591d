"""Shape detection on rendered and other images, and prompt accuracy of right and wrong ones."""

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image, ImageDraw

from condiff_jax.data.shapes import (
    CLASSES,
    COLORS,
    FINE_CLASSES,
    POSITIONS,
    Shapes,
    label,
    make_scene,
    prompts,
    render,
)
from condiff_jax.evaluation.metrics.prompt import class_accuracy, detect, prompt_accuracy, sharpness


def resized(image, side):
    return np.asarray(Image.fromarray(image).resize((side, side), Image.Resampling.BICUBIC))


def noisy_images(scenes, side, native=96, noise=8.0):
    """Render scenes at the native resolution, resize and add noise: (N, side, side, 3) uint8."""
    rng = np.random.default_rng(0)
    images = np.stack([resized(render(scene, native, native), side) for scene in scenes])
    return np.clip(images + rng.normal(0, noise, images.shape), 0, 255).astype(np.uint8)


def everything_mentioned(scene):
    names = {"colour", "shape", "position"} | ({"relation"} if scene.relation else set())
    return replace(scene, mentions=frozenset(names))


@pytest.fixture(scope="module")
def mixed():
    """Return scenes of all shapes and colors, with one or two objects and all attributes."""
    return [everything_mentioned(make_scene("train", index)) for index in range(80)]


def assert_accurate(accuracy, colour=0.995, position=0.99, shape=0.98):
    assert accuracy["colour"] >= colour
    assert accuracy["position"] >= position
    assert accuracy["shape"] >= shape


@pytest.mark.parametrize("side,count", [(32, 120), (64, 30)])
def test_accurate_on_noisy_validation_prompts(side, count):
    scenes = prompts(count)
    accuracy = prompt_accuracy(noisy_images(scenes, side), scenes)
    assert_accurate(accuracy)
    assert "relation" not in accuracy


@pytest.mark.parametrize("native,noise", [(96, 8), (24, 8), (96, 16)])
def test_accurate_on_all_shapes_blurred_or_noisier(mixed, native, noise):
    accuracy = prompt_accuracy(noisy_images(mixed, 32, native, noise), mixed)
    assert_accurate(accuracy)
    assert accuracy["relation"] >= 0.95 and accuracy["all"] >= 0.97


def test_shapes_drawn_by_another_renderer_are_detected():
    draw_on = {
        "circle": lambda d, box: d.ellipse(box, fill="blue"),
        "square": lambda d, box: d.rectangle(box, fill="blue"),
        "ring": lambda d, box: d.ellipse(box, outline="blue", width=12),
        "triangle": lambda d, box: d.polygon(
            [(box[0], box[3]), (box[2], box[3]), ((box[0] + box[2]) / 2, box[1])], fill="blue"
        ),
        "cross": lambda d, box: (
            d.rectangle((box[0] + 20, box[1], box[2] - 20, box[3]), fill="blue"),
            d.rectangle((box[0], box[1] + 20, box[2], box[3] - 20), fill="blue"),
        ),
    }
    for shape, draw in draw_on.items():
        canvas = Image.new("RGB", (160, 160), (150, 145, 140))
        draw(ImageDraw.Draw(canvas), (10, 90, 70, 150))
        for side in (32, 64, 160):
            (detection,) = detect(resized(np.asarray(canvas), side))
            assert (detection.colour, detection.shape) == ("blue", shape)
            assert detection.position == "bottom left"
            assert abs(detection.x - 0.25) < 0.04 and abs(detection.y - 0.75) < 0.04


def test_pale_colors_are_detected(mixed):
    images = noisy_images(mixed[:40], 32).astype(float)
    pale = (0.5 * images + 0.5 * images.mean(3, keepdims=True)).astype(np.uint8)
    assert_accurate(prompt_accuracy(pale, mixed[:40]))


def test_nothing_is_detected_without_objects():
    rng = np.random.default_rng(0)
    for index in range(30):
        background = replace(make_scene("train", index), objects=())
        assert detect(render(background, 48, 48)) == []
        assert detect(rng.normal(128, 30, (32, 32, 3)).clip(0, 255).astype(np.uint8)) == []
    assert detect(np.full((16, 16, 3), 90, np.uint8)) == []
    assert detect(np.full((32, 32, 3), (200, 30, 30), np.uint8)) == []


def test_objects_are_counted_and_ordered_by_size(mixed):
    for scene in mixed[:40]:
        detections = detect(render(scene))
        assert len(detections) == len(scene.objects)
        sizes = [detection.size for detection in detections]
        assert sizes == sorted(sizes, reverse=True)
        assert {d.colour for d in detections} == {o.colour for o in scene.objects}
        assert len(detect(render(scene), max_objects=1)) == 1


def test_wrong_images_score_near_chance(mixed):
    images = noisy_images(mixed, 32)
    accuracy = prompt_accuracy(np.roll(images, 1, axis=0), mixed)
    assert accuracy["colour"] < 2.5 / len(COLORS)
    assert accuracy["shape"] < 2 / 5
    assert accuracy["position"] < 2.5 / len(POSITIONS)
    assert accuracy["relation"] < 0.4 and accuracy["all"] < 0.05
    assert 0.25 < accuracy["left_right"] < 0.65  # chance is a half, less with relations
    empty = prompt_accuracy(np.full_like(images[:20], 128), mixed[:20])
    assert set(empty.values()) == {0.0}


def test_each_wrong_attribute_is_distinguished():
    scene = next(s for s in prompts(20) if s.objects[0].position in ("top", "bottom"))
    item = scene.objects[0]
    other = {"circle": "cross"}.get(item.shape, "circle")
    for name, changed in {
        "shape": replace(item, shape=other),
        "colour": replace(item, rgb=item.rgb[1:] + item.rgb[:1]),
        "position": replace(item, x=0.5, y=0.5),
    }.items():
        image = render(replace(scene, objects=(changed,)), 48, 48)
        accuracy = prompt_accuracy(image[None], [scene])
        wrong = {key for key, value in accuracy.items() if value == 0}
        assert wrong == {name, "all"}


def test_mirrored_relation_is_wrong():
    scenes = [make_scene("train", index) for index in range(300)]
    scenes = [s for s in scenes if "relation" in s.mentions and s.relation.endswith("of")][:10]
    images = noisy_images(scenes, 48)
    assert prompt_accuracy(images, scenes)["relation"] == 1
    assert prompt_accuracy(images[:, :, ::-1], scenes)["relation"] == 0


DRAWN = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (30, 50, 220)}


def drawn(*circles):
    """Draw circles (color, x, y, radius), in fractions of a side, on gray: (96, 96, 3)."""
    canvas = Image.new("RGB", (96, 96), (128, 128, 128))
    for color, x, y, radius in circles:
        box = [96 * (x - radius), 96 * (y - radius), 96 * (x + radius), 96 * (y + radius)]
        ImageDraw.Draw(canvas).ellipse(box, fill=DRAWN[color])
    return np.asarray(canvas)


def circles_scene(colors, mentions, relation=None):
    """Create a scene of circles with only the fields that prompt_accuracy reads."""
    scene = make_scene("train", 0)
    items = [replace(scene.objects[0], colour=color, shape="circle") for color in colors]
    return replace(scene, objects=tuple(items), relation=relation, mentions=frozenset(mentions))


@pytest.mark.parametrize("offset, holds", [(0.1, False), (0.2, True)])
@pytest.mark.parametrize("relation", ["left of", "right of", "above", "below"])
def test_a_relation_holds_when_it_is_clear(offset, holds, relation):
    far = 0.5  # along the other axis, so that both are detected
    sign = 1 if relation in ("left of", "above") else -1
    horizontal = relation.endswith("of")
    dx, dy = (sign * offset, far) if horizontal else (far, sign * offset)
    first = (0.5 - dx / 2, 0.5 - dy / 2)
    second = (0.5 + dx / 2, 0.5 + dy / 2)
    image = drawn(("red", *first, 0.14), ("green", *second, 0.14))
    assert {d.colour for d in detect(image)} == {"red", "green"}
    scene = circles_scene(("red", "green"), {"relation"}, relation)
    assert prompt_accuracy(image[None], [scene])["relation"] == holds


def test_a_relation_of_the_wrong_main_object_is_wrong():
    image = drawn(("red", 0.25, 0.5, 0.16), ("green", 0.75, 0.5, 0.14))
    for color, expected in (("red", 1), ("blue", 0)):
        scene = circles_scene((color, "green"), {"relation"}, "left of")
        accuracy = prompt_accuracy(image[None], [scene])
        assert accuracy["relation"] == accuracy["left_right"] == accuracy["all"] == expected


def test_the_larger_shape_counts_for_scenes_of_one_object():
    image = drawn(("red", 0.25, 0.25, 0.12), ("green", 0.65, 0.65, 0.25))
    assert [d.colour for d in detect(image)] == ["green", "red"]
    for colors, expected in ((("red",), 0), (("green",), 1), (("red", "blue"), 1)):
        scene = circles_scene(colors, {"colour"})
        assert prompt_accuracy(image[None], [scene])["colour"] == expected


@pytest.mark.parametrize(
    "points", [[(8, 88), (88, 8)], [(10, 10), (48, 86), (86, 10)], [(8, 20), (80, 30), (12, 60)]]
)
def test_a_colored_line_is_not_a_shape(points):
    canvas = Image.new("RGB", (96, 96), (128, 128, 128))
    ImageDraw.Draw(canvas).line(points, fill=DRAWN["red"], width=7)
    assert detect(np.asarray(canvas)) == []
    assert class_accuracy(np.asarray(canvas)[None], [0], CLASSES)["colour"] == 0


def test_mirrored_images_are_wrong_in_left_right_only(mixed):
    sided = [s for s in mixed if s.objects[0].position.endswith(("left", "right"))]
    sided = [s for s in sided if s.relation is None]
    images = noisy_images(sided, 48)
    assert prompt_accuracy(images, sided)["left_right"] == 1
    mirrored = prompt_accuracy(images[:, :, ::-1], sided)
    assert mirrored["left_right"] == 0 and mirrored["colour"] == 1
    middle = [s for s in prompts(60) if s.objects[0].position in ("top", "center", "bottom")]
    assert "left_right" not in prompt_accuracy(noisy_images(middle, 32), middle)


def test_left_and_right_are_halves_and_relations():
    scene = next(s for s in prompts(60) if s.objects[0].position == "top left")
    moved = replace(scene.objects[0], x=0.42, y=0.6)
    accuracy = prompt_accuracy(render(replace(scene, objects=(moved,)), 48, 48)[None], [scene])
    assert accuracy["position"] == 0 and accuracy["left_right"] == 1
    scenes = [make_scene("train", index) for index in range(200)]
    for relation, sided in (("right of", True), ("above", False)):
        scene = next(s for s in scenes if s.relation == relation and "relation" in s.mentions)
        scene = replace(scene, mentions=scene.mentions - {"position"})
        image = render(scene, 48, 48)
        assert ("left_right" in prompt_accuracy(image[None], [scene])) == sided
        if sided:
            assert prompt_accuracy(image[None], [scene])["left_right"] == 1
            assert prompt_accuracy(image[None, :, ::-1], [scene])["left_right"] == 0


@pytest.mark.parametrize("classes", [CLASSES, FINE_CLASSES])
def test_class_accuracy_of_rendered_classes(classes):
    records = [Shapes("validation", (48, 48), len(classes))[i] for i in range(80)]
    labels = [int(record["label"]) for record in records]
    images = np.stack([resized(record["image"], 32) for record in records])
    accuracy = class_accuracy(images, labels, classes)
    assert set(accuracy) == {"colour", "shape", "all"}
    assert accuracy["colour"] > 0.98 and accuracy["shape"] > 0.97 and accuracy["all"] > 0.96
    wrong = class_accuracy(images, labels[1:] + labels[:1], classes)
    assert wrong["shape"] < 0.5 and wrong["all"] < 0.3
    assert wrong["colour"] < (0.75 if classes is CLASSES else 0.4)


def test_class_accuracy_distinguishes_color_and_shape():
    scene = next(s for s in prompts(60) if s.objects[0].colour == "purple")
    item, image = scene.objects[0], render(scene, 48, 48)[None]
    other = "circle" if item.shape != "circle" else "ring"
    for color, shape, expected in (
        ("purple", item.shape, (1, 1, 1)),
        ("red", item.shape, (0, 1, 0)),
        ("purple", other, (1, 0, 0)),
    ):
        labels = [label(color, shape, len(FINE_CLASSES))]
        accuracy = class_accuracy(image, labels, FINE_CLASSES)
        assert (accuracy["colour"], accuracy["shape"], accuracy["all"]) == expected
        if color == "red":  # warm like purple
            assert class_accuracy(image, [label(color, shape)], CLASSES)["all"] == 1
    assert class_accuracy(image, [label("blue", item.shape)], CLASSES)["colour"] == 0
    empty = class_accuracy(np.full((1, 32, 32, 3), 128, np.uint8), [0], CLASSES)
    assert set(empty.values()) == {0.0}


@pytest.mark.parametrize("index", range(5))
def test_sharpness_falls_with_lost_resolution(index):
    image = render(make_scene("train", index), 64, 64)
    measured = [sharpness(image)]
    for side in (48, 32, 24, 16):
        measured.append(sharpness(resized(resized(image, side), 64)))
    assert all(a > b for a, b in zip(measured, measured[1:], strict=False))
    assert sharpness(np.full((16, 16, 3), 7, np.uint8)) == 0


def test_bad_input():
    scenes = prompts(2)
    images = np.zeros((2, 32, 32, 3), np.uint8)
    for bad in (images[0].astype(np.float32), images[0, ..., 0], images[0, :8]):
        with pytest.raises(ValueError, match="image must"):
            detect(bad)
    with pytest.raises(ValueError, match="as many"):
        prompt_accuracy(images[:1], scenes)
    with pytest.raises(ValueError, match="as many"):
        prompt_accuracy(images[:0], [])
    with pytest.raises(ValueError, match="uint8"):
        prompt_accuracy(images.astype(np.float32), scenes)
    with pytest.raises(ValueError, match="as many images as labels"):
        class_accuracy(images, [0], CLASSES)
    for bad in ("warm cat", "hot circle"):
        with pytest.raises(ValueError, match="does not name"):
            class_accuracy(images[:1], [0], [bad])
