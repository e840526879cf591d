"""Records of evaluations: what their numbers depend on, and where they are."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from etils import epath

from condiff_jax.config.schema import Config
from condiff_jax.evaluation import image_quality
from condiff_jax.evaluation.metrics import prompt
from condiff_jax.evaluation.reference import Reference
from condiff_jax.runs.workdir import Workdir
from condiff_jax.runtime.files import read_json_lines
from condiff_jax.sampling import classifier_guide
from condiff_jax.sampling.requests import asked_control

# What an evaluation depends on besides the run; records that agree here are the same measurement.
IDENTITY = ("step", "sampling", "evaluation", "features")


def describe(
    config: Config, networks: Mapping[str, Any], reference: Reference | None
) -> dict[str, Any]:
    """The IDENTITY of the config's evaluation but for the step: what its numbers depend on."""
    settings, asked = config.evaluation, config.sampling
    evaluation: dict[str, Any] = {"metrics": sorted(settings.metrics)}
    if "prompt_accuracy" in settings.metrics:
        evaluation |= {"prompts": settings.prompts}
    if networks:
        evaluation["samples"] = settings.samples
    if reference is not None:
        evaluation["reference"] = settings.reference
        evaluation["reference_sha256"] = reference.digest()
        evaluation |= {"path": settings.path} if settings.path else {}
    if settings.statistics and "inception" in networks:
        content = epath.Path(settings.statistics).read_bytes()
        evaluation["statistics"] = hashlib.sha256(content).hexdigest()
    if "size_response" in settings.metrics:
        evaluation |= {"size_prompts": settings.size_prompts, "sizes": list(settings.sizes)}
        if settings.lpips:
            content = epath.Path(settings.lpips).read_bytes()
            evaluation["lpips"] = hashlib.sha256(content).hexdigest()
    names = ("sampler", "steps", "spacing", "eta", "clip", "guidance", "control_guidance")
    names += ("base_resolution", "size", "seed")
    sampling = {name: getattr(asked, name) for name in names}
    sampling |= {"ema": asked.ema, "control": asked_control(config)}
    sampling |= classifier_guide.describe(config)
    if asked.size in ("tied", "untied"):
        sampling["size_range"] = list(asked.size_range)
    features = image_quality.describe_networks(networks)
    return {"sampling": sampling, "evaluation": evaluation, "features": features}


def find_record(folder: Workdir, identity: dict[str, Any]) -> dict[str, Any] | None:
    """The newest record of evaluation.jsonl with this identity, None if there is none."""
    for record in reversed(read_json_lines(folder.evaluation)):
        if all(record.get(key) == identity[key] for key in IDENTITY):
            return record
    return None


def measurement_dir(folder: Workdir, identity: dict[str, Any]) -> epath.Path:
    """Where the measurement with this identity keeps its parts, and pictures if asked."""
    key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:8]
    return folder.path / "evaluations" / f"{identity['step']}-{key}"


def delete_measurements_after(folder: Workdir, step: int) -> None:
    """Drop what killed or finished measurements beyond a step have left: weights will be others."""
    for path in (folder.path / "evaluations").glob("*-*"):
        if int(path.name.partition("-")[0]) > step:
            path.rmtree()


def summary(record: dict[str, Any]) -> list[str]:
    """A record for people, a line a metric."""
    metrics, settings, lines = record["metrics"], record["evaluation"], []
    names = [name for name in (*prompt.ATTRIBUTES, "all") if name in metrics]
    if names:
        rates = ", ".join(f"{name.replace('_', '/')} {metrics[name]:.1%}" for name in names)
        lines.append(f"Prompt accuracy on {settings['prompts']} unseen prompts: {rates}")
    against = f"{settings.get('samples')} pictures against {settings.get('reference')}"
    if "frechet_shapes" in metrics:
        distance = metrics["frechet_shapes"]
        lines.append(f"Frechet distance on shapes features, {against}: {distance:.3f}")
    for network, names in (
        ("inception", ("fid", "kid", "precision", "recall")),
        ("clip", ("clip_score",)),
    ):
        values = [f"{n} {metrics[n]:.4g}" for n in names if n in metrics]
        if values:
            lines.append(f"{record['features'][network]['name']}, {against}: {', '.join(values)}")
    if metrics.get("fid_rank_deficient"):
        lines.append("  (FID with fewer pictures than features: too large, for comparison alone)")
    if "size_l2" in metrics:
        kinds = ("size_l2", "size_l2_hr", "size_lpips", "size_lpips_hr", "sharpness_response")
        values = (f"{k} {metrics[k]:.4f}" for k in kinds if metrics.get(k) is not None)
        sizes = ", ".join(str(size) for size in settings["sizes"])
        lines.append(f"Response to sizes {sizes}: {', '.join(values)}")
    return lines
