"""Evaluation records: what their metrics depend on, where they are stored, and their summary."""

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

# Keys on which a measurement of a run depends: records that agree in them are the same measurement.
IDENTITY = ("step", "sampling", "evaluation", "features")


def describe(
    config: Config, networks: Mapping[str, Any], reference: Reference | None
) -> dict[str, Any]:
    """Return the IDENTITY of a config's evaluation, except the step."""
    settings, sampling = config.evaluation, config.sampling
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
    fields = {name: getattr(sampling, name) for name in names}
    fields |= {"ema": sampling.ema, "control": asked_control(config)}
    fields |= classifier_guide.describe(config)
    if sampling.size in ("tied", "untied"):
        fields["size_range"] = list(sampling.size_range)
    features = image_quality.describe_networks(networks)
    return {"sampling": fields, "evaluation": evaluation, "features": features}


def find_record(folder: Workdir, identity: dict[str, Any]) -> dict[str, Any] | None:
    """Find the newest record of evaluation.jsonl with this identity; None if there is none."""
    for record in reversed(read_json_lines(folder.evaluation)):
        if all(record.get(key) == identity[key] for key in IDENTITY):
            return record
    return None


def measurement_dir(folder: Workdir, identity: dict[str, Any]) -> epath.Path:
    """Return the folder of a measurement's parts and of images saved by evaluation.save."""
    key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:8]
    return folder.path / "evaluations" / f"{identity['step']}-{key}"


def delete_measurements_after(folder: Workdir, step: int) -> None:
    """Delete the folders of measurements beyond a step, whose weights a resumed run replaces."""
    for path in (folder.path / "evaluations").glob("*-*"):
        if int(path.name.partition("-")[0]) > step:
            path.rmtree()


def summary(record: dict[str, Any]) -> list[str]:
    """Format a record as text lines, one per metric."""
    metrics, settings = record["metrics"], record["evaluation"]
    lines = []
    names = [name for name in (*prompt.ATTRIBUTES, "all") if name in metrics]
    if names:
        rates = ", ".join(f"{name.replace('_', '/')} {metrics[name]:.1%}" for name in names)
        lines.append(f"Prompt accuracy on {settings['prompts']} unseen prompts: {rates}")
    against = f"{settings.get('samples')} images against {settings.get('reference')}"
    if "frechet_shapes" in metrics:
        distance = metrics["frechet_shapes"]
        lines.append(f"Frechet distance on shapes features, {against}: {distance:.3f}")
    for network, names in (
        ("inception", ("fid", "kid", "precision", "recall")),
        ("clip", ("clip_score",)),
    ):
        values = [f"{name} {metrics[name]:.4g}" for name in names if name in metrics]
        if values:
            lines.append(f"{record['features'][network]['name']}, {against}: {', '.join(values)}")
    if metrics.get("fid_rank_deficient"):
        lines.append("  (FID with fewer images than features: too large, for comparison only)")
    if "size_l2" in metrics:
        kinds = ("size_l2", "size_l2_hr", "size_lpips", "size_lpips_hr", "sharpness_response")
        values = (f"{kind} {metrics[kind]:.4f}" for kind in kinds if metrics.get(kind) is not None)
        sizes = ", ".join(str(size) for size in settings["sizes"])
        lines.append(f"Response to sizes {sizes}: {', '.join(values)}")
    return lines
