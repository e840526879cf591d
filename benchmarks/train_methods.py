"""Methods of `benchmarks.train_step`: our train step, and the same step on diffusers' networks."""

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


def create_objective(options: argparse.Namespace) -> DiffusionObjective:
    """Our objective, whose autoencoder is never run; ConfigError for bad options."""
    values = base.get_config()
    values.batch_size = options.batch
    values.model.update(name=NAMES[options.model], size=options.size, dtype=options.dtype)
    values.model.update(attention=options.attention, remat=options.remat, unroll=options.unroll)
    values.model.update(position="extrapolate", qk_norm=False)  # as in diffusers
    values.data.update(resolution=8 * options.side, semantics="class")
    values.conditioning.control = ()
    values.autoencoder.update(name="kl", size="sd", scale=sampling.SCALE)
    return create(create_config(values), Vocabulary((), tuple(map(str, range(CLASSES)))))


def create_params(objective: DiffusionObjective) -> dict:
    """Initial parameters plus noise, in the host's memory; without noise most gradients are zero.

    Noise in biases opens the gates of AdaLN-zero. In kernels, more noise would amplify rounding.
    """
    rng = np.random.default_rng(0)
    with jax.default_device(jax.devices("cpu")[0]):
        params = jax.jit(objective.init)(jax.random.key(0))

    def add_noise(path, a):
        size = np.float32(0.3 if path[-1].key in ("bias", "scale") else 0.02)
        return np.asarray(a) + size * rng.standard_normal(a.shape, np.float32)

    return jax.tree_util.tree_map_with_path(add_noise, params)


def is_unet(objective: DiffusionObjective) -> bool:
    """Whether the denoiser is a UNet."""
    return isinstance(objective.model, unet.UNet)


def create_reference(objective: DiffusionObjective, params: dict) -> torch.nn.Module:
    """diffusers' network with our weights and as many parameters, called with (x, t, labels)."""
    if is_unet(objective):
        side, _, channels = objective.latent_shape
        network = parity.ClassUNet(side, objective.model.size, channels, CLASSES)
        weights = key_maps.to_published(to_torch(params["model"]), parity.CLASS_UNET)
        return parity.load(network, weights)
    network = sampling.create_transformer(objective, params)
    embedders = network.transformer_blocks[0].norm1.emb
    for block in network.transformer_blocks:  # as in DiT: one pair, not a copy in each block
        block.norm1.emb = embedders
    return network


def create_batch(objective: DiffusionObjective, size: int) -> dict:
    """A batch as from a latent cache: moments f16 (B, h, w, 2 C) and labels."""
    rng, (side, _, channels) = np.random.default_rng(0), objective.latent_shape
    moments = rng.normal(size=(size, side, side, 2 * channels)) / objective.autoencoder.scale
    moments[..., channels:] = -6.0  # log-variances
    batch = {name: objective.example(size)[name] for name in ("control", "broken")}
    labels = rng.integers(CLASSES, size=size, dtype=np.int32)
    return batch | {"moments": moments.astype(np.float16), "label": labels}


class JaxStep:
    """Our train step and its state on one device."""

    def __init__(self, objective: DiffusionObjective, params: dict, batch: dict, steps: int):
        self.steps, mesh = steps, timing.one_device()
        _, self.step = step.compile_step(objective, mesh)
        self.batch = sharding.put_batch(mesh, batch)
        # Copies, because the step donates the state's buffers.
        initial = state.create(jax.tree.map(jnp.array, params), optimizer.create(objective.config))
        self.state = jax.device_put(initial, sharding.tree_shardings(mesh, initial))

    def first(self) -> dict[str, float]:
        """Loss and norm of the gradient of the first step."""
        self.state, metrics = self.step(self.state, self.batch, {})
        return {name: float(metrics[name]) for name in ("loss", "grad_norm")}

    def run(self) -> None:
        """Run the steps of a repetition, and wait for the device."""
        for _ in range(self.steps):
            self.state, metrics = self.step(self.state, self.batch, {})
        jax.block_until_ready((self.state, metrics))

    def peak(self) -> int | None:
        """Run, and return the peak bytes of device memory so far; None if unknown."""
        self.run()
        return (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")


class TorchStep:
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
        self.optimizer = torch.optim.Adam(  # its fastest implementation
            self.params, settings.learning_rate, (settings.b1, settings.b2), settings.eps,
            fused=True,
        )  # fmt: skip
        self.average = [p.detach().clone() for p in self.params]

    def compiled(self) -> TorchStep:
        """The same step with a compiled network; it shares the state, to save memory."""
        other = copy.copy(self)
        other.call = torch.compile(self.call)
        return other

    def put(self, a) -> torch.Tensor:
        """An array on the device."""
        return parity.tensor(a).to(self.device)

    def draw(self) -> dict[str, torch.Tensor]:
        """Draw the random numbers of a step."""
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
        """(loss, norm of the gradient) of the batch with this noise; leaves p.grad."""
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
        """Loss and norm of the gradient with the noise of our first step, without an update."""
        key = jax.random.fold_in(jax.random.key(self.objective.config.seed), 0)
        noise_arrays = jax.jit(partial(self.objective.draw_noise, batch=len(self.labels)))(key)
        noise = {name: self.put(a) for name, a in noise_arrays.items()}
        noise |= {name: noise[name].permute(0, 3, 1, 2) for name in ("latent", "eps")}
        loss, norm = self.backward(noise | {"t": noise["t"].long()})
        return {"loss": loss.item(), "grad_norm": norm.item()}

    def run(self) -> None:
        """Run the steps of a repetition, and wait for the device."""
        for _ in range(self.steps):
            self.backward(self.draw())
            self.optimizer.step()
            rate = 1 - self.objective.config.optimizer.ema
            torch._foreach_lerp_(self.average, [p.detach() for p in self.params], rate)
        if self.device == "cuda":
            torch.cuda.synchronize()

    def peak(self) -> int | None:
        """Run, and return the peak bytes of device memory; None if unknown."""
        if self.device == "cpu":
            return self.run()
        torch.cuda.reset_peak_memory_stats()
        self.run()
        return torch.cuda.max_memory_allocated()


def create_methods(options: argparse.Namespace, objective: DiffusionObjective, device: str) -> dict:
    """{name: JaxStep or TorchStep}; device: PyTorch's. Both networks have as many parameters."""
    params, batch = create_params(objective), create_batch(objective, options.batch)
    chosen, methods = [options.only] if options.only else list(METHODS), {}
    if chosen != ["ours"]:
        network = create_reference(objective, params).to(device)
        ours, theirs = count(params), sum(p.numel() for p in network.parameters())
        assert ours == theirs, (ours, theirs)
        eager = TorchStep(network, objective, batch, options.steps)
        methods = {"eager": eager} | ({"compile": eager.compiled()} if options.compile else {})
    if "ours" in chosen:
        methods = {"ours": JaxStep(objective, params, batch, options.steps)} | methods
    return {METHODS[name]: method for name, method in methods.items() if name in chosen}


def count(params: dict) -> int:
    """Number of parameters."""
    return sum(a.size for a in jax.tree.leaves(params))
