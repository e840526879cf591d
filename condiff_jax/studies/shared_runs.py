"""Folders of the trainings that rows of a sweep share.

Two rows share a training if they differ only in sampling and evaluation. A longer training starts
from a copy of a shorter one.
"""

from __future__ import annotations

import re

from etils import epath

from condiff_jax.config.build import with_fields
from condiff_jax.config.identity import digest
from condiff_jax.config.schema import Config
from condiff_jax.runs.workdir import Workdir
from condiff_jax.runtime.files import read_json_lines


def folder_prefix(config: Config) -> str:
    """The folder name of a training without its steps, such as ours-S2-32px-seed0-0a1b2c3d."""
    model = config.model
    size = re.sub(r"\W", "", model.size)
    return f"{model.name}-{size}-{config.data.resolution}px-seed{config.seed}-{digest(config)}"


def folder_name(config: Config) -> str:
    """The folder name of a training, equal for configs that share the training."""
    return f"{folder_prefix(config)}-{config.steps}"


def with_stage_folders(config: Config, workdir: epath.Path) -> Config:
    """The config with init.path of every stage set to a folder of the sweep."""
    earlier = config.init.pretrain
    if earlier is None:
        return config
    stage = with_stage_folders(earlier, workdir)
    path = str(workdir / folder_name(earlier))
    return with_fields(config, {"init.pretrain": stage, "init.path": path})


def start_from_shorter(config: Config, workdir: epath.Path) -> str:
    """Copy the longest finished shorter training as the start of this one; return its folder.

    The copy resumes exactly where the shorter one ended. The shorter one is not changed. Returns ""
    if there is none or if this training has begun.
    """
    path = workdir / folder_name(config)
    prefix = folder_prefix(config)
    suffixes = (folder.name.removeprefix(f"{prefix}-") for folder in workdir.glob(f"{prefix}-*"))
    shorter = [
        steps
        for steps in map(int, filter(str.isdecimal, suffixes))
        if steps < config.steps
        and (Workdir(workdir / f"{prefix}-{steps}").checkpoints / str(steps)).exists()
    ]
    if path.exists() or not shorter:
        return ""
    steps = max(shorter)
    source = Workdir(workdir / f"{prefix}-{steps}")
    partial = Workdir(workdir / f"{path.name}.part")
    if partial.path.exists():
        partial.path.rmtree()
    _copy(source.checkpoints / str(steps), partial.checkpoints / str(steps))
    for name in ("vocabulary", "control", "metrics", "config"):
        _copy(getattr(source, name), getattr(partial, name))
    partial.path.rename(path)  # atomic: complete or absent
    return source.path.name


def _copy(old: epath.Path, new: epath.Path) -> None:
    """Copy a local or remote file or folder, if it exists."""
    if old.is_dir():
        new.mkdir(parents=True, exist_ok=True)
        for child in old.iterdir():
            _copy(child, new / child.name)
    elif old.exists():
        new.parent.mkdir(parents=True, exist_ok=True)
        old.copy(new)


def training_seconds(config: Config, path: epath.Path) -> float:
    """Seconds of the training steps of all stages, without compilation."""
    total = 0.0
    previous = 0
    if config.init.pretrain is not None:
        total = training_seconds(config.init.pretrain, epath.Path(config.init.path))
    for values in read_json_lines(Workdir(path).metrics):
        total += values["step_time"] * (values["step"] - previous)
        previous = values["step"]
    return total
