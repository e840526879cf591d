"""Every field of a configuration: its type, default, bounds, choices and meaning.

This is the only declaration: `configs/base.py` takes its defaults from here, `build.py` its checks.
A field of type `Literal` has fixed choices, which a test keeps equal to the registry of that kind;
a `str` whose comment names a registry takes any key of it. Override a field on the command line:
`--config.optimizer.learning_rate=3e-4`.
"""

from __future__ import annotations

import dataclasses
import json
from typing import Annotated, Literal


@dataclasses.dataclass(frozen=True)
class AtLeast:
    """A bound on a number, inclusive."""

    low: float

    def __contains__(self, value: float) -> bool:
        return value >= self.low

    def __str__(self) -> str:
        return f"at least {self.low}"


@dataclasses.dataclass(frozen=True)
class Between:
    """Bounds on a number, both inclusive."""

    low: float
    high: float

    def __contains__(self, value: float) -> bool:
        return self.low <= value <= self.high

    def __str__(self) -> str:
        return f"between {self.low} and {self.high}"


Positive = Annotated[int, AtLeast(1)]
Count = Annotated[int, AtLeast(0)]
Seed = Annotated[int, Between(0, 2**32 - 1)]
Fraction = Annotated[float, Between(0, 1)]
NonNegative = Annotated[float, AtLeast(0)]


@dataclasses.dataclass(frozen=True)
class Model:
    """The denoiser."""

    name: Literal["unet", "unet2d", "dit_ln", "dit_att", "mdtv2", "pixart", "mmdit", "ours"] = (
        "ours"
    )
    # NAME/PATCH: tiny, S, B, L or XL, and the patch size; unet: tiny, class or text; unet2d: tiny,
    # tiny2, tiny4, small, medium or large
    size: str = "tiny/4"
    # unet2d: how it is conditioned on the class; a module of models/conditioners:
    # film | cross_attn | adanorm | weighted_attn | ours_none
    conditioner: str = "film"
    # mmdit, ours: weights that image and text share; auto: the paper's, shared for classes else qkv
    streams: Literal["auto", "shared", "qkv", "full"] = "auto"
    # mdtv2: minimum share of tokens hidden in its second pass; 0: no second pass
    mask_ratio: Annotated[float, Between(0, 0.8)] = 0.3
    # RMSNorm of queries and keys in attention to conditioning; the paper's runs diverge without it
    qk_norm: bool = True
    # positions at another resolution: pseudocode 1 | the baseline of Fig. 8a
    position: Literal["resample", "extrapolate"] = "resample"
    base_resolution: Count = 0  # pixels at which positions count 0..grid; 0: data.resolution
    # of the computation; parameters are float32
    dtype: Literal["float32", "bfloat16"] = "float32"
    # cudnn: NVIDIA GPUs, needs bfloat16; flash: TPUs, for 1024 keys or more; auto: the fastest
    attention: Literal["auto", "xla", "cudnn", "flash"] = "auto"
    # recomputed in the backward pass: nothing | blocks | all but matrix products
    remat: Literal["none", "block", "dots"] = "none"
    unroll: Positive = 1  # layers in each iteration of the scan over layers


@dataclasses.dataclass(frozen=True)
class Init:
    """Initial parameters; random by default."""

    # The config of an earlier stage. It is trained first, by the same command, in the folder
    # pretrain/ of the work directory or in init.path; this stage starts from the result.
    pretrain: Config | None = None
    path: str = ""  # work directory to start from; without init.pretrain it is trained already
    ema: bool = True  # start from its EMA parameters


@dataclasses.dataclass(frozen=True)
class Data:
    """The training data."""

    # shapes: embedded | webdataset: tar shards | tfds: a folder as TFDS writes it, by mode prepare
    # or TFDS's own (cifar10, imagenet2012) | cifar10: its official archives | latents: by mode
    # encode (encode.path of that run is data.path of this)
    name: Literal["shapes", "webdataset", "tfds", "cifar10", "latents"] = "shapes"
    path: str = ""  # folder of a webdataset, tfds or latents; of cifar10, or its .tar.gz
    resolution: Positive = 32  # pixels
    semantics: Literal["text", "class"] = "text"
    # expected number of classes, for class-conditional models; 0: that of the data. shapes has 10
    # (warm or cool shapes) or 30 (color and shape)
    classes: Count = 0
    crop: tuple[float, ...] = (0.9, 1.0)  # range of the crop's side / the short side (Fig. 8c)
    flip: bool = True  # random horizontal flips
    # strength s of a color jitter: factors of brightness, contrast and saturation, each uniform in
    # [1 - s, 1 + s] (Sec. 2.1)
    color: Fraction = 0.0
    sizes: tuple[int, ...] = (24, 96)  # shapes: range of the originals' short sides, pixels
    entangled: Fraction = 0.0  # shapes: share of images whose size depends on the background's tone
    workers: Count = 0  # worker processes; 0: threads of the main process


@dataclasses.dataclass(frozen=True)
class Prepare:
    """Mode prepare: writes data.path."""

    builder: Literal["", "imagenet1k", "imagenet22k", "cc12m", "coco", "folder"] = ""
    source: str = ""  # folder of the downloaded archives
    boxes: str = ""  # JSON of faces to blur: {key: [[left, top, right, bottom], ...]}, pixels
    shard_mb: Positive = 256  # approximate size of an output file
    processes: Count = 0  # worker processes; 0: one per core


@dataclasses.dataclass(frozen=True)
class Encode:
    """Mode encode: writes a cache of the training split's latents."""

    path: str = ""  # folder of the cache
    views: Positive = 1  # crops of each image, each with both flips if data.flip
    text: bool = False  # store text features too (text_encoder.name=clip), in bfloat16
    records: Count = 0  # number of images to encode; 0: all. shapes is endless and needs a number
    batch_size: Positive = 64  # images at once, flips included, over all devices of a host
    shard_mb: Positive = 256  # approximate size of an output file


@dataclasses.dataclass(frozen=True)
class Conditioning:
    """How the denoiser is conditioned."""

    # groups of conditioning.control.SCALARS: crop | flip | aspect | size | color
    control: tuple[str, ...] = ("crop", "flip", "size")
    # gamma_c of Eq. 1, a key of conditioning.control.WEIGHTINGS: cosine | linear | step | ...
    weighting: str = "cosine"
    alpha: NonNegative = 8.0  # power of weighting=cosine (Table 2a)
    k: NonNegative = 1.0  # noise level of weighting=step (Table A6)
    # of text, a key of conditioning.text.PADDINGS: zero | replicate | noisy_replicate (Table 3)
    padding: str = "noisy_replicate"
    beta_txt: NonNegative = 0.02  # Eq. 7; the paper says "small" and gives no value
    drop_semantics: Fraction = 0.1  # probability of dropping semantics
    drop_control: Fraction = 0.1  # probability of dropping control
    # nested: control is dropped with semantics, as Eq. 2 needs | independent
    drop_mode: Literal["nested", "independent"] = "nested"


@dataclasses.dataclass(frozen=True)
class Diffusion:
    """The noise schedule and what the denoiser predicts."""

    timesteps: Positive = 1000
    schedule: Literal["scaled_linear", "linear", "cosine"] = "scaled_linear"  # paper; DDPM; iDDPM
    beta_start: Fraction = 0.00085
    beta_end: Fraction = 0.012
    base_resolution: Count = 0  # Eq. 3: the schedule's resolution; 0: data.resolution
    # epsilon: the paper's | v: arXiv:2202.00512 with its own loss weight
    prediction: Literal["epsilon", "v"] = "epsilon"


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """The optimizer and the EMA."""

    name: Literal["adam", "adamw"] = "adam"
    learning_rate: NonNegative = 1e-4
    # cosine: to zero at the last step | rsqrt: EDM2's (arXiv:2312.02696, Eq. 67)
    schedule: Literal["constant", "cosine", "rsqrt"] = "constant"
    decay_after: Positive = 10_000  # rsqrt: updates after which the rate decays
    warmup: Count = 0  # steps of linear warm-up
    b1: Fraction = 0.9
    b2: Fraction = 0.999
    eps: float = 1e-8
    weight_decay: NonNegative = 0.0  # adamw
    clip_norm: NonNegative = 0.0  # maximum of the global gradient norm; 0: none
    accumulate: Positive = 1  # parts of a batch, computed one after the other
    ema: Fraction = 0.9999  # decay of the parameters' EMA
    ema_warmup: bool = True  # use the decay (1 + step) / (10 + step) while it is lower


@dataclasses.dataclass(frozen=True)
class Autoencoder:
    """The space in which diffusion runs."""

    # pixels | the latents of a frozen autoencoder: diffusers' AutoencoderKL | VQModel
    name: Literal["pixels", "kl", "vq"] = "pixels"
    path: str = ""  # kl, vq: .safetensors, or a folder with one
    size: Literal["tiny", "sd"] = "sd"  # kl, vq; sd: Stable Diffusion's, 8 x smaller, 4 channels
    scale: float = 1.0  # the denoiser's input is (x - shift) * scale, of images in [-1, 1]
    shift: float = 0.0


@dataclasses.dataclass(frozen=True)
class Reconstruction:
    """objective=reconstruction: weights of the loss terms; that of L1 is 1."""

    lpips: NonNegative = 1.0  # LPIPS, if evaluation.lpips has its weights
    kl: NonNegative = 1e-6  # kl: divergence from a standard normal
    codebook: NonNegative = 1.0  # vq: distance of the codes to the latents
    commitment: NonNegative = 0.25  # vq: distance of the latents to the codes, times `codebook`
    # vq: distance of each code to the nearest latent, times `codebook` (arXiv:2307.15139)
    anchor: NonNegative = 0.25
    critic: NonNegative = 0.1  # generator loss of the patch discriminator
    critic_start: Annotated[int, AtLeast(0)] = 10_000  # number of steps before that term is on


@dataclasses.dataclass(frozen=True)
class TextEncoder:
    """The encoder of prompts."""

    # words: a word embedding, trained with the model | clip: frozen text tower of CLIP ViT-L/14
    name: Literal["words", "clip"] = "words"
    path: str = ""  # clip: a folder as transformers writes it, or a hub id owner/name
    length: Positive = 24  # T, number of tokens after padding
    width: Positive = 128  # channels


@dataclasses.dataclass(frozen=True)
class ControlValues:
    """The control metadata to sample with: by default an uncropped, unflipped square."""

    crop_top: float = 0.0  # fractions of the original
    crop_left: float = 0.0
    crop_height: float = 1.0
    crop_width: float = 1.0
    flip: float = 0.0
    aspect: float = 1.0  # width / height
    height: float = 0.0  # pixels of the original; 0: data.resolution
    width: float = 0.0
    brightness: float = 1.0  # factors of the color jitter, where data.color is not 0
    contrast: float = 1.0
    saturation: float = 1.0


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How images are sampled."""

    sampler: Literal["ddim", "ddpm"] = "ddim"
    steps: Positive = 50
    spacing: Literal["leading", "trailing", "linspace"] = "trailing"
    eta: Fraction = 0.0  # ddim: 0 deterministic, 1 ancestral
    guidance: float = 1.5  # lambda of Eq. 2
    base_resolution: Count = 0  # Eq. 4: the guidance's resolution; 0: data.resolution
    control_guidance: float = 1.0  # beta of Eq. 2
    # Classifier guidance (arXiv:2105.05233): a work directory with objective=classification, and
    # the weight of the shift of epsilon (ddim) or the mean (ddpm); 1: Bayes' rule
    classifier: str = ""
    classifier_guidance: float = 1.0
    clip: bool = True  # keep the predicted image in range (pixel space)
    ema: bool = True  # use the EMA parameters
    seed: Seed = 0  # sample i depends on (seed, i) alone
    batch_size: Positive = 64
    n: Positive = 16  # images; prompts or labels are repeated or cut to this number
    prompts: str = ""  # mode sample: prompts, separated by ";"
    prompt_file: str = ""  # mode sample: a text file with one prompt per line
    labels: tuple[int, ...] = ()  # mode sample: labels, e.g. "(1,2)"; empty: all in turn
    control: ControlValues = ControlValues()
    # Where height and width come from (Table 2b). fixed: sampling.control | tied: a square, uniform
    # in size_range | untied: each uniform in it | train: the training data's
    size: Literal["fixed", "tied", "untied", "train"] = "fixed"
    size_range: tuple[int, ...] = (512, 1024)  # pixels


# Fields with the networks of metrics; other metrics need none.
NETWORK_FIELDS = {
    "fid": "evaluation.inception",
    "kid": "evaluation.inception",
    "precision_recall": "evaluation.inception",
    "clip_score": "evaluation.clip",
}


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Metrics, and the reference images they compare with."""

    # prompt_accuracy and frechet_shapes are for data.name=shapes
    metrics: tuple[
        Literal[
            "prompt_accuracy",
            "frechet_shapes",
            "size_response",
            "fid",
            "kid",
            "precision_recall",
            "clip_score",
        ],
        ...,
    ] = ()
    prompts: Positive = 256  # prompt_accuracy: prompts, or images of classes
    samples: Annotated[int, AtLeast(2)] = 1024  # images to compare distributions with
    # the images to compare with, whose prompts or labels are sampled (coco: the validation split of
    # evaluation.path)
    reference: Literal["train", "train_200k", "validation", "coco"] = "train"
    size_prompts: Positive = 16  # size_response: prompts, or labels
    sizes: tuple[int, ...] = (12, 24, 48)  # size_response: originals' sizes to sample with, pixels
    lpips: str = ""  # weights for LPIPS in size_response, beside the pixels' distance
    inception: str = ""  # FID's network, pytorch-fid's .pth; random: untrained, for trials
    # to the network's 299 pixels by FID's own (bilinear of TensorFlow 1) | clean-fid's bicubic
    resize: Literal["tf", "clean"] = "tf"
    clip: str = ""  # CLIP score: a folder as transformers writes it, or a hub id
    path: str = ""  # another data set of mode prepare as the reference; empty: data.path
    # FID's reference as .npz of mode reference, pytorch-fid, clean-fid or ADM, instead of images
    statistics: str = ""
    save: Literal["", "png", "npz"] = ""  # save the images; npz: arr_0, for ADM's evaluator
    # mode evaluate: all combinations of fields of sampling, "guidance=1,1.5,2;size=train,fixed"
    grid: str = ""
    # mode evaluate: replaces metrics, reference and settings of sampling; see protocols.py
    protocol: Literal["", "imagenet_fid50k", "val_fid", "coco_clip", "lpips_size"] = ""
    every: Count = 0  # steps between evaluations in training; 0: only at the end
    every_samples: Annotated[int, AtLeast(2)] = 1024  # evaluation.samples in those evaluations


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """When to save checkpoints, and which to keep."""

    every: Positive = 1000  # steps
    keep: Positive = 2  # newest checkpoints
    keep_best: Count = 1  # additional checkpoints with the lowest mean loss


@dataclasses.dataclass(frozen=True)
class Log:
    """What training logs."""

    every: Positive = 50  # steps between lines of metrics.jsonl
    samples_every: Count = 1000  # steps between sample grids; 0: only at the end
    samples: Positive = 16  # images in a grid
    stall: Count = 600  # seconds without a step after which all stacks go to stderr; 0: never


@dataclasses.dataclass(frozen=True)
class Convert:
    """Modes import and export."""

    source: str = ""  # import: a weight file, a folder (diffusers') or a hub id owner/name
    raw: bool = False  # export: the parameters as trained instead of their EMA


@dataclasses.dataclass(frozen=True)
class Parallel:
    """Sharding over devices."""

    # number of devices over which one copy of the parameters is sharded; the rest is data-parallel.
    # 0: the greatest common divisor of 8 and the number of devices
    fsdp: Count = 1


@dataclasses.dataclass(frozen=True)
class Config:
    """A whole experiment. The defaults are the paper's model and recipe on the embedded data."""

    seed: Seed = 0
    steps: Positive = 1000
    batch_size: Positive = 64  # images a step, over all devices and accumulated parts
    profile: tuple[int, ...] = ()  # first and last step of a trace, for xprof or TensorBoard
    # trains a denoiser | config.autoencoder (configs/autoencoder.py) | a classifier of noised
    # images for classifier guidance (configs/classifier.py)
    objective: Literal["diffusion", "reconstruction", "classification"] = "diffusion"
    model: Model = Model()
    init: Init = Init()
    data: Data = Data()
    prepare: Prepare = Prepare()
    encode: Encode = Encode()
    conditioning: Conditioning = Conditioning()
    diffusion: Diffusion = Diffusion()
    optimizer: Optimizer = Optimizer()
    autoencoder: Autoencoder = Autoencoder()
    reconstruction: Reconstruction = Reconstruction()
    text_encoder: TextEncoder = TextEncoder()
    sampling: Sampling = Sampling()
    evaluation: Evaluation = Evaluation()
    checkpoint: Checkpoint = Checkpoint()
    log: Log = Log()
    parallel: Parallel = Parallel()
    convert: Convert = Convert()

    def to_json(self) -> str:
        """The resolved configuration, for config.json."""
        return json.dumps(dataclasses.asdict(self), indent=2) + "\n"
