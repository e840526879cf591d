"""Mode `import`: published denoisers, or our own exports, into a work directory as step 0."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from condiff_jax import optim, state, summary
from condiff_jax.checkpoint import Checkpoints
from condiff_jax.config import Config, ConfigError
from condiff_jax.convert import published, weights
from condiff_jax.convert.layout import from_torch
from condiff_jax.system import System
from condiff_jax.system import create as create_system
from condiff_jax.workdir import Workdir


@dataclasses.dataclass(frozen=True)
class Layout:
    """A published layout: which model it holds, a tensor only it has, and its rules.

    ignore: tensors without learned content, such as tables of positions. note: what else to tell.
    """

    model: str
    sign: str
    rules: Callable[[System], tuple[published.Rule, ...]]
    ignore: str = r"pos_embed(\.pos_embed)?"
    note: str = ""


def _patch(rules: Callable) -> Callable:
    return lambda system: rules(system.model.patch)


def _patch_and_depth(rules: Callable) -> Callable:
    return lambda system: rules(system.model.patch, system.model.depth)


# The first layout whose sign is among the tensors is taken.
LAYOUTS = {
    "sail-sg/MDT": Layout(
        "mdtv2", "en_inblocks.0.attn.qkv.weight", _patch(published.mdtv2), ".*position_index"
    ),
    "facebookresearch/DiT": Layout(
        "dit_ln", "blocks.0.adaLN_modulation.1.weight", _patch(published.facebook_dit)
    ),
    "DiTTransformer2DModel": Layout(
        "dit_ln",
        "transformer_blocks.0.norm1.emb.class_embedder.embedding_table.weight",
        _patch_and_depth(published.diffusers_dit),
        note="timesteps at DiT's frequencies i/128, of which diffusers makes i/127",
    ),
    "PixArtTransformer2DModel": Layout(
        "pixart", "adaln_single.linear.weight", _patch(published.pixart)
    ),
    "SD3Transformer2DModel": Layout(
        "mmdit",
        "transformer_blocks.0.attn.add_q_proj.weight",
        _patch_and_depth(published.sd3),
    ),
    "UNet2DConditionModel": Layout(
        "unet", "down_blocks.0.resnets.0.conv1.weight", lambda _: published.UNET
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


def convert(system: System, tensors: Mapping[str, np.ndarray]) -> tuple[dict, list[str]]:
    """(parameters, messages) from an export of ours or published tensors; ValueError on misfit."""
    if "model.patch_embed.weight" in tensors or "model.conv_in.weight" in tensors:
        kept = {key: a for key, a in tensors.items() if not key.startswith("autoencoder.")}
        return from_torch(kept, system.shapes), ["our own export"]
    model, messages = convert_published(system, tensors)
    params = {"model": model}
    if "text_encoder" in system.shapes:
        fresh = jax.jit(lambda key: system.init(key)["text_encoder"])  # compiles no more than this
        params["text_encoder"] = fresh(jax.random.key(system.config.seed))
        messages.append("the text encoder is new: train it before you sample")
    return params, messages


def convert_published(system: System, tensors: Mapping[str, np.ndarray]) -> tuple[dict, list[str]]:
    """(parameters of the denoiser, messages) from published tensors; ValueError on misfit."""
    name = recognise(tensors, system.config.model.name)
    layout, messages = LAYOUTS[name], [f"layout of {name}"]
    shapes = system.shapes["model"]
    if "control" in shapes:
        raise ValueError(
            "published models know no control metadata; set --config.conditioning.control='()'"
        )
    kept = {key: a for key, a in tensors.items() if not re.fullmatch(layout.ignore, key)}
    ours = published.from_published(kept, layout.rules(system))
    if layout.note:
        messages.append(layout.note)
    if layout.model != "unet":
        if drop_sigma(ours, system.latent_shape[-1], shapes["final"]["bias"].size):
            messages.append("learned variances (half of the final layer's outputs) dropped")
        messages += check_positions(system, tensors)
    return from_torch(ours, shapes), messages


def check_positions(system: System, tensors: Mapping[str, np.ndarray]) -> list[str]:
    """A message on the fixed positions; ValueError where ours would differ from published ones."""
    if "positions" in system.shapes["model"]:
        return []
    if system.config.model.position != "extrapolate":
        raise ValueError(
            "published models count positions 0, 1, 2, ...; set --config.model.position=extrapolate"
        )
    table = tensors.get("pos_embed")
    if table is None:
        return ["positions not stored; counted 0, 1, 2, ..."]
    ours = system.model.positions(np.zeros((1, *system.latent_shape)))
    if table[0].shape != ours.shape or np.abs(table[0] - ours).max() > 1e-3:
        raise ValueError(f"pos_embed {table.shape} is not the table of {ours.shape[0]} tokens")
    return ["positions as stored"]


def run(config: Config, workdir: str) -> None:
    """Mode `import`: `convert.source` becomes step 0 of a new work directory."""
    source = config.convert.source
    if not source:
        raise ConfigError("config: convert.source is empty; name a file, a folder or a hub id")
    folder = Workdir(workdir)
    if folder.config.exists():
        raise ConfigError(f"{workdir}: there is a run here already; use another --workdir")
    vocabulary = summary.vocabulary(config)
    system = create_system(config, vocabulary)
    try:
        params, messages = convert(system, weights.read(source))
    except (OSError, ValueError) as error:
        raise ConfigError(f"convert.source: {' '.join(str(error).split())}") from error
    params = jax.tree.map(jnp.asarray, params)
    folder.open(config, vocabulary)
    checkpoints = Checkpoints(folder.checkpoints, config, create=True)
    checkpoints.save(0, state.create(params, optim.create(config)), float("inf"))
    checkpoints.close()
    count = summary.count_parameters(params["model"]) / 1e6
    print(f"Imported {source}: {count:.2f} M parameters; " + "; ".join(messages))
