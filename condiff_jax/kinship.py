"""Which trainings of a sweep are the same one, which go on from another, and where they lie."""

from __future__ import annotations

import hashlib
import json
import re

from etils import epath

from condiff_jax.config.build import with_fields
from condiff_jax.config.identity import identity, stages
from condiff_jax.config.schema import Config
from condiff_jax.runs.workdir import Workdir
from condiff_jax.runtime.files import read_json_lines


def digest(config: Config) -> str:
    """8 hex digits that two configs share if their trainings differ in the number of steps only."""
    fields = identity(config)
    # A stage that starts from a folder of the user's: which one makes the parameters.
    fields["init.path"] = stages(config)[0].init.path
    text = json.dumps(fields, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def family(config: Config) -> str:
    """Readable begin of a run's folder and its digest, such as ours-S2-32px-seed0-0a1b2c3d."""
    model = config.model
    size = re.sub(r"\W", "", model.size)
    return f"{model.name}-{size}-{config.data.resolution}px-seed{config.seed}-{digest(config)}"


def folder_name(config: Config) -> str:
    """Folder of a training within the sweep's: equal for configs that can share the training."""
    return f"{family(config)}-{config.steps}"


def place(config: Config, workdir: epath.Path) -> Config:
    """The config with every earlier stage in its own folder of the sweep, for all rows to share."""
    earlier = config.init.pretrain
    if earlier is None:
        return config
    path = str(workdir / folder_name(earlier))
    return with_fields(config, {"init.pretrain": place(earlier, workdir), "init.path": path})


def finished(path: epath.Path, steps: int) -> bool:
    """Whether the training in a folder has reached its last step."""
    return (Workdir(path).checkpoints / str(steps)).exists()


def start_from_shorter(config: Config, workdir: epath.Path) -> str:
    """Give a training that has not begun the longest finished shorter one's state; its folder.

    The copy resumes exactly where the shorter one ended, and that one stays as it is, to be
    evaluated or started from. "" where there is none, or nothing to do.
    """
    path = workdir / folder_name(config)
    shorter = [
        int(found.name.rsplit("-", 1)[1])
        for found in workdir.glob(f"{family(config)}-*")
        if re.search(r"-\d+$", found.name)
    ]
    shorter = [n for n in shorter if n < config.steps and finished(workdir / _of(config, n), n)]
    if path.exists() or not shorter:
        return ""
    steps = max(shorter)
    source, part = Workdir(workdir / _of(config, steps)), Workdir(workdir / f"{path.name}.part")
    if part.path.exists():
        part.path.rmtree()
    for old, new in (
        (source.checkpoints / str(steps), part.checkpoints / str(steps)),
        (source.vocabulary, part.vocabulary),
        (source.control, part.control),
        (source.metrics, part.metrics),
        (source.config, part.config),
    ):
        _copy(old, new)
    part.path.rename(path)  # complete or not there
    return source.path.name


def _of(config: Config, steps: int) -> str:
    return folder_name(with_fields(config, {"steps": steps}))


def _copy(old: epath.Path, new: epath.Path) -> None:
    if old.is_dir():
        new.mkdir(parents=True, exist_ok=True)
        for child in old.iterdir():
            _copy(child, new / child.name)
    elif old.exists():
        new.parent.mkdir(parents=True, exist_ok=True)
        old.copy(new)


def training_seconds(config: Config, path: epath.Path) -> float:
    """Seconds that the steps of all stages took, interrupts or not; without compiling."""
    total, before = 0.0, 0
    if config.init.pretrain is not None:
        total = training_seconds(config.init.pretrain, epath.Path(config.init.path))
    for values in read_json_lines(Workdir(path).metrics):
        total += values["step_time"] * (values["step"] - before)
        before = values["step"]
    return total
