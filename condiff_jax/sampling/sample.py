"""Sampling: prompts or classes and control values in, pictures out; sample i depends on i alone."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import flax.linen as nn
import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh
from PIL import Image
from tqdm import tqdm

from condiff_jax.config.errors import ConfigError
from condiff_jax.config.schema import Config, Sampling
from condiff_jax.data.augment import SCALARS
from condiff_jax.diffusion.guidance import (
    classifier_gradient,
    classifier_guidance,
    dual_guidance,
    needed_branches,
    scaled_guidance,
)
from condiff_jax.diffusion.sampler import SAMPLERS, initial_noise
from condiff_jax.objectives.diffusion import System
from condiff_jax.objectives.diffusion import create as create_system
from condiff_jax.runs.checkpoint import Checkpoints
from condiff_jax.runs.workdir import Workdir
from condiff_jax.runtime import sharding
from condiff_jax.sampling import classifier_guide
from condiff_jax.sampling.image_grid import caption_grid


def guidance_scale(settings: Sampling, resolution: int) -> float:
    """lambda of Eq. 2, by Eq. 4 where it is given for another resolution (pixels)."""
    if not settings.base_resolution:
        return settings.guidance
    return scaled_guidance(settings.guidance, resolution / settings.base_resolution)


def asked_control(config: Config) -> dict[str, float]:
    """The control scalars of config.sampling.control; an unset size is that of the pictures."""
    values = dataclasses.asdict(config.sampling.control)
    for side in ("height", "width"):
        values[side] = values[side] or float(config.data.resolution)
    return values


def control_values(
    config: Config, n: int, *, first: int = 0, seen: np.ndarray | None = None
) -> dict[str, np.ndarray]:
    """The control scalars to ask for, of samples first, ..., first + n - 1: {name: (n,) f32}.

    Those of `asked_control`, but for sizes drawn as sampling.size says (Table 2b), sample
    i's from (sampling.seed, i) alone, and the aspect ratio that follows from them. seen (M, 8): the
    training images' control metadata (see `Workdir.control`), for sampling.size=train.
    """
    settings = config.sampling
    values = {
        name: np.full((n,), value, np.float32) for name, value in asked_control(config).items()
    }
    if settings.size == "fixed" or "size" not in config.conditioning.control:
        return values
    if settings.size == "train" and seen is None:
        raise ConfigError(
            "sampling.size",
            "train needs the sizes that a training run stores; use another",
        )
    for i in range(n):
        rng = np.random.default_rng([settings.seed, first + i])
        if settings.size == "train":
            row = dict(zip(SCALARS, seen[rng.integers(len(seen))], strict=True))
            height, width = row["height"], row["width"]
        else:
            height, width = rng.uniform(*settings.size_range, 2)
            width = height if settings.size == "tied" else width
        values["height"][i], values["width"][i] = height, width
    return values | {"aspect": values["width"] / values["height"]}


def requests(
    system: System,
    asked: Sequence[str] | Sequence[int],
    control: dict | None = None,
    *,
    first: int = 0,
    seen: np.ndarray | None = None,
) -> dict:
    """The batch that asks for these prompts (text models) or classes, numbered from `first`.

    control: values instead of `control_values`, to which `first` and `seen` go.
    """
    n = len(asked)
    batch = system.example(n)
    del batch["image"], batch["broken"]
    batch["control"] = control or control_values(system.config, n, first=first, seen=seen)
    if system.text_encoder is None:
        batch["label"] = np.asarray(asked, np.int32)
    else:
        pairs = [system.encode_text(prompt) for prompt in asked]
        batch["ids"], batch["mask"] = (np.stack(part) for part in zip(*pairs, strict=True))
    return batch


class Program(NamedTuple):
    """What a compiled sampler is made for; guidance scales are arguments of it."""

    sampler: str
    steps: int
    spacing: str
    eta: float
    clip: bool
    seed: int
    needed: tuple[bool, bool, bool]  # see `dual_guidance`
    classifier_guide: nn.Module | None = None  # that guides besides

    @classmethod
    def create(
        cls, settings: Sampling, resolution: int, network: nn.Module | None = None
    ) -> tuple[Program, np.ndarray]:
        """Of these settings, and their guidance scales (3,): lambda by Eq. 4, beta of Eq. 2, and
        the weight of the classifier `network`, if there is one.
        """
        scales = guidance_scale(settings, resolution), settings.control_guidance
        fields = (getattr(settings, name) for name in cls._fields[:-2])
        program = cls(*fields, needed_branches(*scales), network)
        return program, np.array([*scales, settings.classifier_guidance], np.float32)


def noise_keys(seed: int, index: jax.Array) -> jax.Array:
    """Keys (B, 2) of the samples with these numbers: of text padding, and of the sampler."""
    keys = jax.vmap(partial(jax.random.fold_in, jax.random.key(seed)))(index)
    return jax.vmap(partial(jax.random.split, num=2))(keys)


def generate(
    params: dict,
    frozen: dict,
    batch: dict,
    index: jax.Array,
    scales: jax.Array,
    *,
    system: System,
    program: Program,
) -> jax.Array:
    """Pictures uint8 (B, R, R, 3) for the requests in `batch`; pure, to be jitted.

    params, frozen: see `System.init` and `System.load_frozen`; frozen also has the parameters of
    program.classifier, "classifier". index (B,) int32: the number of each
    sample; its noise comes from (program.seed, index). scales: see `Program.create`.
    """
    params = {**params, **frozen}
    keys = noise_keys(program.seed, index)
    text_noise = None
    if system.text_encoder is not None:
        shape = (system.config.text_encoder.length, system.config.text_encoder.width)
        text_noise = jax.vmap(partial(jax.random.normal, shape=shape))(keys[:, 0])
    cond = system.condition(params, batch, text_noise)
    denoise, shift = dual_guidance(system.denoise(params), *scales[:2], program.needed), {}
    if program.classifier is not None:
        log_prob = classifier_guide.log_prob(program.classifier, params["classifier"])
        if program.sampler == "ddpm":
            shift = {"gradient": classifier_gradient(log_prob, scales[2])}
        else:
            denoise = classifier_guidance(denoise, log_prob, system.schedule, scales[2])
    x = SAMPLERS[program.sampler](
        denoise,
        system.schedule,
        initial_noise(keys[:, 1], system.latent_shape),
        cond,
        keys[:, 1],
        steps=program.steps,
        spacing=program.spacing,
        eta=program.eta,
        clip=system.autoencoder.bound if program.clip else None,
        **shift,
    )
    return system.autoencoder.decode(params.get("autoencoder"), x)


class Sampler:
    """`generate` for batches of one size spread over a mesh, compiled once a `Program`.

    The classifier that settings name is loaded; ConfigError unless it fits the system.
    """

    def __init__(self, system: System, mesh: Mesh, settings: Sampling, frozen: dict | None = None):
        self.system, self.mesh, self.settings, self.frozen = system, mesh, settings, frozen or {}
        self._load_classifier()
        self.program = jax.jit(
            sharding.traced_on(mesh, partial(generate, system=system)),
            static_argnames="program",
            out_shardings=sharding.replicated(mesh),
        )

    def at(self, config: Config) -> Sampler:
        """The same model sampled as another config's `sampling` says; what is compiled is kept."""
        other = copy.copy(self)
        other.system = dataclasses.replace(self.system, config=config)
        other.settings = config.sampling
        if other.settings.classifier != self.settings.classifier:
            other._load_classifier()
        return other

    def _load_classifier(self) -> None:
        self.frozen = {name: part for name, part in self.frozen.items() if name != "classifier"}
        self.classifier = None
        if self.settings.classifier:
            self.classifier, params = classifier_guide.load(self.system, self.mesh, self.settings)
            self.frozen["classifier"] = params

    def __call__(self, params: dict, batch: dict, *, first: int = 0, label: str = "") -> np.ndarray:
        """Pictures uint8 (N, R, R, 3) for N requests, numbered from `first`."""
        n = len(batch["label"])
        devices = self.mesh.size
        size = -(-min(self.settings.batch_size, n) // devices) * devices
        out = []
        resolution = self.system.config.data.resolution
        program, scales = Program.create(self.settings, resolution, self.classifier)
        starts = tqdm(range(0, n, size), desc=label or "sampling", disable=n <= size, leave=False)
        for start in starts:
            rows = np.arange(start, start + size) % n  # the last part is filled up
            part = jax.tree.map(lambda a, rows=rows: a[rows], batch)
            index = (first + start + np.arange(size)).astype(np.int32)
            part, index = sharding.put_global(self.mesh, (part, index))
            out.append(self.program(params, self.frozen, part, index, scales, program=program))
        return np.concatenate([np.asarray(pictures) for pictures in out])[:n]


def asked_for(config: Config, system: System) -> list[str] | list[int]:
    """The prompts or classes that config.sampling names, repeated or cut to sampling.n."""
    settings = config.sampling
    if system.text_encoder is None:
        classes = len(system.vocabulary.classes)
        for label in settings.labels:
            if not 0 <= label < classes:
                raise ConfigError(
                    "sampling.labels",
                    f"must be between 0 and {classes - 1}, got {label}",
                )
        asked = list(settings.labels or range(classes))
    else:
        asked = [prompt.strip() for prompt in settings.prompts.split(";") if prompt.strip()]
        if settings.prompt_file:
            asked += read_prompts(settings.prompt_file)
        if not asked:
            raise ConfigError(
                "sampling.prompts",
                'is empty; set it to "one; another", or set sampling.prompt_file',
            )
    return [asked[i % len(asked)] for i in range(settings.n)]


def read_prompts(path: str) -> list[str]:
    """The non-empty lines of a text file."""
    file = epath.Path(path)
    if not file.exists():
        raise ConfigError("sampling.prompt_file", f"{path} does not exist")
    try:
        lines = file.read_text().splitlines()
    except UnicodeDecodeError:
        raise ConfigError("sampling.prompt_file", f"{path} is not a UTF-8 text") from None
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise ConfigError("sampling.prompt_file", f"{path} is empty; write a prompt a line")
    return prompts


def titles(system: System, asked: Sequence[str] | Sequence[int]) -> list[str]:
    """What to write under the pictures."""
    if system.text_encoder is None:
        return [system.vocabulary.classes[label] for label in asked]
    return list(asked)


def run(config: Config, workdir: str) -> epath.Path:
    """Mode `sample`: PNGs and a grid from the newest checkpoint; returns the folder."""
    folder = Workdir(workdir)
    folder.check(config)
    mesh = sharding.create_mesh(config.parallel.fsdp)
    system = create_system(config, folder.load_vocabulary())
    asked = asked_for(config, system)
    step, params = Checkpoints(folder.checkpoints, config).restore_params(
        system, mesh, ema=config.sampling.ema
    )
    frozen = sharding.put(mesh, folder.load_frozen(system))
    sampler = Sampler(system, mesh, config.sampling, frozen)
    pictures = sampler(params, requests(system, asked, seen=folder.load_control()))
    out = folder.samples / f"{step}-seed{config.sampling.seed}"
    if jax.process_index() == 0:
        out.mkdir(parents=True, exist_ok=True)
        save_pictures(out, pictures, titles(system, asked))
        print(f"{len(pictures)} pictures of step {step} and grid.png in {out}")
    return out


def save_pictures(out: epath.Path, pictures: np.ndarray, captions: Sequence[str]) -> None:
    """000000.png, 000001.png, ..., captions.txt and grid.png in the folder `out`."""
    for i, picture in enumerate(pictures):
        save_png(out / f"{i:06d}.png", Image.fromarray(picture))
    (out / "captions.txt").write_text("".join(f"{caption}\n" for caption in captions))
    save_png(out / "grid.png", caption_grid(pictures, captions))


def save_png(path: epath.Path, image) -> None:
    """Write a PIL image as PNG, locally or remotely."""
    with path.open("wb") as file:
        image.save(file, format="PNG")
