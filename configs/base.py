"""Every field of a configuration, with its default. Other configs start from `get_config()`.

Override any of them on the command line: `--config.optimizer.learning_rate=3e-4`.
"""

from ml_collections import ConfigDict


def arguments(text: str | None, **defaults) -> ConfigDict:
    """Config arguments as in `--config=configs/X.py:key=value,other=value`, typed by `defaults`."""
    values = ConfigDict(defaults)
    for item in filter(None, (text or "").split(",")):
        key, _, value = item.partition("=")
        if key not in defaults:
            known = ", ".join(defaults) or "none"
            raise ValueError(f"unknown config argument {key!r}; this config takes: {known}")
        kind = type(defaults[key])
        try:
            values[key] = value in ("1", "true", "True") if kind is bool else kind(value)
        except ValueError:
            raise ValueError(
                f"config argument {key}={value!r} is not of type {kind.__name__}"
            ) from None
    return values


def choose(name: str, value, choices) -> None:
    """ValueError that names the config argument and the values it can have."""
    if value not in choices:
        known = ", ".join(map(str, choices))
        raise ValueError(f"config argument {name}={value} is unknown; choose from {known}")


def get_config() -> ConfigDict:
    """The paper's model and recipe on the embedded data; a place to start, not an experiment."""
    config = ConfigDict()
    config.seed = 0
    config.steps = 1000
    config.batch_size = 64  # images a step, over all devices and accumulated parts
    # First and last step of a trace for xprof or TensorBoard, written into the work directory
    config.profile = ()
    # What is trained: diffusion | reconstruction (config.autoencoder, see configs/autoencoder.py) |
    # classification (of noised pictures, to guide sampling, see configs/classifier.py)
    config.objective = "diffusion"

    config.model = model = ConfigDict()
    model.name = "ours"  # unet | unet2d | dit_ln | dit_att | mdtv2 | pixart | mmdit | ours
    # NAME/PATCH: tiny, S, B, L or XL, and the patch size; of a unet: tiny, class or text;
    # of a unet2d: tiny, tiny2, tiny4, small, medium or large
    model.size = "tiny/4"
    # unet2d: how it hears the class, a module of condiff_jax/models/conditioners:
    # film | cross_attn | adanorm | weighted_attn | ours_none
    model.conditioner = "film"
    model.streams = "auto"  # shared | qkv | full; auto is the paper's: shared for classes, else qkv
    model.mask_ratio = 0.3  # mdtv2: least share of tokens that its second pass hides; 0: no pass
    # RMSNorm of queries and keys where attention sees conditions; the paper's runs diverge without
    model.qk_norm = True
    model.position = "resample"  # resample (pseudocode 1) | extrapolate (baseline of Fig. 8a)
    model.base_resolution = 0  # pixels at which positions count 0..grid; 0: data.resolution
    model.dtype = "float32"  # compute dtype: float32 | bfloat16; parameters are always float32
    # xla | cudnn (NVIDIA GPUs, needs bfloat16) | flash (TPUs, where there are 1024 keys or more)
    model.attention = "auto"  # the fastest of them for the device
    model.remat = (
        "none"  # none | block: recompute blocks in the backward pass | dots: all but products
    )
    model.unroll = 1  # layers per iteration of the scan over layers

    config.init = init = ConfigDict()  # what to start from; nothing: random parameters
    # The config of an earlier stage: it is trained first, with this one's command and in this one's
    # work directory (its folder pretrain/) or in init.path, and this one starts from the result.
    init.pretrain = None
    init.path = ""  # a work directory to start from, trained already if init.pretrain is None
    init.ema = True  # start from its averaged parameters

    config.data = data = ConfigDict()
    # shapes (embedded) | webdataset (tar shards) | tfds (a data set's folder as TFDS writes it:
    # what mode prepare makes, or TFDS's own cifar10, imagenet2012, ...) | cifar10 (its official
    # archives) | latents (what mode encode makes: encode.path of that is data.path of this)
    data.name = "shapes"
    data.path = ""  # folder of a webdataset, tfds or latents; of cifar10, or its .tar.gz
    data.resolution = 32  # pixels
    data.semantics = "text"  # text | class
    # Classes to expect, for class-conditional models; 0: those of the data. shapes has 10 (warm or
    # cool shapes) or, asked for, 30 (colour and shape).
    data.classes = 0
    data.crop = (0.9, 1.0)  # range of the crop's side, as a fraction of the short side (Fig. 8c)
    data.flip = True  # random horizontal flips
    data.sizes = (24, 96)  # shapes only: range of the originals' short sides, pixels
    data.entangled = 0.0  # shapes only: share of pictures whose size tells the background's tone
    data.workers = 0  # worker processes; 0 reads in threads of this one

    config.prepare = prepare = ConfigDict()  # mode prepare: makes data.path
    prepare.builder = ""  # imagenet1k | imagenet22k | cc12m | coco | folder
    prepare.source = ""  # folder of the downloaded archives
    prepare.boxes = ""  # JSON of faces to blur: {key: [[left, top, right, bottom], ...]}, in pixels
    prepare.shard_mb = 256  # about the size of one output file
    prepare.processes = 0  # that prepare at a time; 0: as many as there are cores

    config.encode = encode = ConfigDict()  # mode encode: makes a cache of the training split
    encode.path = ""  # its folder
    encode.views = 1  # crops of each picture, each in both flips if data.flip
    encode.text = False  # also features of the captions (text_encoder.name=clip), in bf16
    encode.records = 0  # pictures to take, the first; 0: all. shapes has no end and needs a number
    encode.batch_size = 64  # pictures, flips counted, at a time on all devices of a host
    encode.shard_mb = 256  # about the size of one output file

    config.conditioning = conditioning = ConfigDict()
    conditioning.control = ("crop", "flip", "size")  # any of crop, flip, aspect, size; () is none
    conditioning.weighting = "cosine"  # gamma_c of Eq. 1: cosine | linear | step | uniform | zero
    conditioning.alpha = 8.0  # power of `cosine` (Table 2a)
    conditioning.k = 1.0  # noise level of `step` (Table A6)
    conditioning.padding = "noisy_replicate"  # zero | replicate | noisy_replicate (Table 3)
    conditioning.beta_txt = 0.02  # Eq. 7; the paper says "small" and gives no value
    conditioning.drop_semantics = 0.1  # probability of dropping semantics, and control with it
    conditioning.drop_control = 0.1  # probability of dropping control alone, otherwise
    # nested: control is dropped with semantics, as Eq. 2 needs | independent: each by itself
    conditioning.dropping = "nested"

    config.diffusion = diffusion = ConfigDict()
    diffusion.timesteps = 1000
    diffusion.schedule = "scaled_linear"  # scaled_linear (the paper's) | linear | cosine (no betas)
    diffusion.beta_start = 0.00085
    diffusion.beta_end = 0.012
    diffusion.base_resolution = 0  # Eq. 3: the resolution the schedule is for; 0: this one
    diffusion.prediction = "epsilon"  # epsilon (the paper) | v (arXiv:2202.00512, its own loss)

    config.optimizer = optimizer = ConfigDict()
    optimizer.name = "adam"  # adam | adamw
    optimizer.learning_rate = 1e-4
    optimizer.schedule = "constant"  # constant | cosine (to zero at the last step) | rsqrt
    optimizer.decay_after = 10_000  # rsqrt: updates after which the rate falls with their root
    optimizer.warmup = 0  # steps of linear warm-up
    optimizer.b1 = 0.9
    optimizer.b2 = 0.999
    optimizer.eps = 1e-8
    optimizer.weight_decay = 0.0  # adamw only
    optimizer.clip_norm = 0.0  # bound on the global gradient norm; 0 is off
    optimizer.accumulate = 1  # parts a batch is split into, one after the other
    optimizer.ema = 0.9999  # decay of the parameters' moving average
    optimizer.ema_warmup = True  # start with the decay (1 + step) / (10 + step) where it is lower

    config.autoencoder = autoencoder = ConfigDict()
    # pixels: diffusion in pixel space | kl, vq: in the latents of a frozen autoencoder
    autoencoder.name = "pixels"
    # kl, vq: .safetensors, or a folder with one, of diffusers' AutoencoderKL or VQModel
    autoencoder.path = ""
    autoencoder.size = "sd"  # kl, vq: sd (Stable Diffusion's, 8 x smaller, 4 channels) | tiny
    autoencoder.scale = 1.0  # diffusion sees (x - shift) * scale, pictures being in [-1, 1]
    autoencoder.shift = 0.0

    config.reconstruction = reconstruction = ConfigDict()  # weights of that loss beside L1's 1
    reconstruction.lpips = 1.0  # of LPIPS, where evaluation.lpips has its weights
    reconstruction.kl = 1e-6  # autoencoder.name=kl: of the divergence from a standard normal
    reconstruction.codebook = 1.0  # autoencoder.name=vq: of the codes' distance to the latents
    reconstruction.commitment = 0.25  # and of the latents' to the codes, times this
    # and of each code's to the nearest latent, times this: none lies idle (as in arXiv:2307.15139)
    reconstruction.anchor = 0.25
    reconstruction.critic = 0.1  # of the patch critic's verdict
    reconstruction.critic_start = 10_000  # steps before the critic is heard

    config.text_encoder = text_encoder = ConfigDict()
    # words: a word embedding, trained with the model | clip: the frozen text tower of CLIP ViT-L/14
    text_encoder.name = "words"
    text_encoder.path = ""  # clip: a folder as transformers writes it, or a hub id owner/name
    text_encoder.length = 24  # T, tokens after padding
    text_encoder.width = 128  # channels of the embedding

    config.sampling = sampling = ConfigDict()
    sampling.sampler = "ddim"  # ddim | ddpm
    sampling.steps = 50
    sampling.spacing = "trailing"  # leading | trailing | linspace
    sampling.eta = 0.0  # ddim only: 0 deterministic, 1 ancestral
    sampling.guidance = 1.5  # lambda of Eq. 2
    sampling.base_resolution = 0  # Eq. 4: the resolution the guidance is for; 0: this one
    sampling.control_guidance = 1.0  # beta of Eq. 2
    # Classifier guidance (arXiv:2105.05233): a work directory with objective=classification, and
    # its weight, of epsilon's shift (ddim) or the mean's (ddpm); 1: Bayes' rule
    sampling.classifier = ""
    sampling.classifier_guidance = 1.0
    sampling.clip = True  # keep the predicted picture in range (pixel space only)
    sampling.ema = True  # sample with the averaged parameters
    sampling.seed = 0  # sample i depends on (seed, i) alone
    sampling.batch_size = 64
    sampling.n = 16  # pictures in all; prompts or classes are repeated or cut to this number
    sampling.prompts = ""  # mode sample: prompts, separated by ";"
    sampling.prompt_file = ""  # mode sample: a text file with one prompt a line
    sampling.labels = ()  # mode sample: classes, e.g. "(1,2)"; empty: all in turn
    sampling.control = control = ConfigDict()  # what to ask for: an uncropped square, unflipped
    control.crop_top = 0.0  # fractions of the original
    control.crop_left = 0.0
    control.crop_height = 1.0
    control.crop_width = 1.0
    control.flip = 0.0
    control.aspect = 1.0
    control.height = 0.0  # pixels of the original; 0: data.resolution
    control.width = 0.0
    # Where height and width come from (Table 2b): fixed: control.height and control.width | tied:
    # a square, uniform in size_range | untied: each uniform in it | train: the training data's.
    sampling.size = "fixed"
    sampling.size_range = (512, 1024)  # pixels

    config.evaluation = evaluation = ConfigDict()
    # What to measure when done: any of prompt_accuracy, frechet_shapes (both for data shapes),
    # size_response, fid, kid, precision_recall, clip_score
    evaluation.metrics = ()
    evaluation.prompts = 256  # prompts, or pictures of classes, of prompt_accuracy
    evaluation.samples = 1024  # pictures that distributions are compared on
    # Pictures they are compared with, and that say what to ask for:
    # train | train_200k | validation | coco (the validation split of the data set in path)
    evaluation.reference = "train"
    evaluation.path = ""  # another data set of mode prepare for that than data.path
    # .npz of mode reference, pytorch-fid, clean-fid or ADM: what FID compares with instead
    evaluation.statistics = ""
    evaluation.inception = ""  # FID's network, pytorch-fid's .pth; random: untrained, to try
    # How pictures get to that network's 299 pixels: tf (FID's own way, bilinear of TensorFlow 1) |
    # clean (as clean-fid, antialiased bicubic)
    evaluation.resize = "tf"
    evaluation.clip = ""  # CLIP score: a folder as transformers writes it, or a hub id
    evaluation.size_prompts = 16  # prompts, or classes, of size_response
    evaluation.sizes = (12, 24, 48)  # originals' sizes that size_response asks for, pixels
    evaluation.lpips = ""  # weights for LPIPS in size_response besides the pixels' distance
    evaluation.save = ""  # keep the pictures: png | npz (arr_0, as ADM's evaluator takes them)
    # mode evaluate: all combinations of fields of sampling, "guidance=1,1.5,2;size=train,fixed"
    evaluation.grid = ""
    # mode evaluate: imagenet_fid50k | val_fid | coco_clip | lpips_size instead of the metrics,
    # reference and settings of sampling, see condiff_jax/protocols.py
    evaluation.protocol = ""
    evaluation.every = 0  # steps between evaluations in training; 0: only at the end
    evaluation.every_samples = 1024  # evaluation.samples of those

    config.checkpoint = checkpoint = ConfigDict()
    checkpoint.every = 1000  # steps
    checkpoint.keep = 2  # newest checkpoints to keep
    checkpoint.keep_best = 1  # checkpoints with the lowest mean loss to keep besides

    config.log = log = ConfigDict()
    log.every = 50  # steps between lines of metrics.jsonl
    log.samples_every = 1000  # steps between sample grids; 0: only at the end
    log.samples = 16  # pictures in them
    log.stall = 600  # seconds without a step after which all stacks go to stderr; 0: never

    config.parallel = parallel = ConfigDict()
    # Devices that share one copy of the parameters; the others are data-parallel. 0: 8 of them, or
    # as many of these as divide their number
    parallel.fsdp = 1

    config.convert = convert = ConfigDict()
    convert.source = ""  # mode import: a weight file, a folder (diffusers') or a hub id owner/name
    convert.raw = False  # mode export: the parameters as trained instead of their average
    return config
