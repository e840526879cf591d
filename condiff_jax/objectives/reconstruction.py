"""Training of autoencoders (arXiv:2112.10752, App. G): what `system.py` is to diffusion.

Pictures are coded and decoded again; the loss is their L1 distance and LPIPS, a patch critic's
verdict, and what regularises the latents: their divergence from a standard normal distribution
(KL) or their distance to a codebook (VQ).
"""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from tqdm import tqdm

from condiff_jax.config.errors import config_errors
from condiff_jax.config.schema import Config
from condiff_jax.data.augment import center
from condiff_jax.data.pipeline import create_source
from condiff_jax.models.autoencoder import Latents, to_float, to_uint8
from condiff_jax.models.discriminator import PatchDiscriminator
from condiff_jax.models.kl import AutoencoderKL, mean_and_std
from condiff_jax.objectives.diffusion import Trainable
from condiff_jax.pretrained import key_maps, lpips
from condiff_jax.pretrained.layout import to_torch
from condiff_jax.pytorch import exporting
from condiff_jax.runs.workdir import append_json
from condiff_jax.runtime import flops
from condiff_jax.sampling.image_grid import caption_grid
from condiff_jax.training.reporters.diffusion import Log

PICTURES, BATCH = 256, 32  # of the validation data that progress is measured on


@dataclasses.dataclass(frozen=True)
class Lpips:
    """The parameters of LPIPS at `evaluation.lpips`."""

    path: str
    field: str = "evaluation.lpips"

    def files(self) -> list[epath.Path]:
        """What the distance depends on."""
        return [epath.Path(self.path)]

    def load(self) -> dict:
        """The parameters; ConfigError where there are none."""
        with config_errors(self.field):
            return lpips.load_weights(self.path)


@dataclasses.dataclass(frozen=True)
class Reconstructor(Trainable):
    """Modules of an autoencoder's training; parameters are {"autoencoder": ..., "critic": ...}."""

    config: Config
    space: Latents
    critic: PatchDiscriminator
    text_encoder: None = None

    @property
    def frozen(self) -> dict[str, Lpips]:
        """Where parameters that are not trained come from, as of `system.System`."""
        path = self.config.evaluation.lpips
        return {"lpips": Lpips(path)} if path and self.config.reconstruction.lpips else {}

    def init(self, key: jax.Array) -> dict:
        """Fresh parameters, f32."""
        keys = jax.random.split(key)
        side = self.config.data.resolution
        images = jnp.zeros((1, side, side, 3))
        return {
            "autoencoder": self.space.network.init(keys[0], images)["params"],
            "critic": self.critic.init(keys[1], images)["params"],
        }


def create(config: Config) -> Reconstructor:
    """Build the modules; nothing is allocated."""
    dtype = jnp.dtype(config.model.dtype)
    space = Latents.create(config)
    # 64, 128, 256 for Stable Diffusion's; as many as leave several patches in a picture
    first = max(16, space.network.size.channels[0] // 2)
    levels = max(1, min(3, config.data.resolution.bit_length() - 4))
    critic = PatchDiscriminator(tuple(first * 2**i for i in range(levels)), dtype)
    return Reconstructor(config, space, critic)


def forward_flops(system: Reconstructor) -> int:
    """FLOPs of coding and decoding one image, multiply-add = 2."""
    side, network = system.config.data.resolution, system.space.network
    image = jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32)
    params = system.shapes["autoencoder"]
    return flops.count(lambda params, x: network.apply({"params": params}, x), params, image)


def draw_noise(
    key: jax.Array, system: Reconstructor, batch: int, step: jax.Array
) -> dict[str, jax.Array]:
    """The latents' noise, and the weight of the critic's verdict, which begins late; B first."""
    side, settings = (
        system.config.data.resolution // system.space.factor,
        system.config.reconstruction,
    )
    weight = jnp.where(step < settings.critic_start, 0.0, settings.critic)
    return {
        "latent": jax.random.normal(key, (batch, side, side, system.space.channels)),
        "critic": jnp.full((batch,), weight),
    }


def kl_divergence(moments: jax.Array) -> jax.Array:
    """KL of the latents' distribution from the standard normal one, nats a picture: (B,)."""
    mean, std = mean_and_std(moments)
    return (0.5 * (mean**2 + std**2 - 1) - jnp.log(std)).sum((1, 2, 3))


def loss_fn(
    params: dict,
    batch: dict,
    noise: dict,
    *,
    system: Reconstructor,
    frozen: dict | None = None,
) -> tuple[jax.Array, dict]:
    """The sum of autoencoder's and critic's losses (), each with gradients for its own parameters
    alone, and the parts. frozen: {"lpips": parameters}, or nothing to do without.
    """
    settings, network = system.config.reconstruction, system.space.network
    variables = {"params": params["autoencoder"]}
    images = to_float(batch["image"])
    moments = network.apply(variables, images, method="encode")
    latents = network.sample(moments, noise["latent"])
    decoded = network.apply(variables, latents, method="decode")
    parts = {"l1": jnp.abs(decoded - images).mean()}
    loss = parts["l1"]
    if frozen:
        scaled = ((x + 1) * 127.5 for x in (images, decoded))
        parts["lpips"] = lpips.distance(frozen["lpips"], *scaled).mean()
        loss += settings.lpips * parts["lpips"]
    if isinstance(network, AutoencoderKL):
        # per value of the pictures, as the L1 distance is
        parts["kl"] = kl_divergence(moments).sum() / images.size
        loss += settings.kl * parts["kl"]
    else:
        codes, _ = network.apply(variables, latents, method="quantise")
        parts["codebook"] = jnp.square(jax.lax.stop_gradient(latents) - codes).mean()
        commitment = jnp.square(latents - jax.lax.stop_gradient(codes)).mean()
        anchors = network.apply(variables, latents, method="anchors")
        codebook = params["autoencoder"]["codebook"]["embedding"]
        parts["anchor"] = jnp.square(codebook - jax.lax.stop_gradient(anchors)).mean()
        loss += settings.codebook * (
            parts["codebook"] + settings.anchor * parts["anchor"] + settings.commitment * commitment
        )
    verdict, critic_loss = judge(system.critic, params["critic"], images, decoded)
    loss += (noise["critic"] * verdict).mean()
    parts["critic"] = critic_loss
    return loss + critic_loss, parts


def judge(critic: nn.Module, params: Any, images: jax.Array, decoded: jax.Array):
    """(verdict (B,), low where decoded pictures look real; the critic's hinge loss ()).

    The verdict has no gradient for the critic, the critic's loss none for the pictures.
    """
    frozen = jax.lax.stop_gradient(params)
    verdict = -critic.apply({"params": frozen}, decoded).mean((1, 2))
    real = critic.apply({"params": params}, images)
    false = critic.apply({"params": params}, jax.lax.stop_gradient(decoded))
    return verdict, (nn.relu(1 - real).mean() + nn.relu(1 + false).mean()) / 2


def standardise(network: nn.Module, params: dict, shift: np.ndarray, scale: float) -> dict:
    """Parameters of the same autoencoder, but with latents (z - shift) * scale.

    shift (C,). Only the layers next to the latents change, so `autoencoder.scale` can stay 1.
    """
    kernel, bias = (np.array(params["quant_conv"][name]) for name in ("kernel", "bias"))
    latent = len(shift)
    kernel[..., :latent] *= scale
    bias[:latent] = (bias[:latent] - shift) * scale
    bias[latent:] += 2 * np.log(scale)  # log-variances, if there are any
    back = params["post_quant_conv"]
    new = {
        "quant_conv": {"kernel": kernel, "bias": bias},
        "post_quant_conv": {
            "kernel": back["kernel"] / scale,
            "bias": back["bias"] + shift @ back["kernel"][0, 0],
        },
    }
    if "codebook" in params:
        new["codebook"] = {"embedding": (params["codebook"]["embedding"] - shift) * scale}
    return {**params, **new}


def export(network: nn.Module, params: dict, folder: epath.Path) -> None:
    """Write an autoencoder as diffusers does its AutoencoderKL or VQModel."""
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
    exporting.write_tensors(folder / "diffusion_pytorch_model.safetensors", tensors)
    exporting.write_json(folder / "config.json", values)


class Reporter(Log):
    """The log of an autoencoder's training: reconstructions of unseen pictures, and the result."""

    def __init__(self, system: Reconstructor, mesh: Any, folder: Any, frozen: dict, *, first=0):
        super().__init__(folder, first=first)
        self.system, config = system, system.config
        try:
            source = create_source(config, "validation")
        except (OSError, ValueError):
            source = create_source(config, "train")
        side, n = config.data.resolution, min(PICTURES, len(source))
        pictures = [center(source[i]["image"], side)[0] for i in range(n)]
        self.batches = np.array_split(np.stack(pictures), -(-n // BATCH))
        self.code = jax.jit(self._code)
        if self.chief and not frozen and config.reconstruction.lpips:
            tqdm.write(
                "Without LPIPS: evaluation.lpips is empty. L1 alone blurs what it cannot copy."
            )

    def _code(self, params: dict, images: jax.Array):
        network, variables = self.system.space.network, {"params": params}
        moments = network.apply(variables, to_float(images), method="encode")
        latents = network.sample(moments, None)
        codes = jnp.zeros(0, jnp.int32)
        if not isinstance(network, AutoencoderKL):
            codes = network.apply(variables, latents, method="quantise")[1]
        return to_uint8(network.apply(variables, latents, method="decode")), latents, codes

    def measure(self, params: dict) -> tuple[np.ndarray, np.ndarray, dict[str, float]]:
        """(reconstructions uint8 (N, R, R, 3), latents (N, h, w, C), what they are worth)."""
        found = [jax.device_get(self.code(params, images)) for images in self.batches]
        decoded, latents = (np.concatenate(part) for part in list(zip(*found, strict=True))[:2])
        error = np.concatenate(self.batches).astype(float) - decoded
        values = {"psnr": float(10 * np.log10(255**2 / np.square(error).mean()))}
        if used := {int(code) for _, _, codes in found for code in codes.ravel()}:
            values["codebook_usage"] = len(used) / self.system.space.network.size.codes
        return decoded, latents, values

    def samples(self, step: int, params: dict) -> dict[str, float]:
        """samples/STEP.png: pictures of the validation data, and under each what becomes of it.

        What they are worth is a line of evaluation.jsonl.
        """
        decoded, _, values = self.measure(params["autoencoder"])
        if self.chief:
            append_json(self.folder.evaluation, {"step": step, **values})
            for name, value in values.items():
                self.events.add_scalar(name, value, step)
        n = min(self.system.config.log.samples, len(decoded))
        originals = np.concatenate(self.batches)[:n]
        pairs = np.concatenate([originals, decoded[:n]], axis=1)  # one above the other
        text = ", ".join(describe(values))
        self.picture(step, caption_grid(pairs, None, title=f"step {step}: originals above; {text}"))
        return values

    def finish(self, step: int, params: dict) -> None:
        """Write the autoencoder, with latents of mean 0 and variance 1, and the last pictures."""
        network, params = self.system.space.network, jax.device_get(params)
        _, latents, values = self.measure(params["autoencoder"])
        shift = latents.mean((0, 1, 2))
        scale = float(1 / np.sqrt(np.square(latents - shift).mean()))
        folder = self.folder.path / "autoencoder"
        if self.chief:
            export(network, standardise(network, params["autoencoder"], shift, scale), folder)
        self.samples(step, params)
        lines = [
            f"Finished {step} steps. On {len(latents)} pictures: {', '.join(describe(values))}"
        ]
        lines += [f"  autoencoder  {folder}", f"  pictures     {self.folder.grid(step)}"]
        self.close(lines)


def describe(values: dict[str, float]) -> list[str]:
    """What `Reporter.measure` found, for people."""
    lines = [f"PSNR {values['psnr']:.2f} dB"]
    if "codebook_usage" in values:
        lines.append(f"{values['codebook_usage']:.0%} of the codes in use")
    return lines
