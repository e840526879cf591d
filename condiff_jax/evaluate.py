"""Evaluation of trained models: what was asked for, what came out, and how it was made."""

from __future__ import annotations

import time
from typing import Any

from condiff_jax.data import shapes
from condiff_jax.metrics import prompt
from condiff_jax.sample import Sampler, requests
from condiff_jax.system import System

FIRST_INDEX = 1_000_000  # evaluation samples never share noise with the grids


def prompt_accuracy(system: System, sampler: Sampler, params: dict, step: int) -> dict[str, Any]:
    """Share of unseen `shapes` prompts drawn as asked, by attribute, with provenance."""
    config, start = system.config, time.perf_counter()
    scenes = shapes.prompts(config.evaluation.prompts)
    batch = requests(system, [scene.caption for scene in scenes])
    pictures = sampler(params, batch, first=FIRST_INDEX, label="prompt accuracy")
    settings = config.sampling
    return {
        "step": step,
        "metric": "prompt_accuracy",
        "accuracy": prompt.prompt_accuracy(pictures, scenes),
        "n": len(scenes),
        "ema": settings.ema,
        "sampler": settings.sampler,
        "steps": settings.steps,
        "guidance": settings.guidance,
        "control_guidance": settings.control_guidance,
        "seed": settings.seed,
        "seconds": round(time.perf_counter() - start, 1),
    }
