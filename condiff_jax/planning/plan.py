"""Mode `plan`: what a config needs of devices that are not here, from its compiled programs."""

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
from condiff_jax.objectives.diffusion import DiffusionObjective
from condiff_jax.objectives.diffusion import create as create_system
from condiff_jax.objectives.vocabulary import Vocabulary, load_vocabulary
from condiff_jax.planning import hlo
from condiff_jax.planning.compiling import GPU_OPTIONS, MemoryEstimate, device_bytes, early, measure
from condiff_jax.planning.topology import Topology, parse_all
from condiff_jax.runs.checkpoint import abstract_state
from condiff_jax.runtime import sharding
from condiff_jax.sampling.sampler import Sampler, SamplingProgram
from condiff_jax.training.step import compile_step

GIB = 2**30
GROWTH = 4  # most times that one is larger than the last; huge arrays take long to compile
PROBES = 4  # programs that fit to compile in search of the largest batch; others fail early
# What to change, in this order, where a config does not fit; the first that helps is named.
REMEDIES = (
    {"model.remat": "block"},
    {"parallel.fsdp": 0},
    {"parallel.fsdp": 0, "model.remat": "block"},
    {"parallel.fsdp": 0, "model.remat": "block", "optimizer.accumulate": 2},
    {"parallel.fsdp": 0, "model.remat": "block", "optimizer.accumulate": 4},
)


# Targets of custom calls that stand for kernels which the estimate of time leaves out.
KERNELS = re.compile("tpu_custom_call|cudnn|triton")


def place(tree: Any, where: Any) -> Any:
    """Shapes of arrays or ShapeDtypeStructs, each placed as `where` (one sharding) says."""
    return jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=where),
        jax.eval_shape(lambda: tree),
    )


def frozen(objective: DiffusionObjective, mesh: Mesh) -> dict:
    """The placed shapes of what is not trained; ConfigError where a folder does not tell them."""
    shapes = {name: encoder.shapes() for name, encoder in objective.frozen.items()}
    return jax.tree.map(place, shapes, sharding.tree_shardings(mesh, shapes))


def example(objective: DiffusionObjective, mesh: Mesh, size: int) -> dict:
    """The placed shapes of a training batch."""
    config = objective.config
    batch = jax.eval_shape(lambda: objective.example(size))
    if config.data.name == "latents":  # see `data.encoded.Cache.batch`
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
    return place(batch, sharding.batch_sharding(mesh))


def lower_step(objective: DiffusionObjective, mesh: Mesh) -> tuple[Any, dict[str, Any]]:
    """The train step of mode train, lowered, and the arrays that it is given by what they are."""
    train_state = abstract_state(objective, mesh)
    batch, others = example(objective, mesh, objective.config.batch_size), frozen(objective, mesh)
    lowered = compile_step(objective, mesh)[1].lower(train_state, batch, others)
    return lowered, {
        "parameters": train_state.params,
        "average": train_state.ema,
        "optimizer": train_state.opt_state,
        "encoders": others,
        "batch": batch,
    }


def divisible(size: int, devices: int) -> int:
    """The next multiple of the number of devices: the batch of a sampler."""
    return -(-size // devices) * devices


def lower_sampler(objective: DiffusionObjective, mesh: Mesh) -> tuple[Any, dict[str, Any]]:
    """The sampler of mode sample at `sampling.batch_size`, lowered, and what it is given."""
    settings = dataclasses.replace(objective.config.sampling, classifier="")  # not trained yet
    size = divisible(settings.batch_size, mesh.size)
    params, others = abstract_state(objective, mesh).params, frozen(objective, mesh)
    requests = example(objective, mesh, size)
    for name in ("image", "moments", "broken"):
        requests.pop(name, None)
    index = place(np.zeros(size, np.int32), sharding.batch_sharding(mesh))
    program, scales = SamplingProgram.create(settings, objective.config.data.resolution)
    sampler = Sampler(objective, mesh, settings)
    lowered = sampler.program.lower(params, others, requests, index, scales, program=program)
    return lowered, {"parameters": params, "encoders": others, "requests": requests}


def lower(
    what: Callable, config: Config, topology: Topology, words: Vocabulary
) -> tuple[Any, dict[str, Any]]:
    """What `lower_step` or `lower_sampler` makes of a config for the devices of a topology."""
    mesh = sharding.create_mesh(config.parallel.fsdp, topology.devices())
    return what(create_system(config, words), mesh)


def largest(
    total: Callable[[int], float], capacity: float, first: int, fixed: float, probes: int = PROBES
) -> tuple[int, int | None]:
    """The largest size seen to fit (0: none) and the smallest seen not to (None: none).

    total(size) grows with the size. It is tried at `first`, then where a straight line through the
    two largest that fit says or, if that line was tried, at the geometric mean of the bounds, until
    they are a 16th apart or `probes` sizes have fitted. fixed: what size 0 needs.
    """
    fits, fails, line, size = 0, None, [(0, fixed)], first
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
    """A config for the devices of a topology."""

    def __init__(self, config: Config, topology: Topology):
        if config.model.attention == "auto":  # of those devices, not of this machine's
            dtype = jnp.dtype(config.model.dtype)
            backend = fastest("tpu" if topology.is_tpu else "cuda", dtype)
            config = with_fields(config, {"model.attention": backend})
        self.config, self.topology = config, topology
        self.devices, self.words = topology.devices(), load_vocabulary(config)
        self.known: dict[tuple, MemoryEstimate] = {}
        self.bar = tqdm(desc=f"compiling for {topology.name}", unit=" programs", leave=False)

    @property
    def capacity(self) -> float:
        """Bytes of memory of one device."""
        return self.topology.chip.memory * GIB

    def needs(self, what: Callable, config: Config, *, whole: bool = False) -> MemoryEstimate:
        """Of a program of `lower_step` or `lower_sampler`; whole: with its cycles."""
        found = self.known.get((what, config))
        if found is None or whole and not found.whole:
            self.bar.refresh()
            inputs = (what, config, self.topology, self.words)
            if not self.topology.is_tpu:
                found = measure(*lower(*inputs), GPU_OPTIONS)
            elif whole:
                with tempfile.TemporaryDirectory() as folder:
                    found = measure(*lower(*inputs), dump=folder)
            else:
                found = early(lower, *inputs)
            self.known[what, config] = found
            self.bar.update()
        return found

    def train(self, *, whole: bool = False) -> dict[str, Any]:
        """Figures of the train step, see `program`; with its time the MFU, too."""
        config = self.config
        flop = 3 * create_system(config, self.words).forward_flops() * config.batch_size
        out = {
            "batch_size": config.batch_size,
            **self.program(self.needs(lower_step, config, whole=whole)),
            "tflop": flop / self.topology.size / 1e12,
        }
        if "seconds" in out:
            out["images_per_sec"] = config.batch_size / out["seconds"]
            out["mfu"] = out["tflop"] / out["seconds"] / self.topology.chip.tflops
        return out

    def sample(self, *, whole: bool = False) -> dict[str, Any]:
        """Figures of the sampler, see `program`."""
        size = divisible(self.config.sampling.batch_size, self.topology.size)
        needs = self.needs(lower_sampler, self.config, whole=whole)
        out = {"batch_size": size, **self.program(needs)}
        if "seconds" in out:
            out["images_per_sec"] = size / out["seconds"]
        return out

    def program(self, needs: MemoryEstimate) -> dict[str, Any]:
        """Per device: GiB by what they hold, GB that are sent, seconds by cycles where known."""
        chip = self.topology.chip
        out = {
            "fits": needs.total <= self.capacity,
            "gib": {name: size / GIB for name, size in needs.given.items()},
        }
        if math.isinf(needs.total):
            return out
        out["gib"] |= {"temporary": needs.temporary / GIB, "total": needs.total / GIB}
        out["sent_gb"] = {kind: n / 1e9 for kind, n in hlo.collectives(needs.runs).items()}
        out["sending_seconds"] = sum(out["sent_gb"].values()) / chip.link
        out["kernels"] = {
            name: n for name, n in hlo.custom_calls(needs.runs).items() if KERNELS.search(name)
        }
        if cycles := hlo.cycles(needs.runs):
            out["seconds"] = cycles / chip.clock / 1e9
        return out

    def remedy(self) -> dict[str, Any] | None:
        """Changes with which the train step fits."""
        for changes in REMEDIES:
            config = with_fields(self.config, changes)
            parts = self.topology.size * config.optimizer.accumulate
            if config == self.config or config.batch_size % parts:
                continue
            if self.needs(lower_step, config).total <= self.capacity:
                return changes
        return None

    def largest(self) -> dict[str, int | None]:
        """Images per device in training: how many fit, and how many do not (None: not found)."""
        parts = self.config.optimizer.accumulate
        one = self.topology.size * parts

        def total(size: int) -> float:
            config = with_fields(self.config, {"batch_size": size * one})
            return self.needs(lower_step, config).total

        mesh = sharding.create_mesh(self.config.parallel.fsdp, self.devices)
        state = abstract_state(create_system(self.config, self.words), mesh)
        first = self.config.batch_size // one
        fits, fails = largest(total, self.capacity, first, device_bytes(state))
        return {"fits": fits * parts, "fails": fails and fails * parts}


def check(config: Config, topology: Topology) -> None:
    """ConfigError where the config does not divide over so many devices."""
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


def table(title: str, figures: dict[str, Any]) -> str:
    """A program's figures in lines to read."""
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


def estimate(figures: dict[str, Any]) -> str:
    """The time of a program in lines to read."""
    mfu = f", MFU {figures['mfu']:.0%}" if "mfu" in figures else ""
    return (
        f"  estimated: {figures['seconds']:.4f} s, {figures['images_per_sec']:.0f} images/s{mfu}\n"
        f"  left out: sending, {figures['sending_seconds']:.4f} s where nothing hides it; kernels "
        "named above, the host and its input"
    )


def plan(config: Config, topology: Topology, *, times: bool = True) -> dict[str, Any]:
    """Print what a config needs on one topology, and return it; times, which take longest, last."""
    chip = topology.chip
    print(
        f"{topology.name}: {topology.size} x {chip.kinds[0]} in a grid of "
        f"{'x'.join(map(str, topology.grid))}, {chip.memory} GiB each"
    )
    planner = Planner(config, topology)
    out = {"topology": topology.name, "devices": topology.size}
    out["train"] = planner.train()
    print(table("train step", out["train"]))
    if not out["train"]["fits"]:
        out["remedy"] = planner.remedy()
        changes = " ".join(f"--config.{k}={v}" for k, v in (out["remedy"] or {}).items())
        print(f"  it fits with {changes}" if changes else "  nothing that was tried makes it fit")
    out["sampler"] = planner.sample()
    print(table("sampler", out["sampler"]))
    out["largest"] = planner.largest()
    fits, fails = out["largest"].values()
    print(f"images a device in training: {fits} fit" + (f", {fails} do not" if fails else ""))
    if times and topology.is_tpu:
        print("times need all code: minutes, for a UNet an hour or more; --notimes leaves them out")
        for name, figures in (("train", planner.train), ("sampler", planner.sample)):
            if out[name]["fits"]:
                out[name] = figures(whole=True)
                print(f"{name}\n{estimate(out[name])}")
    planner.bar.close()
    return out


def run(config: Config, names: str | None, *, times: bool = True) -> None:
    """Print the needs on each topology of a list, and after each one JSON object in a line."""
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
