"""Classifiers of noised images: their training, and classifier guidance of denoisers."""

import contextlib
import dataclasses
import json
import shutil
from functools import partial
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from condiff_jax.config.errors import ConfigError
from condiff_jax.data.augment import center
from condiff_jax.data.pipeline import create_source
from condiff_jax.diffusion.loss import add_noise
from condiff_jax.evaluation import evaluate
from condiff_jax.models import unet
from condiff_jax.models.unet import Size
from condiff_jax.objectives import classification
from condiff_jax.objectives.validate import create_config
from condiff_jax.objectives.vocabulary import create_vocabulary
from condiff_jax.pretrained import weights
from condiff_jax.runs import optimizer, state
from condiff_jax.runs.checkpoint import Checkpoints
from condiff_jax.runs.workdir import Workdir
from condiff_jax.runtime import sharding
from condiff_jax.sampling import classifier_guide, sample
from condiff_jax.sampling import sampler as sampler_lib
from condiff_jax.sampling.requests import create_batch
from condiff_jax.training import loop
from condiff_jax.training import step as step_lib
from condiff_jax.training.reporters import classifier
from configs import classifier as classifier_config
from tests import tiny

SMALL = Size((8,), (False,), 12, heads=2, resnets=1)  # attention in the middle block only
CLASSES = {"data.semantics": "class", "data.classes": 10, "conditioning.control": ()}
FIELDS = CLASSES | {
    "objective": "classification", "model.name": "unet", "model.size": "tiny", "log.every": 1,
    "optimizer.learning_rate": 3e-3, "optimizer.ema": 0.9,
}  # fmt: skip
IMAGES = (16, 8, 8, 3)
DENOISER = CLASSES | {"model.name": "dit_ln", "sampling.control_guidance": 1.0}


@pytest.fixture(autouse=True, scope="module")
def small():
    """Use tiny sizes, and one compiled step: all trainings here are of one classifier."""
    with tiny.few_layers(), mock.patch.dict(unet.SIZES, {"tiny": SMALL}):
        compile_step, cache = loop.compile_step, []

        def compile_once(*args):
            cache[:] = cache or [compile_step(*args)]
            return cache[0]

        with mock.patch.object(loop, "compile_step", compile_once):
            yield


@pytest.fixture(autouse=True)
def few_images(monkeypatch):
    monkeypatch.setattr(classifier, "IMAGES", 12)


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Return the folder of a classifier after 4 steps, with checkpoints of steps 2 and 4."""
    path = tmp_path_factory.mktemp("classifier")
    with mock.patch.object(classifier, "IMAGES", 12):
        assert loop.run(tiny.config(steps=4, **FIELDS), str(path))
    return path


def restored(path, config):
    vocabulary = Workdir(str(path)).load_vocabulary()
    objective = classification.create(config, vocabulary)
    checkpoints = Checkpoints(Workdir(str(path)).checkpoints, config)
    return jax.device_get(checkpoints.restore(objective, sharding.create_mesh()))


def test_two_steps_and_two_are_four_bit_for_bit(trained, tmp_path):
    config, parts = tiny.config(steps=4, **FIELDS), tmp_path / "parts"
    shutil.copytree(trained, parts)
    shutil.rmtree(parts / "checkpoints/4")  # as if killed after half of its steps
    for name in ("evaluation.jsonl", "samples/4.png"):
        (parts / name).unlink()
    assert loop.run(config, str(parts))
    assert (parts / "checkpoints/4").exists()
    jax.tree.map(np.testing.assert_array_equal, restored(trained, config), restored(parts, config))
    first = {"step", "loss", "accuracy", *(f"accuracy_{i}" for i in (1, 2, 3, 4))}
    for line, again in zip(*(lines(p / "metrics.jsonl") for p in (trained, parts)), strict=True):
        assert {name: line[name] for name in first} == {name: again[name] for name in first}
    quarters = [line[f"accuracy_{i}"] for i in (1, 2, 3, 4)]
    assert np.mean(quarters) == pytest.approx(line["accuracy"])
    (record,) = [line for line in lines(parts / "evaluation.jsonl") if line["step"] == 4]
    assert 0 <= record["accuracy"] <= 1 and (parts / "samples/4.png").exists()
    assert loop.run(config, str(parts))  # nothing to do
    assert len(lines(parts / "evaluation.jsonl")) == 1


@pytest.fixture(scope="module")
def objective():
    config = tiny.config(**FIELDS)
    return classification.create(config, create_vocabulary(config, create_source(config)))


def validation_batch(n):
    source = create_source(tiny.config(**FIELDS), "validation")
    records = [source[i] for i in range(n)]
    images = [center(record["image"], 16) for record in records]
    return {
        "image": jnp.asarray(np.stack(images)),
        "label": jnp.array([record["label"] for record in records]),
    }


def test_the_loss_is_the_cross_entropy_of_noised_images(objective):
    batch, rng = validation_batch(8), np.random.default_rng(0)
    params = jax.tree.map(
        lambda a: rng.normal(0, 0.3, a.shape).astype(np.float32), objective.shapes
    )
    noise = objective.draw_noise(jax.random.key(1), 8)
    assert sorted(np.asarray(noise["t"]) // 125) == list(range(8))  # one of each eighth
    loss, metrics = jax.jit(objective.loss)(params, batch, noise)
    x0 = batch["image"] / 127.5 - 1
    x = add_noise(objective.schedule, x0, noise["t"], noise["eps"])
    logits = jax.jit(objective.model.apply)({"params": params["classifier"]}, x, noise["t"])
    logits, label = np.asarray(logits, np.float64), np.asarray(batch["label"])
    probability = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    assert loss == pytest.approx(-np.log(probability[range(8), label]).mean(), rel=1e-4)
    correct = logits.argmax(1) == label
    assert metrics["accuracy"] == pytest.approx(correct.mean())
    for i in range(4):
        quarter = np.asarray(noise["t"]) // 250 == i
        assert quarter.sum() == 2
        assert metrics[f"accuracy_{i + 1}"] == pytest.approx(correct[quarter].mean())


def test_the_loss_falls_where_classes_are_visible(objective):
    """Class 0 is dark, class 1 is bright; noise hides the difference only at some t."""
    config = tiny.config(**FIELDS | {"data.resolution": 8, "optimizer.learning_rate": 1e-2})
    objective, label = classification.create(config, objective.vocabulary), np.arange(16) % 2
    image = np.broadcast_to((40 + 175 * label).astype(np.uint8)[:, None, None, None], IMAGES)
    batch = {"image": image, "label": label, "broken": np.zeros(16, np.int32)}
    tx, losses = optimizer.create(config), []
    step = jax.jit(partial(step_lib.train_step, objective=objective, tx=tx))
    train_state = jax.jit(lambda key: state.create(objective.init(key), tx))(jax.random.key(0))
    for _ in range(30):
        train_state, metrics = step(train_state, batch)
        losses.append(float(metrics["loss"]))
    assert losses[0] == pytest.approx(np.log(10), rel=1e-4)  # uniform at initialization
    assert np.mean(losses[-10:]) < 0.55  # class frequencies alone give log 2 = 0.69
    assert metrics["accuracy_1"] == 1


def test_flops_are_those_of_the_network(objective):
    resolution = objective.config.data.resolution
    assert objective.forward_flops() > 2 * 9 * 8 * 8 * resolution**2  # one of its convolutions


# ---------------------------------------------------------------------------------------------
# Guided sampling


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Return (folder, parameters) of a denoiser with random parameters."""
    path = tmp_path_factory.mktemp("denoiser")
    return path, tiny.finished(tiny.config(steps=2, **DENOISER), path)


def guided(trained, **fields):
    return tiny.config(**DENOISER | {"steps": 2, "sampling.classifier": str(trained)} | fields)


def one_device():
    return sharding.create_mesh(devices=jax.devices()[:1])


def saved(objective, path, value):
    """Save a classifier whose parameters are all `value` and whose EMA is -value."""
    folder = Workdir(str(path))
    folder.open(objective.config, objective.vocabulary)
    shapes = jax.eval_shape(
        partial(state.create, tx=optimizer.create(objective.config)), objective.shapes
    )
    zeros = jax.tree.map(lambda a: np.zeros(a.shape, a.dtype), shapes)
    params, ema = (jax.tree.map(lambda a, v=v: a + v, zeros.params) for v in (value, -value))
    checkpoints = Checkpoints(folder.checkpoints, objective.config, create=True)
    checkpoints.save(4, zeros.replace(step=np.array(4), params=params, ema=ema), 0.0)
    checkpoints.close()
    return folder.path


def test_the_classifier_that_is_named_guides_averaged_or_as_trained(objective, tmp_path):
    """Also where the grid of an evaluation changes the classifier of one sampler."""

    def guide_values(sampler):
        params = jax.device_get(sampler.frozen["classifier"])
        return {value for leaf in jax.tree.leaves(params) for value in leaf.ravel().tolist()}

    first, second = (saved(objective, tmp_path / str(n), n) for n in (1.0, 2.0))
    raw, other = (guided(path, **{"sampling.ema": False}) for path in (first, second))
    denoiser = tiny.objective(raw)
    sampler = sampler_lib.Sampler(denoiser, one_device(), raw.sampling)
    assert guide_values(sampler) == {1} and guide_values(sampler.at(other)) == {2}
    averaged = sampler_lib.Sampler(denoiser, one_device(), guided(first).sampling)
    assert guide_values(averaged) == {-1}


@pytest.mark.parametrize("name", ["ddpm", pytest.param("ddim", marks=pytest.mark.slow)])
def test_sampling_uses_the_form_of_guidance_of_the_sampler(name, trained, run):
    """`Sampler` equals a handwritten loop with the form of classifier guidance for the sampler."""
    fields = {"sampling.sampler": name, "sampling.guidance": 2.0, "sampling.clip": False}
    configs = {
        weight: guided(trained, **fields, **{"sampling.classifier_guidance": weight})
        for weight in (0.0, 1000.0)
    }
    objective = tiny.objective(configs[1000.0])
    params, labels = run[1], [0, 3, 5, 9]
    sampler = sampler_lib.Sampler(objective, one_device(), configs[1000.0].sampling)
    batch = create_batch(objective, labels)
    network, own = classifier_guide.load(objective, one_device(), configs[1000.0].sampling)

    @jax.jit
    def by_hand(weight):
        keys = sampler_lib.noise_keys(0, jnp.arange(4))[:, 1]
        cond = objective.condition(params, batch, None)

        def log_prob(x, t):
            logits = network.apply({"params": own}, x, t)
            return jax.nn.log_softmax(logits)[jnp.arange(4), jnp.array(labels)].sum()

        eps = sampler_lib.dual_guidance(objective.denoise(params), 2.0)
        options = {}
        if name == "ddpm":
            denoise = eps
            options["gradient"] = lambda x, t, cond: weight * jax.grad(log_prob)(x, t)
        else:

            def denoise(x, t, cond):
                std = jnp.sqrt(1 - objective.schedule.alpha_bar_at(t, 4))
                return eps(x, t, cond) - weight * std * jax.grad(log_prob)(x, t)

        x = sampler_lib.initial_noise(keys, objective.latent_shape)
        x = sampler_lib.SAMPLERS[name](
            denoise, objective.schedule, x, cond, keys, steps=3, **options
        )
        return objective.autoencoder.decode(None, x)

    images = {w: sampler.at(config)(params, batch).astype(int) for w, config in configs.items()}
    assert sampler.program._cache_size() == 1
    for weight, sampled in images.items():
        assert np.abs(sampled - by_hand(weight)).max() <= 1
    assert np.abs(images[1000.0] - images[0.0]).max() > 5


def test_a_grid_of_weights_has_one_program_and_its_own_records(trained, run):
    fields = {
        "evaluation.metrics": ("prompt_accuracy",), "evaluation.prompts": 4,
        "evaluation.grid": "classifier_guidance=0,1,2,4", "sampling.batch_size": 8,
    }  # fmt: skip
    config = guided(trained, **fields)
    samplers = []
    init = sampler_lib.Sampler.__init__

    def recording_init(self, *args):
        init(self, *args)
        samplers.append(self)

    with mock.patch.object(sampler_lib.Sampler, "__init__", recording_init):
        records = evaluate.run(config, str(run[0]))
    (sampler,) = samplers
    assert sampler.program._cache_size() == 1
    assert [record["sampling"]["classifier_guidance"] for record in records] == [0, 1, 2, 4]
    assert {record["sampling"]["classifier"]["step"] for record in records} == {4}
    with mock.patch.object(sampler_lib.Sampler, "__call__", side_effect=AssertionError("sampled")):
        assert evaluate.run(config, str(run[0])) == records
    # Without a classifier the identity equals that of older records.
    plain = tiny.evaluation(tiny.config(**DENOISER)).identity["sampling"]
    assert not {"classifier", "classifier_guidance"} & plain.keys()


def test_parameters_are_arguments_and_no_constants(trained, run):
    config = guided(trained)
    objective = tiny.objective(config)
    sampler = sampler_lib.Sampler(objective, one_device(), config.sampling)
    program, scales = sampler_lib.SamplingProgram.create(config.sampling, 16, sampler.classifier)
    args = run[1], sampler.frozen, create_batch(objective, [1]), np.arange(1), scales
    generate = partial(sampler_lib.generate, objective=objective, program=program)
    closed = jax.make_jaxpr(generate)(*args)
    largest = max((np.size(constant) for constant in closed.consts), default=0)
    assert largest < objective.schedule.timesteps + 1


def test_mode_sample_writes_guided_images(trained, run):
    """The sampler has a classifier; its images are tested above."""
    guides = []

    def sample_zeros(sampler, params, batch):
        guides.append(sampler.frozen["classifier"])
        return np.zeros((len(batch["label"]), 16, 16, 3), np.uint8)

    with mock.patch.object(sampler_lib.Sampler, "__call__", sample_zeros):
        out = sample.run(guided(trained, **{"sampling.n": 2}), str(run[0]))
    assert (out / "000001.png").exists() and len(guides) == 1


def changed(trained, tmp_path, **fields):
    """Copy the classifier's folder with other values of config fields."""
    shutil.copytree(trained, tmp_path / "other")
    config = dataclasses.asdict(tiny.config(steps=4, **FIELDS))
    for name, value in fields.items():
        group, _, field = name.partition(".")
        config[group][field] = value
    (tmp_path / "other/config.json").write_text(create_config(config).to_json())
    return tmp_path / "other"


@pytest.mark.parametrize(
    "fields",
    [
        {"data.resolution": 32},
        {"diffusion.schedule": "cosine"},
        {"diffusion.beta_end": 0.02},
        {"diffusion.base_resolution": 8},
        {"autoencoder.scale": 2.0},
        {"autoencoder.name": "kl"},
    ],
)
def test_a_classifier_of_other_noised_images_is_refused(trained, tmp_path, fields):
    config = guided(changed(trained, tmp_path, **fields))
    ((field, value),) = fields.items()
    with pytest.raises(ConfigError, match=f"sampling.classifier: it has {field}={value}, this"):
        sampler_lib.Sampler(tiny.objective(config), one_device(), config.sampling)


def test_a_classifier_of_equal_noise_levels_is_accepted(trained, tmp_path):
    config = guided(changed(trained, tmp_path, **{"diffusion.base_resolution": 16}))
    sampler_lib.Sampler(tiny.objective(config), one_device(), config.sampling)


def test_a_classifier_of_other_classes_is_refused(trained):
    config = guided(trained, **{"data.classes": 30})
    message = "its classes .10: .* are not those of this model .30: "
    with pytest.raises(ConfigError, match=message):
        sampler_lib.Sampler(tiny.objective(config), one_device(), config.sampling)


def test_a_classifier_in_the_latents_of_another_autoencoder_is_refused(tmp_path):
    fields = {"autoencoder.name": "kl", "autoencoder.size": "tiny", "model.size": "tiny/1"}
    objective = tiny.objective(tiny.config(**DENOISER | fields))
    config = tiny.config(**FIELDS | fields | {"model.size": "tiny"})
    noisy_classifier = classification.create(config, objective.vocabulary)
    folder = Workdir(str(tmp_path))
    file = tmp_path / "autoencoder.safetensors"
    file.write_bytes(b"weights")
    autoencoder = dataclasses.replace(objective.frozen["autoencoder"], path=str(file))
    objective.__dict__["frozen"] = {"autoencoder": autoencoder}  # replaces the cached property
    for digest, refused in ((weights.sha256([file]), False), ("ab", True)):
        folder.encoders.write_text(json.dumps({"autoencoder": digest}))
        message = "latents of other files than those at autoencoder.path"
        with pytest.raises(ConfigError, match=message) if refused else contextlib.nullcontext():
            classifier_guide._check_compatible(noisy_classifier, objective, folder)


def test_a_folder_without_a_classifier_is_refused(run, tmp_path):
    for path, message in (
        (tmp_path / "none", "no run here"),
        (run[0], "has trained diffusion"),
    ):
        config = guided(path)
        with pytest.raises(ConfigError, match=f"sampling.classifier: .*{message}"):
            sampler_lib.Sampler(tiny.objective(config), one_device(), config.sampling)


def test_an_unfinished_classifier_is_refused(trained, tmp_path):
    path = changed(trained, tmp_path)
    shutil.rmtree(path / "checkpoints")
    config = guided(path)
    with pytest.raises(ConfigError, match="sampling.classifier: .*no checkpoints here"):
        sampler_lib.Sampler(tiny.objective(config), one_device(), config.sampling)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"data.semantics": "text"}, "data.semantics: must be class"),
        ({"model.name": "dit_ln", "model.size": "tiny/4"}, "model.name: must be unet"),
        ({"data.name": "latents"}, "data.name: "),
        ({"evaluation.metrics": ("prompt_accuracy",)}, "evaluation.metrics: must be empty"),
        ({"init.path": "x"}, "init.path: must be empty"),
        ({"sampling.classifier": "x"}, "sampling.classifier: must be empty"),
    ],
)
def test_fields_that_classification_does_not_support_are_named(fields, message):
    fields |= {"autoencoder.name": "kl"} if "data.name" in fields else {}
    with pytest.raises(ConfigError, match=f"^{message}.*objective=classification"):
        tiny.config(**FIELDS | fields)


def test_contradictory_sampling_fields_are_named():
    with pytest.raises(ConfigError, match="sampling.classifier: guides to a class"):
        tiny.config(**{"sampling.classifier": "x"})
    with pytest.raises(ConfigError, match="classifier_guidance: needs sampling.classifier"):
        tiny.config(**CLASSES, **{"sampling.classifier_guidance": 2.0})


def test_a_classifier_is_not_sampled():
    with pytest.raises(ConfigError, match="objective: classification has no denoiser"):
        tiny.objective(tiny.config(**FIELDS))


def test_the_config_has_the_classes_of_its_argument():
    for classes in (10, 30):
        config = create_config(classifier_config.get_config(f"classes={classes}"))
        assert config.objective == "classification" and config.data.classes == classes
