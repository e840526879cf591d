"""Mode `export`: write a trained run as a folder for PyTorch and, where possible, for diffusers.

export/STEP/                  a diffusers pipeline: DiffusionPipeline.from_pretrained(...)
  pipeline.py  model_index.json  scheduler/
  network/                    for `models.load`, which needs torch and safetensors only
    models.py  config.json  model.safetensors
  diffusers/                  the denoiser as a diffusers model, if diffusers has the architecture
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from etils import epath

from condiff_jax import runs
from condiff_jax.conditioning.control import SCALARS
from condiff_jax.conditioning.text import PADDINGS
from condiff_jax.config.errors import ConfigError
from condiff_jax.config.schema import Config
from condiff_jax.models.autoencoder import Latents
from condiff_jax.models.mdt import MDT
from condiff_jax.models.mmdit import MMDiT
from condiff_jax.models.text_encoder import WordEmbedding
from condiff_jax.models.transformer import Transformer
from condiff_jax.models.unet import UNet
from condiff_jax.objectives.diffusion import DiffusionObjective
from condiff_jax.pretrained import key_maps
from condiff_jax.pretrained.layout import to_torch
from condiff_jax.pretrained.weights import write_json, write_tensors
from condiff_jax.runtime import sharding
from condiff_jax.sampling.requests import asked_control, guidance_scale

HERE = epath.Path(__file__).parent


def denoiser_config(objective: DiffusionObjective) -> dict[str, Any]:
    """Arguments of `models.create` for the denoiser."""
    config, model = objective.config, objective.model
    out = {
        "architecture": config.model.name,
        "channels": objective.latent_shape[-1],
        "classes": model.classes,
        "qk_norm": model.qk_norm,
        "high": len(objective.control.high),
        "low": len(objective.control.low),
        "weighting": np.asarray(model.weighting(np.arange(model.weighting.timesteps))).tolist(),
    }
    if objective.text_encoder is not None:
        out["text_width"] = config.text_encoder.width
    if isinstance(model, UNet):
        return {**out, "size": dataclasses.asdict(model.size)}
    for field in ("depth", "width", "heads", "patch", "base_grid", "position"):
        out[field] = getattr(model, field)
    if isinstance(model, MMDiT):
        out["streams"] = model.streams
        if model.pooled and objective.text_encoder is not None:
            out["pooled_width"] = config.text_encoder.width
    if isinstance(model, MDT):
        out["grid"] = objective.latent_shape[0] // model.patch
    return out


def network_config(objective: DiffusionObjective, frozen: dict) -> dict[str, Any]:
    """Contents of network/config.json: arguments of each module, and settings for sampling."""
    config, space = objective.config, objective.autoencoder
    height, width, channels = objective.latent_shape
    out = {"model": denoiser_config(objective)}
    if isinstance(objective.text_encoder, WordEmbedding):
        out["text_encoder"] = {
            "architecture": "words",
            "vocabulary": objective.text_encoder.vocabulary,
            "width": config.text_encoder.width,
            "length": config.text_encoder.length,
        }
    if "autoencoder" in frozen:
        size = dataclasses.asdict(space.network.size)
        out["autoencoder"] = {"architecture": "kl", "size": size}
    control = asked_control(config)
    out["settings"] = {
        "shape": [channels, height, width],
        "scale": space.scale,
        "shift": space.shift,
        "classes": list(objective.vocabulary.classes),
        "steps": config.sampling.steps,
        "guidance": guidance_scale(config.sampling, config.data.resolution),
        "control_guidance": config.sampling.control_guidance,
        "high": list(objective.control.high),
        "low": list(objective.control.low),
        "control_scale": {name: SCALARS[name].scale for name in control},
        "control": control,
    }
    if isinstance(objective.text_encoder, WordEmbedding):
        words = objective.vocabulary.tokenizer.get_vocab()
        out["settings"]["words"] = sorted(words, key=words.get)
    elif objective.text_encoder is not None:
        out["settings"]["clip"] = objective.text_encoder.name
    if objective.text_encoder is not None:
        out["settings"] |= {
            "text_shape": [config.text_encoder.length, config.text_encoder.width],
            "padding": config.conditioning.padding,
            "beta_txt": config.conditioning.beta_txt,
        }
    return out


def scheduler_config(objective: DiffusionObjective) -> dict[str, Any]:
    """Contents of scheduler_config.json for diffusers' DDIMScheduler, with the betas of Eq. 3."""
    alpha_bar = np.asarray(objective.schedule.alpha_bar, np.float64)
    betas = 1 - alpha_bar / np.concatenate([[1.0], alpha_bar[:-1]])
    settings, bound = objective.config.sampling, objective.autoencoder.bound
    clip = settings.clip and bound is not None
    kinds = {"epsilon": "epsilon", "v": "v_prediction"}
    return {
        "_class_name": "DDIMScheduler",
        "num_train_timesteps": objective.schedule.timesteps,
        "trained_betas": betas.tolist(),
        "prediction_type": kinds[objective.config.diffusion.prediction],
        "timestep_spacing": settings.spacing,
        "clip_sample": clip,
        "clip_sample_range": float(bound) if clip else 1.0,
        "set_alpha_to_one": True,
        "steps_offset": 0,
    }


@dataclasses.dataclass(frozen=True)
class Diffusers:
    """A denoiser as a diffusers model: class name, config.json, and key rules of its layout.

    extra: tensors that are no parameters of ours, by name.
    """

    name: str
    config: dict[str, Any]
    rules: tuple[key_maps.Rule, ...]
    extra: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)


def for_diffusers(objective: DiffusionObjective) -> Diffusers:
    """Describe the denoiser as a diffusers model; ValueError if diffusers has no such model."""
    config, model = objective.config, objective.model
    if config.conditioning.control:
        raise ValueError("diffusers' models have no control metadata")
    builders: dict[str, Callable] = {"pixart": _pixart, "mmdit": _sd3, "unet": _unet}
    if config.model.name == "dit_ln":
        raise ValueError(
            "the timestep frequencies of diffusers' DiT are i/127, those of DiT and ours i/128"
        )
    if config.model.name not in builders:
        raise ValueError(f"diffusers has no {config.model.name}")
    if model.classes is not None:
        raise ValueError(f"diffusers' {config.model.name} has no classes")
    return builders[config.model.name](objective)


def _transformer(objective: DiffusionObjective) -> dict[str, Any]:
    side, _, channels = objective.latent_shape
    model: Transformer = objective.model
    return {
        "sample_size": side,
        "patch_size": model.patch,
        "in_channels": channels,
        "out_channels": channels,
        "num_layers": model.depth,
        "num_attention_heads": model.heads,
        "attention_head_dim": model.width // model.heads,
    }


def _pixart(objective: DiffusionObjective) -> Diffusers:
    model: Transformer = objective.model
    if model.qk_norm:
        raise ValueError("diffusers' PixArt does not normalize queries and keys (model.qk_norm)")
    grid = objective.latent_shape[0] // model.patch
    # diffusers divides arange(grid) by a scale; resample is linspace(0, base, grid).
    resample = model.position == "resample"
    config = {
        **_transformer(objective),
        "cross_attention_dim": model.width,
        "caption_channels": objective.config.text_encoder.width,
        "norm_eps": 1e-6,
        "use_additional_conditions": False,
        "interpolation_scale": (grid - 1) / model.base_grid if resample else 1,
    }
    return Diffusers("PixArtTransformer2DModel", config, key_maps.pixart(model.patch))


def _sd3(objective: DiffusionObjective) -> Diffusers:
    model: MMDiT = objective.model
    if model.streams != "full":
        raise ValueError("diffusers' mmDiT has two full streams (model.streams=full)")
    width = objective.config.text_encoder.width
    config = {
        **_transformer(objective),
        "joint_attention_dim": width,
        "caption_projection_dim": model.width,
        "pooled_projection_dim": width,
        "pos_embed_max_size": objective.latent_shape[0] // model.patch,
        "qk_norm": "rms_norm" if model.qk_norm else None,
    }
    positions = model.positions(np.zeros((1, *objective.latent_shape)))
    rules = key_maps.sd3(model.patch, model.depth)
    extra = {"pos_embed.pos_embed": positions[None]}
    return Diffusers("SD3Transformer2DModel", config, rules, extra)


def _unet(objective: DiffusionObjective) -> Diffusers:
    model: UNet = objective.model
    if model.qk_norm:
        raise ValueError("diffusers' UNet does not normalize queries and keys (model.qk_norm)")
    size = model.size
    side, _, channels = objective.latent_shape
    down = ["CrossAttnDownBlock2D" if a else "DownBlock2D" for a in size.attention]
    up = ["CrossAttnUpBlock2D" if a else "UpBlock2D" for a in size.attention[::-1]]
    config = {
        "sample_size": side,
        "in_channels": channels,
        "out_channels": channels,
        "block_out_channels": list(size.channels),
        "layers_per_block": size.resnets,
        "norm_num_groups": size.groups,
        "cross_attention_dim": objective.config.text_encoder.width,
        "attention_head_dim": [
            size.heads_at(width) for width in size.channels
        ],  # heads, despite the name
        "down_block_types": down,
        "up_block_types": up,
    }
    return Diffusers("UNet2DConditionModel", config, key_maps.UNET)


def export(objective: DiffusionObjective, params: dict, frozen: dict, out: epath.Path) -> list[str]:
    """Write the folder; returns messages for the user.

    params: the trained parameters. frozen: {"autoencoder": its parameters}, or {} for pixels or to
    leave it out. CLIP is not written: the pipeline loads it by name with transformers.
    """
    tree = {**params, **frozen}
    network = out / "network"
    write_json(network / "config.json", network_config(objective, frozen))
    write_tensors(network / "model.safetensors", to_torch(tree))
    (HERE / "models.py").copy(network / "models.py", overwrite=True)
    (HERE / "pipeline.py").copy(out / "pipeline.py", overwrite=True)
    scheduler = scheduler_config(objective)
    write_json(out / "scheduler" / "scheduler_config.json", scheduler)
    index = {
        "_class_name": ["pipeline", "ConditionedPipeline"],
        "network": ["models", "Network"],
        "scheduler": ["diffusers", "DDIMScheduler"],
    }
    write_json(out / "model_index.json", index)
    try:
        model = for_diffusers(objective)
    except ValueError as error:
        return [f"no folder of a diffusers model: {error}"]
    folder = out / "diffusers"
    tensors = key_maps.to_published(to_torch(params["model"]), model.rules) | model.extra
    write_json(folder / "config.json", {"_class_name": model.name, **model.config})
    write_tensors(folder / "diffusion_pytorch_model.safetensors", tensors)
    write_json(folder / "scheduler" / "scheduler_config.json", scheduler)
    return [f"diffusers: {model.name} in {folder}"]


def run(config: Config, workdir: str) -> epath.Path:
    """Export the newest checkpoint to export/STEP or export/STEP-raw; returns that folder."""
    if config.model.name == "unet2d":  # its conditioners are defined by users
        raise ConfigError("model.name", "unet2d has no PyTorch model to export to")
    padding = config.conditioning.padding
    if config.data.semantics == "text" and not PADDINGS[padding].pytorch:
        raise ConfigError(
            "conditioning.padding",
            f"{padding} is missing in PyTorch; add it to PADDINGS in condiff_jax/pytorch/models.py "
            "and set pytorch=True in its entry of conditioning.PADDINGS",
        )
    if jax.process_count() > 1:
        raise ConfigError("--processes", "mode export runs in one process")
    trained = runs.load(workdir, config, ema=not config.convert.raw, mesh=sharding.create_mesh())
    objective = trained.objective
    suffix = "-raw" if config.convert.raw else ""
    out = trained.folder.path / "export" / f"{trained.step}{suffix}"
    left_out = ""  # why the autoencoder is not exported
    if isinstance(objective.autoencoder, Latents):
        if not config.autoencoder.path:
            left_out = "autoencoder.path is empty"
        elif config.autoencoder.name == "vq":
            left_out = "network/ has no VQModel; diffusers reads the one in autoencoder.path"
    skipped = {"text_encoder", "autoencoder"} if left_out else {"text_encoder"}
    frozen = trained.folder.load_frozen(objective, skipped)
    messages = export(objective, jax.device_get(trained.params), frozen, out)
    if left_out:
        messages.append(f"no autoencoder, as {left_out}; samples are latents")
    if "text_encoder" in objective.frozen:
        messages.append(f"CLIP is not included; the pipeline loads {objective.text_encoder.name}")
    print(
        f"Step {trained.step} for PyTorch in {out}\n" + "\n".join(f"  {line}" for line in messages)
    )
    return out
