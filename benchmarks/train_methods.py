"""What `benchmarks.train_step` times: our train step, and the same around diffusers' networks."""

from __future__ import annotations

import argparse
import copy
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import torch

from benchmarks import parity, sampling, timing
from benchmarks.timing import COMPILED, OURS, THEIRS
from condiff_jax.models import unet
from condiff_jax.objectives.diffusion import DiffusionObjective, create
from condiff_jax.objectives.validate import create_config
from condiff_jax.objectives.vocabulary import Vocabulary
from condiff_jax.pretrained import key_maps
from condiff_jax.pretrained.layout import to_torch
from condiff_jax.runs import optimizer, state
from condiff_jax.runtime import sharding
from condiff_jax.training import step
from configs import base

CLASSES = sampling.CLASSES
NAMES = {"dit": "dit_ln", "unet": "unet"}
METHODS = {"ours": OURS, "eager": THEIRS, "compile": COMPILED}


def create_system(asked: argparse.Namespace) -> DiffusionObjective:
    """Our objective, whose autoencoder is never run; ConfigError for what it cannot be."""
    values = base.get_config()
    values.batch_size = asked.batch
    values.model.update(name=NAMES[asked.model], size=asked.size, dtype=asked.dtype)
    values.model.update(attention=asked.attention, remat=asked.remat, unroll=asked.unroll)
    values.model.update(position="extrapolate", qk_norm=False)  # as diffusers has it
    values.data.update(resolution=8 * asked.side, semantics="class")
    values.conditioning.control = ()
    values.autoencoder.update(name="kl", size="sd", scale=sampling.SCALE)
    return create(create_config(values), Vocabulary((), tuple(map(str, range(CLASSES)))))


def create_params(objective: DiffusionObjective) -> dict:
    """Fresh ones and some noise, or most gradients would be zero; in the host's memory.

    Noise in biases opens the gates of AdaLN-zero; in kernels more of it would make rounding grow.
    """
    rng = np.random.default_rng(0)
    with jax.default_device(jax.devices("cpu")[0]):
        params = jax.jit(objective.init)(jax.random.key(0))

    def disturb(path, a):
        size = np.float32(0.3 if path[-1].key in ("bias", "scale") else 0.02)
        return np.asarray(a) + size * rng.standard_normal(a.shape, np.float32)

    return jax.tree_util.tree_map_with_path(disturb, params)


def is_unet(objective: DiffusionObjective) -> bool:
    """Whether the denoiser is a UNet."""
    return isinstance(objective.model, unet.UNet)


def create_reference(objective: DiffusionObjective, params: dict) -> torch.nn.Module:
    """diffusers' network with our weights: of as many parameters, called with (x, t, labels)."""
    if is_unet(objective):
        side, _, channels = objective.latent_shape
        network = parity.ClassUNet(side, objective.model.size, channels, CLASSES)
        weights = key_maps.to_published(to_torch(params["model"]), parity.CLASS_UNET)
        return parity.load(network, weights)
    network = sampling.create_transformer(objective, params)
    embedders = network.transformer_blocks[0].norm1.emb
    for block in network.transformer_blocks:  # as DiT has it: one pair, not a copy in each block
        block.norm1.emb = embedders
    return network


def create_batch(objective: DiffusionObjective, size: int) -> dict:
    """What a cache of latents gives: moments f16 (B, h, w, 2 C) and labels."""
    rng, (side, _, channels) = np.random.default_rng(0), objective.latent_shape
    moments = rng.normal(size=(size, side, side, 2 * channels)) / objective.autoencoder.scale
    moments[..., channels:] = -6.0  # log-variances
    batch = {name: objective.example(size)[name] for name in ("control", "broken")}
    labels = rng.integers(CLASSES, size=size, dtype=np.int32)
    return batch | {"moments": moments.astype(np.float16), "label": labels}


class Ours:
    """Our train step and its state on one device."""

    def __init__(self, objective: DiffusionObjective, params: dict, batch: dict, steps: int):
        self.steps, mesh = steps, timing.one_device()
        _, self.step = step.compile_step(objective, mesh)
        self.batch = sharding.put_batch(mesh, batch)
        # Copies, for the step is given the state's memory.
        begun = state.create(jax.tree.map(jnp.array, params), optimizer.create(objective.config))
        self.state = jax.device_put(begun, sharding.tree_shardings(mesh, begun))

    def first(self) -> dict[str, float]:
        """Loss and norm of the gradient of the first step."""
        self.state, metrics = self.step(self.state, self.batch, {})
        return {name: float(metrics[name]) for name in ("loss", "grad_norm")}

    def run(self) -> None:
        """Some steps, until the device has done them."""
        for _ in range(self.steps):
            self.state, metrics = self.step(self.state, self.batch, {})
        jax.block_until_ready((self.state, metrics))

    def peak(self) -> int | None:
        """Most bytes of the device's memory in use so far, while this runs; None if untold."""
        self.run()
        return (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")


class Theirs:
    """The same train step in PyTorch, on a network that is called with (x, t, labels)."""

    def __init__(
        self, network: torch.nn.Module, objective: DiffusionObjective, batch: dict, steps: int
    ):
        self.call, self.params = network, list(network.parameters())
        self.device = self.params[0].device.type
        self.objective, self.steps = objective, steps
        self.moments = self.put(batch["moments"]).permute(0, 3, 1, 2).contiguous()
        self.labels = self.put(batch["label"]).long()
        self.alpha_bar = self.put(objective.schedule.alpha_bar).float()
        settings = objective.config.optimizer
        self.optimizer = torch.optim.Adam(  # by its fastest implementation
            self.params, settings.learning_rate, (settings.b1, settings.b2), settings.eps,
            fused=True,
        )  # fmt: skip
        self.average = [p.detach().clone() for p in self.params]

    def compiled(self) -> Theirs:
        """The same with a compiled network: of the same state, since memory is scarce."""
        other = copy.copy(self)
        other.call = torch.compile(self.call)
        return other

    def put(self, a) -> torch.Tensor:
        """An array on the device."""
        return parity.tensor(a).to(self.device)

    def draw(self) -> dict[str, torch.Tensor]:
        """The randomness of a step."""
        b, c, h, w = self.moments.shape
        shape = (b, c // 2, h, w)
        settings = self.objective.config
        return {
            "latent": torch.randn(shape, device=self.device),
            "eps": torch.randn(shape, device=self.device),
            "t": torch.randint(settings.diffusion.timesteps, (b,), device=self.device),
            "drop_semantics": torch.rand(b, device=self.device)
            < settings.conditioning.drop_semantics,
        }

    def backward(self, noise: dict) -> tuple[torch.Tensor, torch.Tensor]:
        """(loss, norm of the gradient) of a batch with given noise; the gradients are left."""
        mean, log_variance = self.moments.float().chunk(2, 1)
        x0 = mean + torch.exp(log_variance.clamp(-30, 20) / 2) * noise["latent"]
        alpha_bar = self.alpha_bar[noise["t"]][:, None, None, None]
        x = alpha_bar.sqrt() * x0 * self.objective.autoencoder.scale
        x = x + (1 - alpha_bar).sqrt() * noise["eps"]
        labels = torch.where(noise["drop_semantics"], CLASSES, self.labels)
        for p in self.params:
            p.grad = None
        bfloat16 = self.objective.config.model.dtype == "bfloat16"
        with torch.autocast(self.device, torch.bfloat16, bfloat16):
            eps = self.call(x, noise["t"], labels).sample
        loss = torch.nn.functional.mse_loss(eps.float(), noise["eps"])
        loss.backward()
        return loss.detach(), torch.nn.utils.get_total_norm([p.grad for p in self.params])

    def first(self) -> dict[str, float]:
        """Loss and norm of the gradient with the noise of our first step; nothing is updated."""
        key = jax.random.fold_in(jax.random.key(self.objective.config.seed), 0)
        drawn = jax.jit(partial(self.objective.draw_noise, batch=len(self.labels)))(key)
        noise = {name: self.put(a) for name, a in drawn.items()}
        noise |= {name: noise[name].permute(0, 3, 1, 2) for name in ("latent", "eps")}
        loss, norm = self.backward(noise | {"t": noise["t"].long()})
        return {"loss": loss.item(), "grad_norm": norm.item()}

    def run(self) -> None:
        """Some steps, until the device has done them."""
        for _ in range(self.steps):
            self.backward(self.draw())
            self.optimizer.step()
            rate = 1 - self.objective.config.optimizer.ema
            torch._foreach_lerp_(self.average, [p.detach() for p in self.params], rate)
        if self.device == "cuda":
            torch.cuda.synchronize()

    def peak(self) -> int | None:
        """Most bytes of the device's memory in use while this runs; None if untold."""
        if self.device == "cpu":
            return self.run()
        torch.cuda.reset_peak_memory_stats()
        self.run()
        return torch.cuda.max_memory_allocated()


def create_methods(asked: argparse.Namespace, objective: DiffusionObjective, device: str) -> dict:
    """{name: Ours or Theirs}; device: PyTorch's. Both networks have as many parameters."""
    params, batch = create_params(objective), create_batch(objective, asked.batch)
    chosen, methods = [asked.only] if asked.only else list(METHODS), {}
    if chosen != ["ours"]:
        network = create_reference(objective, params).to(device)
        ours, theirs = count(params), sum(p.numel() for p in network.parameters())
        assert ours == theirs, (ours, theirs)
        eager = Theirs(network, objective, batch, asked.steps)
        methods = {"eager": eager} | ({"compile": eager.compiled()} if asked.compile else {})
    if "ours" in chosen:
        methods = {"ours": Ours(objective, params, batch, asked.steps)} | methods
    return {METHODS[name]: method for name, method in methods.items() if name in chosen}


def count(params: dict) -> int:
    """Number of parameters."""
    return sum(a.size for a in jax.tree.leaves(params))
