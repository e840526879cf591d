"""Conditioning inputs of samples: prompts or labels, control metadata, guidance scale."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from etils import epath

from condiff_jax.conditioning.control import SCALARS, scalar_names
from condiff_jax.config.errors import ConfigError
from condiff_jax.config.schema import Config, Sampling
from condiff_jax.diffusion.guidance import scaled_guidance
from condiff_jax.objectives.diffusion import DiffusionObjective


def guidance_scale(settings: Sampling, resolution: int) -> float:
    """Return lambda of Eq. 2 at a resolution (pixels), scaled by Eq. 4 from its base resolution."""
    if not settings.base_resolution:
        return settings.guidance
    return scaled_guidance(settings.guidance, resolution / settings.base_resolution)


def asked_control(config: Config) -> dict[str, float]:
    """The control scalars to sample with: config.sampling.control, or a scalar's default.

    An unset height or width is that of the images.
    """
    values = {
        name: getattr(config.sampling.control, name, SCALARS[name].default)
        for name in scalar_names(bool(config.data.color))
    }
    for side in ("height", "width"):
        values[side] = values[side] or float(config.data.resolution)
    return values


def control_values(
    config: Config, n: int, *, first: int = 0, seen: np.ndarray | None = None
) -> dict[str, np.ndarray]:
    """The control scalars to ask for, of samples first, ..., first + n - 1: {name: (n,) f32}.

    Those of `asked_control`, but for sizes drawn as sampling.size says (Table 2b), sample
    i's from (sampling.seed, i) alone, and the aspect ratio that follows from them. seen (M, S): the
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
            row = dict(zip(values, seen[rng.integers(len(seen))], strict=True))
            height, width = row["height"], row["width"]
        else:
            height, width = rng.uniform(*settings.size_range, 2)
            width = height if settings.size == "tied" else width
        values["height"][i], values["width"][i] = height, width
    return values | {"aspect": values["width"] / values["height"]}


def create_batch(
    objective: DiffusionObjective,
    prompts: Sequence[str] | Sequence[int],
    control: dict | None = None,
    *,
    first: int = 0,
    seen: np.ndarray | None = None,
) -> dict:
    """Create the batch of conditioning inputs of samples first, first + 1, ...

    prompts: of text models; class labels for class models. control: scalars {name: (n,) f32}, by
    default `control_values`, to which `first` and `seen` are passed.
    """
    n = len(prompts)
    batch = objective.example(n)
    del batch["image"], batch["broken"]
    batch["control"] = control or control_values(objective.config, n, first=first, seen=seen)
    if objective.text_encoder is None:
        batch["label"] = np.asarray(prompts, np.int32)
    else:
        pairs = [objective.encode_text(prompt) for prompt in prompts]
        batch["ids"], batch["mask"] = (np.stack(arrays) for arrays in zip(*pairs, strict=True))
    return batch


def prompts_or_labels(config: Config, objective: DiffusionObjective) -> list[str] | list[int]:
    """Return the prompts or class labels of config.sampling, repeated or cut to sampling.n.

    ConfigError for labels that are no classes, or without any prompt.
    """
    settings = config.sampling
    if objective.text_encoder is None:
        classes = len(objective.vocabulary.classes)
        for label in settings.labels:
            if not 0 <= label < classes:
                raise ConfigError(
                    "sampling.labels",
                    f"must be between 0 and {classes - 1}, got {label}",
                )
        prompts = list(settings.labels or range(classes))
    else:
        prompts = [prompt.strip() for prompt in settings.prompts.split(";") if prompt.strip()]
        if settings.prompt_file:
            prompts += read_prompts(settings.prompt_file)
        if not prompts:
            raise ConfigError(
                "sampling.prompts",
                'empty; set it to "one; another", or set sampling.prompt_file',
            )
    return [prompts[i % len(prompts)] for i in range(settings.n)]


def read_prompts(path: str) -> list[str]:
    """Read the non-empty lines of a UTF-8 text file; ConfigError where it has none."""
    file = epath.Path(path)
    if not file.exists():
        raise ConfigError("sampling.prompt_file", f"{path} does not exist")
    try:
        lines = file.read_text().splitlines()
    except UnicodeDecodeError:
        raise ConfigError("sampling.prompt_file", f"{path} is not a UTF-8 text") from None
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise ConfigError("sampling.prompt_file", f"{path} is empty; write one prompt per line")
    return prompts


def titles(objective: DiffusionObjective, prompts: Sequence[str] | Sequence[int]) -> list[str]:
    """Return the titles of images in a grid: their prompts, or the class names of labels."""
    if objective.text_encoder is None:
        return [objective.vocabulary.classes[label] for label in prompts]
    return list(prompts)
