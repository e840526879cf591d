"""The types of a configuration; `configs/base.py` documents every field and holds the defaults."""

from __future__ import annotations

import dataclasses
import json


class ConfigError(ValueError):
    """Bad input: the message names the field or file and the fix, in one line."""


@dataclasses.dataclass(frozen=True)
class Model:
    name: str
    size: str
    conditioner: str
    streams: str
    mask_ratio: float
    qk_norm: bool
    position: str
    base_resolution: int
    dtype: str
    attention: str
    remat: str
    unroll: int


@dataclasses.dataclass(frozen=True)
class Init:
    pretrain: Config | None
    path: str
    ema: bool


@dataclasses.dataclass(frozen=True)
class Data:
    name: str
    path: str
    resolution: int
    semantics: str
    classes: int
    crop: tuple[float, ...]
    flip: bool
    sizes: tuple[int, ...]
    entangled: float
    workers: int


@dataclasses.dataclass(frozen=True)
class Prepare:
    builder: str
    source: str
    boxes: str
    shard_mb: int
    processes: int


@dataclasses.dataclass(frozen=True)
class Encode:
    path: str
    views: int
    text: bool
    records: int
    batch_size: int
    shard_mb: int


@dataclasses.dataclass(frozen=True)
class Conditioning:
    control: tuple[str, ...]
    weighting: str
    alpha: float
    k: float
    padding: str
    beta_txt: float
    drop_semantics: float
    drop_control: float
    dropping: str


@dataclasses.dataclass(frozen=True)
class Diffusion:
    timesteps: int
    schedule: str
    beta_start: float
    beta_end: float
    base_resolution: int
    prediction: str


@dataclasses.dataclass(frozen=True)
class Optimizer:
    name: str
    learning_rate: float
    schedule: str
    decay_after: int
    warmup: int
    b1: float
    b2: float
    eps: float
    weight_decay: float
    clip_norm: float
    accumulate: int
    ema: float
    ema_warmup: bool


@dataclasses.dataclass(frozen=True)
class Autoencoder:
    name: str
    path: str
    size: str
    scale: float
    shift: float


@dataclasses.dataclass(frozen=True)
class Reconstruction:
    lpips: float
    kl: float
    codebook: float
    commitment: float
    anchor: float
    critic: float
    critic_start: int


@dataclasses.dataclass(frozen=True)
class TextEncoder:
    name: str
    path: str
    length: int
    width: int


@dataclasses.dataclass(frozen=True)
class ControlValues:
    crop_top: float
    crop_left: float
    crop_height: float
    crop_width: float
    flip: float
    aspect: float
    height: float
    width: float


@dataclasses.dataclass(frozen=True)
class Sampling:
    sampler: str
    steps: int
    spacing: str
    eta: float
    guidance: float
    base_resolution: int
    control_guidance: float
    classifier: str
    classifier_guidance: float
    clip: bool
    ema: bool
    seed: int
    batch_size: int
    n: int
    prompts: str
    prompt_file: str
    labels: tuple[int, ...]
    control: ControlValues
    size: str
    size_range: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Evaluation:
    metrics: tuple[str, ...]
    prompts: int
    samples: int
    reference: str
    size_prompts: int
    sizes: tuple[int, ...]
    lpips: str
    inception: str
    resize: str
    clip: str
    path: str
    statistics: str
    save: str
    grid: str
    protocol: str
    every: int
    every_samples: int


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    every: int
    keep: int
    keep_best: int


@dataclasses.dataclass(frozen=True)
class Log:
    every: int
    samples_every: int
    samples: int
    stall: int


@dataclasses.dataclass(frozen=True)
class Convert:
    source: str
    raw: bool


@dataclasses.dataclass(frozen=True)
class Parallel:
    fsdp: int


@dataclasses.dataclass(frozen=True)
class Config:
    """A whole experiment; see configs/base.py for the meaning of every field."""

    seed: int
    steps: int
    batch_size: int
    profile: tuple[int, ...]
    objective: str
    model: Model
    init: Init
    data: Data
    prepare: Prepare
    encode: Encode
    conditioning: Conditioning
    diffusion: Diffusion
    optimizer: Optimizer
    autoencoder: Autoencoder
    reconstruction: Reconstruction
    text_encoder: TextEncoder
    sampling: Sampling
    evaluation: Evaluation
    checkpoint: Checkpoint
    log: Log
    parallel: Parallel
    convert: Convert

    def to_json(self) -> str:
        """The resolved configuration, for config.json."""
        return json.dumps(dataclasses.asdict(self), indent=2) + "\n"
