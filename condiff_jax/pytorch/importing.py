"""Mode `import`: write a published denoiser or an export as step 0 of a new work directory."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Container, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from condiff_jax.config.build import with_fields
from condiff_jax.config.errors import ConfigError, one_line
from condiff_jax.config.schema import Config, Diffusion
from condiff_jax.objectives import diffusion, summary
from condiff_jax.objectives.diffusion import DiffusionObjective
from condiff_jax.objectives.vocabulary import load_vocabulary
from condiff_jax.pretrained import key_maps, weights
from condiff_jax.pretrained.layout import from_torch
from condiff_jax.pytorch.exporting import scheduler_config
from condiff_jax.runs import optimizer, state
from condiff_jax.runs.checkpoint import Checkpoints
from condiff_jax.runs.workdir import Workdir


@dataclasses.dataclass(frozen=True)
class Layout:
    """A published layout of tensors.

    model: the architecture. key: a tensor that only this layout has. rules: from its names to ours.
    ignore: pattern of tensors that were not learned, such as position tables. note: message for the
    user. diffusion: the fields of config.diffusion that all its weights were trained with.
    """

    model: str
    key: str
    rules: Callable[[DiffusionObjective], tuple[key_maps.Rule, ...]]
    ignore: str = r"pos_embed(\.pos_embed)?"
    note: str = ""
    diffusion: Mapping[str, Any] = dataclasses.field(default_factory=dict)


DEFAULTS = dataclasses.asdict(Diffusion())
# arXiv:2006.11239, Sec. 4; DiT, MDT and PixArt use the same noise levels.
DDPM = DEFAULTS | {"schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02}


def _patch(rules: Callable) -> Callable:
    return lambda objective: rules(objective.model.patch)


def _patch_and_depth(rules: Callable) -> Callable:
    return lambda objective: rules(objective.model.patch, objective.model.depth)


# The first layout whose key is among the tensors is used.
LAYOUTS = {
    "sail-sg/MDT": Layout(
        "mdtv2",
        "en_inblocks.0.attn.qkv.weight",
        _patch(key_maps.mdtv2),
        ".*position_index",
        diffusion=DDPM,
    ),
    "facebookresearch/DiT": Layout(
        "dit_ln",
        "blocks.0.adaLN_modulation.1.weight",
        _patch(key_maps.facebook_dit),
        diffusion=DDPM,
    ),
    "DiTTransformer2DModel": Layout(
        "dit_ln",
        "transformer_blocks.0.norm1.emb.class_embedder.embedding_table.weight",
        _patch_and_depth(key_maps.diffusers_dit),
        note="timestep frequencies are DiT's, i/128; those of diffusers are i/127",
        diffusion=DDPM,
    ),
    "PixArtTransformer2DModel": Layout(
        "pixart", "adaln_single.linear.weight", _patch(key_maps.pixart), diffusion=DDPM
    ),
    "SD3Transformer2DModel": Layout(
        "mmdit",
        "transformer_blocks.0.attn.add_q_proj.weight",
        _patch_and_depth(key_maps.sd3),
        note="SD3 was trained as a rectified flow, not with our noise levels: fine-tune it first",
    ),
    "UNet2DConditionModel": Layout(
        "unet",
        "down_blocks.0.resnets.0.conv1.weight",
        lambda _: key_maps.UNET,
        note="noise levels and prediction are the config's; check that they are the original's",
    ),
}


def recognize(tensors: Mapping[str, np.ndarray], model: str) -> str:
    """Name of the tensors' layout; ValueError if it is unknown or of another model."""
    for name, layout in LAYOUTS.items():
        if layout.key in tensors:
            if layout.model != model:
                raise ValueError(f"the weights are {name}'s; set model.name={layout.model}")
            return name
    known = ", ".join(LAYOUTS)
    raise ValueError(f"the layout of tensor {next(iter(tensors), '(none)')} is none of {known}")


def drop_sigma(tensors: dict[str, np.ndarray], channels: int, outputs: int) -> bool:
    """Remove the outputs of variances from the final layer in place; returns whether it had them.

    Its outputs are (patch, patch, 2 C) per token, epsilon first.
    """
    names = ("final.weight", "final.bias")
    if any(len(tensors.get(name, ())) != 2 * outputs for name in names):
        return False
    for name in names:
        array = tensors[name].reshape(-1, 2 * channels, *tensors[name].shape[1:])
        tensors[name] = array[:, :channels].reshape(outputs, *array.shape[2:])
    return True


def is_export(tensors: Mapping[str, np.ndarray]) -> bool:
    """Whether the tensors were written by mode export."""
    return "model.patch_embed.weight" in tensors or "model.conv_in.weight" in tensors


def with_schedule(
    config: Config, tensors: Mapping[str, np.ndarray], chosen: Container[str] = ()
) -> tuple[Config, list[str]]:
    """Return (config with the noise levels that published tensors were trained with, messages).

    ValueError if the config has another value that is not the default, or another value in a field
    that was `chosen` on the command line, such as "diffusion.schedule".
    """
    name = None if is_export(tensors) else recognize(tensors, config.model.name)
    trained = LAYOUTS[name].diffusion if name else {}
    if not trained:
        return config, []
    flags = " ".join(
        f"--config.diffusion.{field}={value}"
        for field, value in trained.items()
        if value != DEFAULTS[field]
    )
    for field, value in trained.items():
        current = getattr(config.diffusion, field)
        is_set = current != DEFAULTS[field] or f"diffusion.{field}" in chosen
        if current != value and is_set:
            raise ValueError(
                f"{name} was trained with diffusion.{field}={value}, not {current}; leave "
                f"diffusion.* at its defaults, or set {flags}"
            )
    config = with_fields(config, {f"diffusion.{field}": value for field, value in trained.items()})
    levels = config.diffusion
    message = (
        f"config.json has the noise levels of its training: {levels.schedule}, beta "
        f"{levels.beta_start} to {levels.beta_end}; commands with --config then need {flags}"
    )
    return config, [message]


def check_schedule(objective: DiffusionObjective, source: str) -> None:
    """Raise ValueError if an exported folder was trained with other noise levels."""
    path = epath.Path(source) / "scheduler" / "scheduler_config.json"
    if not path.exists():
        return
    exported = json.loads(path.read_text())
    expected = scheduler_config(objective)
    betas, expected_betas = exported["trained_betas"], expected["trained_betas"]
    same = np.shape(betas) == np.shape(expected_betas)
    if not same or not np.allclose(betas, expected_betas, rtol=1e-6):
        raise ValueError(
            "the exported model was trained with other noise levels; set --config.diffusion.* "
            "(schedule, beta_start, beta_end, timesteps, base_resolution) as its run had them"
        )
    if exported["prediction_type"] != expected["prediction_type"]:
        raise ValueError(
            f"the exported model predicts {exported['prediction_type']}; set "
            "--config.diffusion.prediction as its run had it"
        )


def convert(
    objective: DiffusionObjective, tensors: Mapping[str, np.ndarray]
) -> tuple[dict, list[str]]:
    """Return (parameters, messages) for exported or published tensors; ValueError on a mismatch."""
    if is_export(tensors):
        trained = {key: a for key, a in tensors.items() if not key.startswith("autoencoder.")}
        return from_torch(trained, objective.shapes), ["written by mode export"]
    model, messages = convert_published(objective, tensors)
    params = {"model": model}
    if "text_encoder" in objective.shapes:
        # Under jit, the other parameters are neither compiled nor computed.
        init = jax.jit(lambda key: objective.init(key)["text_encoder"])
        params["text_encoder"] = init(jax.random.key(objective.config.seed))
        messages.append("the text encoder is new: train it before you sample")
    return params, messages


def convert_published(
    objective: DiffusionObjective, tensors: Mapping[str, np.ndarray]
) -> tuple[dict, list[str]]:
    """Return (denoiser parameters, messages) for published tensors; ValueError on a mismatch."""
    name = recognize(tensors, objective.config.model.name)
    layout, messages = LAYOUTS[name], [f"layout of {name}"]
    shapes = objective.shapes["model"]
    if "control" in shapes:
        raise ValueError(
            "published models have no control metadata; set --config.conditioning.control='()'"
        )
    learned = {key: a for key, a in tensors.items() if not re.fullmatch(layout.ignore, key)}
    renamed = key_maps.from_published(learned, layout.rules(objective))
    if layout.note:
        messages.append(layout.note)
    if layout.model != "unet":
        if drop_sigma(renamed, objective.latent_shape[-1], shapes["final"]["bias"].size):
            messages.append("learned variances (half of the final layer's outputs) dropped")
        messages += check_positions(objective, tensors)
    return from_torch(renamed, shapes), messages


def check_positions(objective: DiffusionObjective, tensors: Mapping[str, np.ndarray]) -> list[str]:
    """Return a message on fixed positions; ValueError if ours differ from the published ones."""
    if "positions" in objective.shapes["model"]:
        return []
    if objective.config.model.position != "extrapolate":
        raise ValueError(
            "published models count positions 0, 1, 2, ...; set --config.model.position=extrapolate"
        )
    table = tensors.get("pos_embed")
    if table is None:
        return ["positions not stored; counted 0, 1, 2, ..."]
    expected = objective.model.positions(np.zeros((1, *objective.latent_shape)))
    if table[0].shape != expected.shape or np.abs(table[0] - expected).max() > 1e-3:
        raise ValueError(f"pos_embed {table.shape} is not the table of {expected.shape[0]} tokens")
    return ["positions as stored"]


def run(config: Config, workdir: str, chosen: Container[str] = ()) -> None:
    """Write the weights in `convert.source` as step 0 of a new work directory.

    chosen: the fields given on the command line.
    """
    source = config.convert.source
    if not source:
        raise ConfigError("convert.source", "empty; name a file, a folder or a hub id")
    folder = Workdir(workdir)
    if folder.config.exists():
        raise ConfigError("--workdir", f"{workdir} has a run already; use another folder")
    vocabulary = load_vocabulary(config)
    try:
        tensors = weights.read(source)
        config, notes = with_schedule(config, tensors, chosen)
        objective = diffusion.create(config, vocabulary)
        if is_export(tensors):
            check_schedule(objective, source)
        params, messages = convert(objective, tensors)
    except (OSError, ValueError) as error:
        raise ConfigError("convert.source", one_line(error)) from error
    params = jax.tree.map(jnp.asarray, params)
    folder.open(config, vocabulary)
    checkpoints = Checkpoints(folder.checkpoints, config, create=True)
    checkpoints.save(0, state.create(params, optimizer.create(config)), float("inf"))
    checkpoints.close()
    count = summary.count_parameters(params["model"]) / 1e6
    print(f"Imported {source}: {count:.2f} M parameters; " + "; ".join(messages + notes))
