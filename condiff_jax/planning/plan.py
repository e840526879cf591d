"""Mode `plan`: memory, time and collectives of a config on devices that are not attached."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import tempfile
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from condiff_jax.config.build import with_fields
from condiff_jax.config.errors import ConfigError
from condiff_jax.config.schema import Config
from condiff_jax.models.attention import fastest
from condiff_jax.objectives import diffusion
from condiff_jax.objectives.diffusion import DiffusionObjective
from condiff_jax.objectives.vocabulary import Vocabulary, load_vocabulary
from condiff_jax.planning import hlo
from condiff_jax.planning.compiling import (
    GPU_OPTIONS,
    MemoryEstimate,
    device_bytes,
    measure,
    measure_early,
)
from condiff_jax.planning.topology import Topology, parse_all
from condiff_jax.runs.checkpoint import abstract_state
from condiff_jax.runtime import sharding
from condiff_jax.sampling.sampler import Sampler, SamplingProgram
from condiff_jax.training.step import compile_step

GIB = 2**30
GROWTH = 4  # largest factor between batch sizes of a search; huge arrays take long to compile
PROBES = 4  # programs that fit per search of the largest batch; others fail early
# Changes to try, in this order, where a config does not fit; the first that fits is printed.
REMEDIES = (
    {"model.remat": "block"},
    {"parallel.fsdp": 0},
    {"parallel.fsdp": 0, "model.remat": "block"},
    {"parallel.fsdp": 0, "model.remat": "block", "optimizer.accumulate": 2},
    {"parallel.fsdp": 0, "model.remat": "block", "optimizer.accumulate": 4},
)

# Targets of custom calls to kernels, which time estimates leave out.
KERNELS = re.compile("tpu_custom_call|cudnn|triton")


def with_sharding(tree: Any, leaf_sharding: Any) -> Any:
    """Return ShapeDtypeStructs of arrays or ShapeDtypeStructs, all with one sharding."""
    return jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=leaf_sharding),
        jax.eval_shape(lambda: tree),
    )


def frozen_shapes(objective: DiffusionObjective, mesh: Mesh) -> dict:
    """Return shapes and shardings of frozen networks; ConfigError for a folder without a config."""
    shapes = {name: encoder.shapes() for name, encoder in objective.frozen.items()}
    return jax.tree.map(with_sharding, shapes, sharding.tree_shardings(mesh, shapes))


def batch_shapes(objective: DiffusionObjective, mesh: Mesh, size: int) -> dict:
    """Return shapes and shardings of a training batch."""
    config = objective.config
    batch = jax.eval_shape(lambda: objective.example(size))
    if config.data.name == "latents":  # as in batches of data/latent_cache.py
        image = batch.pop("image")
        shapes = objective.frozen["autoencoder"].shapes()
        moments = jax.eval_shape(objective.autoencoder.moments, shapes, image)
        batch["moments"] = jax.ShapeDtypeStruct(moments.shape, jnp.float16)
        if "text_encoder" in objective.frozen and config.encode.text:
            text = config.text_encoder
            tokens = jax.ShapeDtypeStruct((size, text.length, text.width), jnp.bfloat16)
            pooled = jax.ShapeDtypeStruct((size, text.width), jnp.bfloat16)
            batch |= {"tokens": tokens, "pooled": pooled}
            del batch["ids"]
    return with_sharding(batch, sharding.batch_sharding(mesh))


def lower_step(objective: DiffusionObjective, mesh: Mesh) -> tuple[Any, dict[str, Any]]:
    """Lower the train step of mode train; also return its inputs by group."""
    train_state = abstract_state(objective, mesh)
    batch = batch_shapes(objective, mesh, objective.config.batch_size)
    frozen = frozen_shapes(objective, mesh)
    lowered = compile_step(objective, mesh)[1].lower(train_state, batch, frozen)
    return lowered, {
        "parameters": train_state.params,
        "average": train_state.ema,
        "optimizer": train_state.opt_state,
        "encoders": frozen,
        "batch": batch,
    }


def divisible(size: int, devices: int) -> int:
    """Round a batch size up to a multiple of the number of devices."""
    return -(-size // devices) * devices


def lower_sampler(objective: DiffusionObjective, mesh: Mesh) -> tuple[Any, dict[str, Any]]:
    """Lower the sampler of mode sample at `sampling.batch_size`; also return its inputs."""
    # The classifier may not be trained yet.
    settings = dataclasses.replace(objective.config.sampling, classifier="")
    size = divisible(settings.batch_size, mesh.size)
    params = abstract_state(objective, mesh).params
    frozen = frozen_shapes(objective, mesh)
    batch = batch_shapes(objective, mesh, size)
    for name in ("image", "moments", "broken"):
        batch.pop(name, None)
    index = with_sharding(np.zeros(size, np.int32), sharding.batch_sharding(mesh))
    program, scales = SamplingProgram.create(settings, objective.config.data.resolution)
    sampler = Sampler(objective, mesh, settings)
    lowered = sampler.program.lower(params, frozen, batch, index, scales, program=program)
    return lowered, {"parameters": params, "encoders": frozen, "requests": batch}


def lower(
    lower_program: Callable, config: Config, topology: Topology, vocabulary: Vocabulary
) -> tuple[Any, dict[str, Any]]:
    """Apply `lower_step` or `lower_sampler` to a config, for the devices of a topology."""
    mesh = sharding.create_mesh(config.parallel.fsdp, topology.devices())
    return lower_program(diffusion.create(config, vocabulary), mesh)


def largest(
    total: Callable[[int], float], capacity: float, first: int, fixed: float, probes: int = PROBES
) -> tuple[int, int | None]:
    """Search the largest size that fits (0: none) and the smallest that does not (None: unknown).

    total(size) grows with the size. It is evaluated at `first`, then at the linear extrapolation of
    the two largest sizes that fit, and after a failure at the geometric mean of the bounds. Ends
    when the bounds are a 16th apart or `probes` sizes have fitted. fixed: the total of size 0.
    """
    fits, fails = 0, None
    line = [(0, fixed)]
    size = first
    while probes:
        needed = total(size)
        if needed <= capacity:
            probes -= 1
            fits, line = size, [*line, (size, needed)][-2:]
            (a, at_a), (b, at_b) = line
            size = fits + int((capacity - at_b) * (b - a) / max(at_b - at_a, 1))
        else:
            fails = size
            size = math.isqrt(max(fits, 1) * fails)
        if fails and fails - fits <= max(1, fits // 16):
            break
        size = max(size, fits + 1)
        size = min(size, fails - 1 if fails else GROWTH * fits)
    return fits, fails


class Planner:
    """Memory and time estimates of a config's programs on the devices of a topology."""

    def __init__(self, config: Config, topology: Topology):
        if config.model.attention == "auto":  # resolve it for the topology, not this machine
            dtype = jnp.dtype(config.model.dtype)
            backend = fastest("tpu" if topology.is_tpu else "cuda", dtype)
            config = with_fields(config, {"model.attention": backend})
        self.config = config
        self.topology = topology
        self.devices = topology.devices()
        self.vocabulary = load_vocabulary(config)
        self.cache: dict[tuple, MemoryEstimate] = {}
        self.bar = tqdm(desc=f"compiling for {topology.name}", unit=" programs", leave=False)

    @property
    def capacity(self) -> float:
        """The memory of one device in bytes."""
        return self.topology.chip.memory * GIB

    def estimate(
        self, lower_program: Callable, config: Config, *, complete: bool = False
    ) -> MemoryEstimate:
        """Estimate a program of `lower_step` or `lower_sampler`; complete: with its cycles."""
        estimate = self.cache.get((lower_program, config))
        if estimate is None or complete and not estimate.complete:
            self.bar.refresh()
            arguments = (lower_program, config, self.topology, self.vocabulary)
            if not self.topology.is_tpu:
                estimate = measure(*lower(*arguments), GPU_OPTIONS)
            elif complete:
                with tempfile.TemporaryDirectory() as folder:
                    estimate = measure(*lower(*arguments), dump=folder)
            else:
                estimate = measure_early(lower, *arguments)
            self.cache[lower_program, config] = estimate
            self.bar.update()
        return estimate

    def train(self, *, complete: bool = False) -> dict[str, Any]:
        """Return figures of the train step, see `figures`; with its time also the MFU."""
        config = self.config
        flop = 3 * diffusion.create(config, self.vocabulary).forward_flops() * config.batch_size
        out = {
            "batch_size": config.batch_size,
            **self.figures(self.estimate(lower_step, config, complete=complete)),
            "tflop": flop / self.topology.size / 1e12,
        }
        if "seconds" in out:
            out["images_per_sec"] = config.batch_size / out["seconds"]
            out["mfu"] = out["tflop"] / out["seconds"] / self.topology.chip.tflops
        return out

    def sample(self, *, complete: bool = False) -> dict[str, Any]:
        """Return figures of the sampler, see `figures`."""
        size = divisible(self.config.sampling.batch_size, self.topology.size)
        estimate = self.estimate(lower_sampler, self.config, complete=complete)
        out = {"batch_size": size, **self.figures(estimate)}
        if "seconds" in out:
            out["images_per_sec"] = size / out["seconds"]
        return out

    def figures(self, estimate: MemoryEstimate) -> dict[str, Any]:
        """Return figures per device: GiB by group, GB sent, seconds where cycles are known."""
        chip = self.topology.chip
        out = {
            "fits": estimate.total <= self.capacity,
            "gib": {name: size / GIB for name, size in estimate.inputs.items()},
        }
        if math.isinf(estimate.total):
            return out
        out["gib"] |= {"temporary": estimate.temporary / GIB, "total": estimate.total / GIB}
        out["sent_gb"] = {kind: n / 1e9 for kind, n in hlo.collectives(estimate.runs).items()}
        out["sending_seconds"] = sum(out["sent_gb"].values()) / chip.link
        out["kernels"] = {
            name: n for name, n in hlo.custom_calls(estimate.runs).items() if KERNELS.search(name)
        }
        if cycles := hlo.cycles(estimate.runs):
            out["seconds"] = cycles / chip.clock / 1e9
        return out

    def remedy(self) -> dict[str, Any] | None:
        """Find changes of the config with which the train step fits."""
        for changes in REMEDIES:
            config = with_fields(self.config, changes)
            parts = self.topology.size * config.optimizer.accumulate
            if config == self.config or config.batch_size % parts:
                continue
            if self.estimate(lower_step, config).total <= self.capacity:
                return changes
        return None

    def largest(self) -> dict[str, int | None]:
        """Search how many images per device fit in training and how many do not (None: unknown)."""
        parts = self.config.optimizer.accumulate
        unit = self.topology.size * parts  # the smallest batch

        def total(size: int) -> float:
            config = with_fields(self.config, {"batch_size": size * unit})
            return self.estimate(lower_step, config).total

        mesh = sharding.create_mesh(self.config.parallel.fsdp, self.devices)
        state = abstract_state(diffusion.create(self.config, self.vocabulary), mesh)
        first = self.config.batch_size // unit
        fits, fails = largest(total, self.capacity, first, device_bytes(state))
        return {"fits": fits * parts, "fails": fails and fails * parts}


def check(config: Config, topology: Topology) -> None:
    """Raise ConfigError where the config does not divide over the devices of a topology."""
    if config.parallel.fsdp and topology.size % config.parallel.fsdp:
        raise ConfigError(
            "parallel.fsdp",
            f"must divide the {topology.size} devices of {topology.name}, got "
            f"{config.parallel.fsdp}",
        )
    parts = topology.size * config.optimizer.accumulate
    if config.batch_size % parts:
        raise ConfigError(
            "batch_size",
            f"must be a multiple of {topology.size} devices of {topology.name} x "
            f"optimizer.accumulate={config.optimizer.accumulate}, got {config.batch_size}",
        )


def format_figures(title: str, figures: dict[str, Any]) -> str:
    """Format a program's figures as text lines."""
    gib = ", ".join(f"{name} {size:.2f}" for name, size in figures["gib"].items())
    lines = [f"{title}, batch {figures['batch_size']}", f"  GiB a device: {gib}"]
    if not figures["fits"]:
        lines.append("  DOES NOT FIT")
    if "sent_gb" in figures:
        sent = ", ".join(f"{kind} {size:.2f}" for kind, size in figures["sent_gb"].items())
        lines.append(f"  GB a device sends: {sent or 'none'}")
    if figures.get("kernels"):
        names = ", ".join(f"{name} x {n}" for name, n in figures["kernels"].items())
        lines.append(f"  kernels: {names}")
    if "tflop" in figures:
        lines.append(f"  TFLOP a device and step: {figures['tflop']:.1f}")
    return "\n".join(lines)


def format_time(figures: dict[str, Any]) -> str:
    """Format the estimated time of a program as text lines."""
    mfu = f", MFU {figures['mfu']:.0%}" if "mfu" in figures else ""
    return (
        f"  estimated: {figures['seconds']:.4f} s, {figures['images_per_sec']:.0f} images/s{mfu}\n"
        f"  not included: collectives, {figures['sending_seconds']:.4f} s if not overlapped; the "
        "kernels named above; the host and its input pipeline"
    )


def plan(config: Config, topology: Topology, *, times: bool = True) -> dict[str, Any]:
    """Print and return the figures of a config on one topology; times, the slowest part, last."""
    chip = topology.chip
    print(
        f"{topology.name}: {topology.size} x {chip.kinds[0]} in a grid of "
        f"{'x'.join(map(str, topology.grid))}, {chip.memory} GiB each"
    )
    planner = Planner(config, topology)
    out = {"topology": topology.name, "devices": topology.size}
    out["train"] = planner.train()
    print(format_figures("train step", out["train"]))
    if not out["train"]["fits"]:
        out["remedy"] = planner.remedy()
        changes = " ".join(f"--config.{k}={v}" for k, v in (out["remedy"] or {}).items())
        print(f"  it fits with {changes}" if changes else "  nothing that was tried makes it fit")
    out["sampler"] = planner.sample()
    print(format_figures("sampler", out["sampler"]))
    out["largest"] = planner.largest()
    fits, fails = out["largest"].values()
    print(f"images a device in training: {fits} fit" + (f", {fails} do not" if fails else ""))
    if times and topology.is_tpu:
        print("times need code generation: minutes, for a UNet an hour or more; --notimes skips it")
        for name, figures in (("train", planner.train), ("sampler", planner.sample)):
            if out[name]["fits"]:
                out[name] = figures(complete=True)
                print(f"{name}\n{format_time(out[name])}")
    planner.bar.close()
    return out


def run(config: Config, names: str | None, *, times: bool = True) -> None:
    """Print the figures on each topology of a list, each followed by a line of JSON."""
    if not names:
        raise ConfigError(
            "--topology",
            "missing; mode plan needs it, such as --topology=v5e:8x8",
        )
    topologies = parse_all(names)
    for topology in topologies:
        check(config, topology)
    for topology in topologies:
        print(json.dumps(plan(config, topology, times=times)))
