"""Sampling speed against diffusers: `python -m benchmarks.sampling [--cores=0] [--save]`.

DiT for 1000 classes on latents of 32 x 32 x 4, plain classifier-free guidance, DDIM, a tiny
AutoencoderKL: in our `Sampler` and in diffusers' `DiTPipeline`, with the same random weights,
labels, initial noise, steps and guidance, on the same device. Both must give the same images. The
methods are timed in turn, several times, from labels to images in the host's memory, without
compilation. The same sampler without decoding is compared with its calls of the denoiser alone.

On CPUs, speeds are compared by CPU time, which other processes affect little. On a GPU, for example
`--size=XL/2 --batch=32 --steps=50 --dtype=bfloat16 --attention=cudnn --save`.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from unittest import mock

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import torch

from benchmarks import parity, timing
from benchmarks.timing import COMPILED, OURS, THEIRS
from condiff_jax.config.errors import ConfigError
from condiff_jax.diffusion.guidance import dual_guidance
from condiff_jax.diffusion.sampler import initial_noise, timesteps
from condiff_jax.models import kl
from condiff_jax.models.autoencoder import Pixels
from condiff_jax.objectives.diffusion import DiffusionObjective, create
from condiff_jax.objectives.validate import create_config
from condiff_jax.objectives.vocabulary import Vocabulary
from condiff_jax.pretrained import key_maps
from condiff_jax.pretrained.layout import to_torch
from condiff_jax.pytorch import exporting
from condiff_jax.runtime.process import fail
from condiff_jax.sampling.requests import create_batch
from condiff_jax.sampling.sampler import Sampler, noise_keys
from configs import base

RESULTS = Path(__file__).parent / "results" / "sampling.json"
CLASSES = 1000  # DiTPipeline's null class is number 1000
SIDE, GUIDANCE, SCALE = 32, 1.5, 0.18215
VAE = kl.SIZES["tiny"]
# Largest mean difference of two images, in gray levels of 255.
LIMITS = {"float32": 0.05, "bfloat16": 4.0}
UNDECODED, CALLS = "ours, not decoded", "ours, its calls of the denoiser alone"


def create_autoencoder() -> diffusers.AutoencoderKL:
    """diffusers' autoencoder of our size `tiny`, with random weights."""
    torch.manual_seed(0)
    levels = len(VAE.channels)
    return diffusers.AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * levels,
        up_block_types=["UpDecoderBlock2D"] * levels,
        block_out_channels=VAE.channels,
        layers_per_block=VAE.resnets,
        latent_channels=VAE.latent,
        norm_num_groups=VAE.groups,
        scaling_factor=SCALE,
    ).eval()


def create_objective(options: argparse.Namespace, autoencoder: str) -> DiffusionObjective:
    """Our objective; autoencoder: the folder of its weights."""
    values = base.get_config()
    values.model.update(name="dit_ln", size=options.size, position="extrapolate")
    values.model.update(dtype=options.dtype, attention=options.attention)
    values.data.update(resolution=SIDE * VAE.factor, semantics="class")
    values.conditioning.control = ()
    values.autoencoder.update(name="kl", size="tiny", scale=SCALE, path=autoencoder)
    values.sampling.update(steps=options.steps, guidance=GUIDANCE, batch_size=options.batch)
    objective = create(create_config(values), Vocabulary((), tuple(map(str, range(CLASSES)))))
    depth = options.depth or objective.model.depth
    return dataclasses.replace(objective, model=objective.model.clone(depth=depth))


def create_params(objective: DiffusionObjective) -> dict:
    """Random parameters with small modulation weights in the blocks.

    With larger ones the network is chaotic: 1% of its output in f32 is rounding error.
    """
    params = parity.random_like(jax.eval_shape(objective.init, jax.random.key(0)))
    params["model"]["blocks"]["modulation"]["linear"]["kernel"] *= 0.1
    return params


def create_transformer(
    objective: DiffusionObjective, params: dict
) -> diffusers.DiTTransformer2DModel:
    """diffusers' DiT with our weights, and with DiT's frequencies (see `parity`)."""
    model, (side, _, channels) = objective.model, objective.latent_shape
    transformer = diffusers.DiTTransformer2DModel(
        num_attention_heads=model.heads,
        attention_head_dim=model.width // model.heads,
        in_channels=channels,
        out_channels=channels,
        num_layers=model.depth,
        sample_size=side,
        patch_size=model.patch,
        num_embeds_ada_norm=CLASSES,
        norm_eps=1e-6,
    )
    for block in transformer.transformer_blocks:
        block.norm1.emb.time_proj.downscale_freq_shift = 0
    rules = key_maps.diffusers_dit(model.patch, model.depth)
    state = key_maps.to_published(to_torch(params["model"]), rules)
    return parity.load(transformer, state, tables=("pos_embed.pos_embed",))


def create_pipeline(
    objective: DiffusionObjective, params: dict, vae: diffusers.AutoencoderKL
) -> diffusers.DiTPipeline:
    """diffusers' pipeline with our weights."""
    scheduler = diffusers.DDIMScheduler.from_config(exporting.scheduler_config(objective))
    pipeline = diffusers.DiTPipeline(create_transformer(objective, params), vae, scheduler)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def undecoded(objective: DiffusionObjective) -> DiffusionObjective:
    """The same objective without decoder; its images are the latents in uint8."""
    latents = Pixels(factor=VAE.factor, channels=VAE.latent)
    settings = dataclasses.replace(objective.config.sampling, clip=False)
    config = dataclasses.replace(objective.config, sampling=settings)
    return dataclasses.replace(objective, config=config, autoencoder=latents)


def denoiser_calls(
    objective: DiffusionObjective, params: dict, x: jax.Array, batch: dict
) -> Callable:
    """A function that calls the denoiser as the sampler does, on the guidance's batch of branches.

    Each call takes the previous one's output, so that XLA cannot merge them.
    """
    settings, inputs = objective.config.sampling, []
    guided = dual_guidance(lambda *arguments: inputs.append(arguments) or arguments[0], GUIDANCE)
    guided(x, jnp.zeros(len(x), jnp.int32), objective.condition(params, batch, None))
    x, _, cond = jax.device_put(inputs[0], jax.devices()[0])
    times = timesteps(objective.schedule.timesteps, settings.steps, settings.spacing)

    @jax.jit
    def run(params, x, cond):
        denoise = objective.denoise(params)

        def step(x, t):
            return denoise(x, jnp.full(len(x), t), cond), None

        return jax.lax.scan(step, x, jnp.asarray(times, jnp.int32))[0]

    return lambda: np.asarray(run(params, x, cond))


def our_methods(
    objective: DiffusionObjective, params: dict, frozen: dict, labels: np.ndarray, x: jax.Array
):
    """{name: function that samples once}; the first two return images."""
    params = jax.device_put(params, jax.devices()[0])
    frozen = jax.device_put(frozen, jax.devices()[0])
    batch = create_batch(objective, labels)
    latents = undecoded(objective)
    sampler = Sampler(objective, timing.one_device(), objective.config.sampling, frozen)
    latent_sampler = Sampler(latents, timing.one_device(), latents.config.sampling)
    return {
        OURS: lambda: sampler(params, batch),
        UNDECODED: lambda: latent_sampler(params, batch),
        CALLS: denoiser_calls(objective, params, x, batch),
    }


def their_methods(pipeline: diffusers.DiTPipeline, options: argparse.Namespace, labels, x) -> dict:
    """{name: function that samples once}, all from the initial noise x."""
    device = "cuda" if jax.default_backend() == "gpu" else "cpu"
    pipeline.to(device, getattr(torch, options.dtype))
    x = parity.tensor(x).permute(0, 3, 1, 2).to(device, getattr(torch, options.dtype))

    def method(pipeline) -> Callable:
        def sample():
            draw = "diffusers.pipelines.dit.pipeline_dit.randn_tensor"
            with mock.patch(draw, lambda *args, **kwargs: x):
                out = pipeline(labels.tolist(), GUIDANCE, None, options.steps, "np")
            return out.images

        return sample

    methods = {THEIRS: method(pipeline)}
    if options.compile:
        compiled = torch.compile(pipeline.transformer)
        compiled_pipeline = diffusers.DiTPipeline(compiled, pipeline.vae, pipeline.scheduler)
        compiled_pipeline.set_progress_bar_config(disable=True)
        methods[COMPILED] = method(compiled_pipeline)
    return methods


def difference(ours: np.ndarray, theirs: np.ndarray) -> dict[str, float]:
    """Differences in gray levels of images in uint8 and in [0, 1]; contrast: their std."""
    theirs = 255 * theirs.astype(np.float64)
    error = np.abs(ours - theirs.round())
    return {"mean": error.mean(), "largest": error.max(), "contrast": theirs.std()}


def summarize(seconds: dict[str, np.ndarray], batch: int, clock: int) -> dict:
    """Rows, and the shares of time outside the denoiser as (median, min, max).

    clock: 0 to compare wall time, 1 CPU time. A row's speed is relative to diffusers'. Ratios are
    taken within each repetition, because the load of a machine changes more slowly.
    """
    used, rows = {name: values[:, clock] for name, values in seconds.items()}, []
    for name, values in seconds.items():
        wall, cpu = np.median(values, axis=0)
        rows.append({
            "method": name, "images_per_second": batch / wall, "images_per_cpu_second": batch / cpu,
            "seconds": wall, "cpu_seconds": cpu, "least": used[name].min(),
            "most": used[name].max(), "speed": np.median(used[THEIRS] / used[name]),
        })  # fmt: skip
    outside = {}
    for key, name in (("sampling", UNDECODED), ("sampling and decoding", OURS)):
        shares = 1 - used[CALLS] / used[name]
        outside[key] = (np.median(shares), shares.min(), shares.max())
    return {"rows": rows, "outside": outside}


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", default="S/4", help="size of the DiT, as model.size")
    parser.add_argument("--depth", type=int, default=0, help="blocks; 0: those of the size")
    parser.add_argument("--batch", type=int, default=4, help="images at a time")
    parser.add_argument("--steps", type=int, default=10, help="a divisor of 1000")
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--dtype", default="float32", choices=LIMITS)
    parser.add_argument("--attention", default="xla", choices=("xla", "cudnn"))
    parser.add_argument("--cores", default="", help="to run on, as 0,1; all by default")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--save", action="store_true", help=f"write {RESULTS.name}")
    options = parser.parse_args(arguments)
    if options.steps < 1 or 1000 % options.steps:
        parser.error("--steps must divide 1000, where diffusers' DDIM steps are ours")
    return options


def report(record: dict) -> None:
    """Print a record."""
    print(f"{'':<38}{'images/s':>10}{'per CPU s':>11}{'extremes, s':>16}{'speed':>8}")
    for row in record["rows"]:
        rates = f"{row['images_per_second']:>10.2f}{row['images_per_cpu_second']:>11.2f}"
        spread = f"{row['least']:.2f}-{row['most']:.2f}"
        print(f"{row['method']:<38}{rates}{spread:>16}{row['speed']:>8.2f}")
    for name, reason in record["left_out"].items():
        print(f"{name}: left out, {reason}")
    for name, (median, least, most) in record["outside"].items():
        print(f"outside the denoiser, {name}: {median:.1%} ({least:.1%} to {most:.1%})")
    for name, error in record["pictures"].items():
        print(f"images, ours and {name}: " + ", ".join(f"{k} {v:.3g}" for k, v in error.items()))


def main(arguments: Sequence[str] | None = None) -> int:
    """Return the exit code: 0, 1 if the images differ, 2 for bad input to `timing.start`."""
    options = parse(arguments)
    try:
        gpu = timing.start(options.cores)
    except ConfigError as error:
        return fail(error)
    vae = create_autoencoder()
    with tempfile.TemporaryDirectory() as folder:
        vae.save_pretrained(folder)
        objective = create_objective(options, folder)
        frozen = objective.load_frozen()
    params = create_params(objective)
    labels = np.random.default_rng(0).integers(CLASSES, size=options.batch)
    keys = noise_keys(objective.config.sampling.seed, jnp.arange(options.batch))[:, 1]
    x = initial_noise(keys, objective.latent_shape)
    record = timing.surroundings() | {
        "settings": vars(options) | {"guidance": GUIDANCE, "latents": objective.latent_shape}
    }
    with timing.precision(options.dtype):
        methods = our_methods(objective, params, frozen, labels, x)
        methods |= their_methods(create_pipeline(objective, params, vae), options, labels, x)
        images, record["left_out"] = timing.warm_up(methods)
        seconds = timing.measure(methods, options.repetitions)
    record |= summarize(seconds, options.batch, clock=0 if gpu else 1)
    record["pictures"] = {
        name: difference(images[OURS], images[name])
        for name in (THEIRS, COMPILED)
        if name in images
    }
    report(record)
    if options.save:
        RESULTS.write_text(json.dumps(record, indent=1) + "\n")
    if max(error["mean"] for error in record["pictures"].values()) < LIMITS[options.dtype]:
        return 0
    print(f"error: images differ, the limit is {LIMITS[options.dtype]}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    timing.restart()
    sys.exit(main())
