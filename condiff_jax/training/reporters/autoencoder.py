"""Reporter of autoencoder training: reconstructions of validation images, and the export."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from tqdm import tqdm

from condiff_jax.data.augment import center
from condiff_jax.data.pipeline import unseen_source
from condiff_jax.models.autoencoder import to_float, to_uint8
from condiff_jax.models.kl import AutoencoderKL
from condiff_jax.objectives.reconstruction import ReconstructionObjective
from condiff_jax.pretrained import key_maps, weights
from condiff_jax.pretrained.layout import to_torch
from condiff_jax.runtime.files import append_json
from condiff_jax.sampling.image_grid import caption_grid
from condiff_jax.training.reporters.base import Log

IMAGES = 256  # number of validation images to measure on
BATCH = 32


def standardize(network: nn.Module, params: dict, shift: np.ndarray, scale: float) -> dict:
    """Change the parameters of an autoencoder so that latents z become (z - shift) * scale.

    shift is (C,). Only the layers next to the latents change. `autoencoder.scale` can stay 1.
    """
    kernel, bias = (np.array(params["quant_conv"][name]) for name in ("kernel", "bias"))
    latent = len(shift)
    kernel[..., :latent] *= scale
    bias[:latent] = (bias[:latent] - shift) * scale
    bias[latent:] += 2 * np.log(scale)  # log-variances, if there are any
    post = params["post_quant_conv"]
    new = {
        "quant_conv": {"kernel": kernel, "bias": bias},
        "post_quant_conv": {
            "kernel": post["kernel"] / scale,
            "bias": post["bias"] + shift @ post["kernel"][0, 0],
        },
    }
    if "codebook" in params:
        new["codebook"] = {"embedding": (params["codebook"]["embedding"] - shift) * scale}
    return {**params, **new}


def export(network: nn.Module, params: dict, folder: epath.Path) -> None:
    """Write an autoencoder in the format of diffusers' AutoencoderKL or VQModel."""
    size = network.size
    levels = len(size.channels)
    values = {
        "_class_name": "AutoencoderKL" if isinstance(network, AutoencoderKL) else "VQModel",
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "block_out_channels": list(size.channels),
        "layers_per_block": size.resnets,
        "latent_channels": size.latent,
        "norm_num_groups": size.groups,
        "scaling_factor": 1.0,
    }
    if not isinstance(network, AutoencoderKL):
        values["num_vq_embeddings"] = size.codes
    tensors = key_maps.to_published(to_torch(params), key_maps.AUTOENCODER)
    folder.mkdir(parents=True, exist_ok=True)
    weights.write_tensors(folder / "diffusion_pytorch_model.safetensors", tensors)
    weights.write_json(folder / "config.json", values)


class Reporter(Log):
    """Log of autoencoder training with reconstructions of validation images."""

    def __init__(
        self,
        objective: ReconstructionObjective,
        mesh: Any,
        folder: Any,
        frozen: dict,
        evaluation: Any,
        *,
        first: int = 0,
    ):
        super().__init__(folder, first=first)
        self.objective = objective
        config = objective.config
        source = unseen_source(config)
        n = min(IMAGES, len(source))
        images = [center(source[i]["image"], config.data.resolution) for i in range(n)]
        self.batches = np.array_split(np.stack(images), -(-n // BATCH))
        self.reconstruct = jax.jit(self._reconstruct)
        if self.chief and not frozen and config.reconstruction.lpips:
            tqdm.write("evaluation.lpips is empty: training without LPIPS gives blurred images.")

    def _reconstruct(self, params: dict, images: jax.Array):
        network, variables = self.objective.space.network, {"params": params}
        moments = network.apply(variables, to_float(images), method="encode")
        latents = network.sample(moments, None)
        codes = jnp.zeros(0, jnp.int32)
        if not isinstance(network, AutoencoderKL):
            codes = network.apply(variables, latents, method="quantize")[1]
        return to_uint8(network.apply(variables, latents, method="decode")), latents, codes

    def measure(self, params: dict) -> tuple[np.ndarray, np.ndarray, dict[str, float]]:
        """Return (reconstructions uint8 (N, R, R, 3), latents (N, h, w, C), metrics by name)."""
        outputs = [jax.device_get(self.reconstruct(params, images)) for images in self.batches]
        decoded = np.concatenate([images for images, _, _ in outputs])
        latents = np.concatenate([latents for _, latents, _ in outputs])
        error = np.concatenate(self.batches).astype(float) - decoded
        values = {"psnr": float(10 * np.log10(255**2 / np.square(error).mean()))}
        if used := {int(code) for _, _, codes in outputs for code in codes.ravel()}:
            values["codebook_usage"] = len(used) / self.objective.space.network.size.codes
        return decoded, latents, values

    def samples(self, step: int, params: dict) -> dict[str, float]:
        """Write samples/STEP.png: validation images, each above its reconstruction.

        The metrics are written to evaluation.jsonl and returned.
        """
        decoded, _, values = self.measure(params["autoencoder"])
        if self.chief:
            append_json(self.folder.evaluation, {"step": step, **values})
            for name, value in values.items():
                self.events.add_scalar(name, value, step)
        n = min(self.objective.config.log.samples, len(decoded))
        originals = np.concatenate(self.batches)[:n]
        pairs = np.concatenate([originals, decoded[:n]], axis=1)  # originals on top
        text = ", ".join(describe(values))
        self.image(step, caption_grid(pairs, None, title=f"step {step}: originals above; {text}"))
        return values

    def finish(self, step: int, params: dict) -> None:
        """Export the autoencoder, with latents of mean 0 and variance 1, and the last images."""
        network, params = self.objective.space.network, jax.device_get(params)
        _, latents, values = self.measure(params["autoencoder"])
        shift = latents.mean((0, 1, 2))
        scale = float(1 / np.sqrt(np.square(latents - shift).mean()))
        folder = self.folder.path / "autoencoder"
        if self.chief:
            export(network, standardize(network, params["autoencoder"], shift, scale), folder)
        self.samples(step, params)
        lines = [f"Finished {step} steps. On {len(latents)} images: {', '.join(describe(values))}"]
        lines += [f"  autoencoder  {folder}", f"  images       {self.folder.grid(step)}"]
        self.close(lines)


def describe(values: dict[str, float]) -> list[str]:
    """Format the metrics of `Reporter.measure`."""
    lines = [f"PSNR {values['psnr']:.2f} dB"]
    if "codebook_usage" in values:
        lines.append(f"{values['codebook_usage']:.0%} of the codes in use")
    return lines
