"""Training of the classifier of `frechet_shapes`: `python -m benchmarks.shapes_classifier`.

Writes condiff_jax/evaluation/metrics/shapes_features.safetensors and, with its accuracy on held-out
combinations of color, shape and position, benchmarks/results/shapes_classifier.json. A new training
changes the features, so distances measured before and after are not comparable.
"""

from __future__ import annotations

import json
import math
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

from condiff_jax.data import augment, shapes
from condiff_jax.evaluation.metrics import shapes_features
from condiff_jax.evaluation.metrics.shapes_features import HEADS, SIDE, WEIGHTS, ShapesClassifier

RESULTS = Path(__file__).parent / "results" / "shapes_classifier.json"
RESOLUTIONS = (16, 24, 32, 48, 64)  # one a batch, in turn
SIZES = (12, 96)  # short sides of the originals
STEPS, BATCH, RATE, EMA = 5000, 64, 2e-3, 0.998
SIZE_WEIGHT = 4.0  # of the squared error of log_size, which is small beside cross-entropies
HELD_OUT = 500  # images per resolution
UNKNOWN = -1  # target of an attribute that is not in the image


def example(split: str, index: int, resolution: int, *, train: bool) -> tuple[np.ndarray, dict]:
    """Image uint8 (R, R, 3) of a scene and its target by head; augmented if train, else cropped."""
    scene, rng = shapes.make_scene(split, index, SIZES), np.random.default_rng([index, resolution])
    picture = shapes.render(scene)
    if train and rng.random() < 0.5:
        crop = augment.CROPS["mix" if rng.random() < 0.5 else "global"]
        image, control = augment.augment(picture, rng, resolution=resolution, crop=crop)
    else:
        image, side = augment.center(picture, resolution), min(scene.height, scene.width)
        control = {
            "crop_top": (scene.height - side) // 2 / scene.height,
            "crop_left": (scene.width - side) // 2 / scene.width,
            "crop_height": side / scene.height,
            "crop_width": side / scene.width,
            "flip": 0,
        }
    main = scene.objects[0]
    x = (main.x - control["crop_left"]) / control["crop_width"]
    y = (main.y - control["crop_top"]) / control["crop_height"]
    x = 1 - x if control["flip"] else x
    seen = len(scene.objects) == 1 and 0 < x < 1 and 0 < y < 1
    cell = 3 * int(3 * y) + int(3 * x)
    side = control["crop_height"] * scene.height
    return image, {
        "colour": shapes.COLORS.index(main.colour) if seen else UNKNOWN,
        "shape": shapes.SHAPES.index(main.shape) if seen else UNKNOWN,
        "position": cell if seen else UNKNOWN,
        "tone": shapes.TONES.index(scene.background.tone),
        "texture": shapes.TEXTURES.index(scene.background.texture),
        "count": len(scene.objects) - 1,
        "log_size": math.log(min(side, resolution, SIDE)),
    }


def batch(split: str, start: int, count: int, resolution: int, *, train: bool):
    """Images (count, R, R, 3) and targets by head (count,) of the scenes from `start` on."""
    images, targets = zip(
        *(example(split, start + i, resolution, train=train) for i in range(count)), strict=True
    )
    return np.stack(images), {name: np.array([t[name] for t in targets]) for name in HEADS}


def loss_fn(params: dict, images: jax.Array, targets: dict) -> jax.Array:
    """Cross-entropies over the known targets, and the squared error of log_size."""
    _, logits = ShapesClassifier().apply({"params": params}, images)
    total = SIZE_WEIGHT * jnp.square(logits["log_size"][:, 0] - targets["log_size"]).mean()
    for name in HEADS:
        if name != "log_size":
            known = targets[name] != UNKNOWN
            losses = optax.softmax_cross_entropy_with_integer_labels(logits[name], targets[name])
            total += jnp.where(known, losses, 0).sum() / jnp.maximum(known.sum(), 1)
    return total


def scores(params: dict, images: np.ndarray, targets: dict) -> dict[str, float]:
    """Accuracy by head, among known targets; for log_size the root-mean-square error."""
    _, logits = shapes_features.apply(params, images)
    error = np.asarray(logits["log_size"])[:, 0] - targets["log_size"]
    out = {"log_size_error": float(np.sqrt(np.square(error).mean()))}
    for name in HEADS:
        if name != "log_size":
            known = targets[name] != UNKNOWN
            right = np.asarray(logits[name]).argmax(1) == targets[name]
            out[name] = float(right[known].mean())
    return out


def held_out(params: dict, count: int = HELD_OUT, resolutions=RESOLUTIONS) -> dict[str, dict]:
    """`scores` on the validation split, by resolution."""
    data = {n: batch("validation", 0, count, n, train=False) for n in resolutions}
    return {str(n): scores(params, *examples) for n, examples in data.items()}


def train() -> dict:
    """Train for STEPS and return the EMA parameters; the scenes of step i depend on i alone."""
    images = np.zeros((1, SIDE, SIDE, 3), np.uint8)
    params = ShapesClassifier().init(jax.random.key(0), images)["params"]
    rate = optax.warmup_cosine_decay_schedule(0, RATE, STEPS // 20, STEPS)
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate, weight_decay=1e-3))

    @jax.jit
    def step(params, opt_state, ema, images, targets):
        loss, grads = jax.value_and_grad(loss_fn)(params, images, targets)
        updates, opt_state = tx.update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
        ema = optax.incremental_update(params, ema, 1 - EMA)
        return params, opt_state, ema, loss

    def make(i):
        return batch("train", i * BATCH, BATCH, RESOLUTIONS[i % len(RESOLUTIONS)], train=True)

    opt_state, ema = tx.init(params), params
    with ThreadPoolExecutor(1) as pool, tqdm(total=STEPS, desc="shapes classifier") as bar:
        ahead = pool.submit(make, 0)
        for i in range(STEPS):
            data, ahead = ahead.result(), pool.submit(make, i + 1)
            params, opt_state, ema, loss = step(params, opt_state, ema, *data)
            bar.update()
            if i % 50 == 0:
                bar.set_postfix(loss=f"{float(loss):.3f}")
    return ema


def main() -> None:
    """Train, write the weights, print and record their accuracy."""
    start = time.perf_counter()
    WEIGHTS.write_bytes(shapes_features.dump(train()))
    rows = held_out(shapes_features.parameters())
    print(f"{'resolution':<12}" + "".join(f"{name:>16}" for name in rows["16"]))
    for resolution, row in rows.items():
        print(f"{resolution:<12}" + "".join(f"{value:>16.3f}" for value in row.values()))
    count = sum(a.size for a in jax.tree.leaves(shapes_features.parameters()))
    record = {
        "held_out": rows,
        "pictures": HELD_OUT,
        "parameters": count,
        "steps": STEPS,
        "batch": BATCH,
        "seconds": round(time.perf_counter() - start),
        "sha256": shapes_features.sha256(),
        "versions": {
            "jax": jax.__version__,
            "flax": flax.__version__,
            "optax": optax.__version__,
            "numpy": np.__version__,
        },
    }
    RESULTS.write_text(json.dumps(record, indent=2) + "\n")
    print(f"{count} parameters in {WEIGHTS} and {RESULTS}")


if __name__ == "__main__":
    main()
