"""Mode `import`: published denoisers, or our own exports, into a work directory as step 0."""

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
from condiff_jax.objectives import summary
from condiff_jax.objectives.diffusion import DiffusionObjective
from condiff_jax.objectives.diffusion import create as create_system
from condiff_jax.objectives.vocabulary import load_vocabulary
from condiff_jax.pretrained import key_maps, weights
from condiff_jax.pretrained.layout import from_torch
from condiff_jax.pytorch.exporting import scheduler_config
from condiff_jax.runs import optimizer, state
from condiff_jax.runs.checkpoint import Checkpoints
from condiff_jax.runs.workdir import Workdir


@dataclasses.dataclass(frozen=True)
class Layout:
    """A published layout: which model it holds, a tensor only it has, and its rules.

    ignore: tensors without learned content, such as tables of positions. note: what else to tell.
    diffusion: the fields of config.diffusion that all its weights were trained with.
    """

    model: str
    sign: str
    rules: Callable[[DiffusionObjective], tuple[key_maps.Rule, ...]]
    ignore: str = r"pos_embed(\.pos_embed)?"
    note: str = ""
    diffusion: Mapping[str, Any] = dataclasses.field(default_factory=dict)


UNSET = dataclasses.asdict(Diffusion())  # what a config has where nobody chose
# arXiv:2006.11239, Sec. 4, which DiT, MDT and PixArt took over.
DDPM = UNSET | {"schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02}


def _patch(rules: Callable) -> Callable:
    return lambda objective: rules(objective.model.patch)


def _patch_and_depth(rules: Callable) -> Callable:
    return lambda objective: rules(objective.model.patch, objective.model.depth)


# The first layout whose sign is among the tensors is taken.
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
        note="timesteps at DiT's frequencies i/128, of which diffusers makes i/127",
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
        note="noise levels and prediction are the config's; compare them with the original's",
    ),
}


def recognise(tensors: Mapping[str, np.ndarray], model: str) -> str:
    """Name of the layout; ValueError when there is none, or when it holds another model."""
    for name, layout in LAYOUTS.items():
        if layout.sign in tensors:
            if layout.model != model:
                raise ValueError(f"the weights are {name}'s; set model.name={layout.model}")
            return name
    known = ", ".join(LAYOUTS)
    raise ValueError(f"the layout of {next(iter(tensors), 'no tensors')}... is none of {known}")


def drop_sigma(tensors: dict[str, np.ndarray], channels: int, outputs: int) -> bool:
    """Halve a final layer with twice the outputs, which also predicts variances; True if it did.

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
    """Whether the tensors are an export of ours."""
    return "model.patch_embed.weight" in tensors or "model.conv_in.weight" in tensors


def with_schedule(
    config: Config, tensors: Mapping[str, np.ndarray], chosen: Container[str] = ()
) -> tuple[Config, list[str]]:
    """(config with the noise levels that published tensors were trained with, messages).

    ValueError where the config says otherwise: by a value that is not the default, or by any in a
    field that was `chosen`, such as "diffusion.schedule".
    """
    name = None if is_export(tensors) else recognise(tensors, config.model.name)
    trained = LAYOUTS[name].diffusion if name else {}
    if not trained:
        return config, []
    flags = " ".join(
        f"--config.diffusion.{field}={value}"
        for field, value in trained.items()
        if value != UNSET[field]
    )
    for field, value in trained.items():
        found = getattr(config.diffusion, field)
        if found != value and (found != UNSET[field] or f"diffusion.{field}" in chosen):
            raise ValueError(
                f"{name} was trained with diffusion.{field}={value}, not {found}; leave "
                f"diffusion.* at its defaults, or set {flags}"
            )
    config = with_fields(config, {f"diffusion.{name}": value for name, value in trained.items()})
    diffusion = config.diffusion
    message = (
        f"noise levels as it was trained with: {diffusion.schedule}, beta {diffusion.beta_start} "
        f"to {diffusion.beta_end}, in config.json; commands with --config then need {flags}"
    )
    return config, [message]


def check_schedule(objective: DiffusionObjective, source: str) -> None:
    """ValueError where an export of ours, a folder, was trained with other noise levels."""
    path = epath.Path(source) / "scheduler" / "scheduler_config.json"
    if not path.exists():
        return
    theirs, expected = json.loads(path.read_text()), scheduler_config(objective)
    same = np.shape(theirs["trained_betas"]) == np.shape(expected["trained_betas"])
    if not same or not np.allclose(theirs["trained_betas"], expected["trained_betas"], rtol=1e-6):
        raise ValueError(
            "the exported model was trained with other noise levels; set --config.diffusion.* "
            "(schedule, beta_start, beta_end, timesteps, base_resolution) as its run had them"
        )
    if theirs["prediction_type"] != expected["prediction_type"]:
        raise ValueError(
            f"the exported model predicts {theirs['prediction_type']}; set "
            "--config.diffusion.prediction as its run had it"
        )


def convert(
    objective: DiffusionObjective, tensors: Mapping[str, np.ndarray]
) -> tuple[dict, list[str]]:
    """(parameters, messages) from an export of ours or published tensors; ValueError on misfit."""
    if is_export(tensors):
        kept = {key: a for key, a in tensors.items() if not key.startswith("autoencoder.")}
        return from_torch(kept, objective.shapes), ["our own export"]
    model, messages = convert_published(objective, tensors)
    params = {"model": model}
    if "text_encoder" in objective.shapes:
        fresh = jax.jit(
            lambda key: objective.init(key)["text_encoder"]
        )  # compiles no more than this
        params["text_encoder"] = fresh(jax.random.key(objective.config.seed))
        messages.append("the text encoder is new: train it before you sample")
    return params, messages


def convert_published(
    objective: DiffusionObjective, tensors: Mapping[str, np.ndarray]
) -> tuple[dict, list[str]]:
    """(parameters of the denoiser, messages) from published tensors; ValueError on misfit."""
    name = recognise(tensors, objective.config.model.name)
    layout, messages = LAYOUTS[name], [f"layout of {name}"]
    shapes = objective.shapes["model"]
    if "control" in shapes:
        raise ValueError(
            "published models know no control metadata; set --config.conditioning.control='()'"
        )
    kept = {key: a for key, a in tensors.items() if not re.fullmatch(layout.ignore, key)}
    renamed = key_maps.from_published(kept, layout.rules(objective))
    if layout.note:
        messages.append(layout.note)
    if layout.model != "unet":
        if drop_sigma(renamed, objective.latent_shape[-1], shapes["final"]["bias"].size):
            messages.append("learned variances (half of the final layer's outputs) dropped")
        messages += check_positions(objective, tensors)
    return from_torch(renamed, shapes), messages


def check_positions(objective: DiffusionObjective, tensors: Mapping[str, np.ndarray]) -> list[str]:
    """A message on the fixed positions; ValueError where ours would differ from published ones."""
    if "positions" in objective.shapes["model"]:
        return []
    if objective.config.model.position != "extrapolate":
        raise ValueError(
            "published models count positions 0, 1, 2, ...; set --config.model.position=extrapolate"
        )
    table = tensors.get("pos_embed")
    if table is None:
        return ["positions not stored; counted 0, 1, 2, ..."]
    ours = objective.model.positions(np.zeros((1, *objective.latent_shape)))
    if table[0].shape != ours.shape or np.abs(table[0] - ours).max() > 1e-3:
        raise ValueError(f"pos_embed {table.shape} is not the table of {ours.shape[0]} tokens")
    return ["positions as stored"]


def run(config: Config, workdir: str, chosen: Container[str] = ()) -> None:
    """Mode `import`: `convert.source` becomes step 0 of a new work directory.

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
        objective = create_system(config, vocabulary)
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
