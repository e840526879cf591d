"""Noisy classifiers: their training, and what they make of the sampling of denoisers."""

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
from condiff_jax.sampling.requests import requests
from condiff_jax.training import loop
from condiff_jax.training import step as step_lib
from condiff_jax.training.reporters import classifier
from configs import classifier as classifier_config
from tests import tiny

SMALL = Size((8,), (False,), 12, heads=2, resnets=1)  # only the middle attends
CLASSES = {"data.semantics": "class", "data.classes": 10, "conditioning.control": ()}
FIELDS = CLASSES | {
    "objective": "classification", "model.name": "unet", "model.size": "tiny", "log.every": 1,
    "optimizer.learning_rate": 3e-3, "optimizer.ema": 0.9,
}  # fmt: skip
IMAGES = (16, 8, 8, 3)
DENOISER = CLASSES | {"model.name": "dit_ln", "sampling.control_guidance": 1.0}


@pytest.fixture(autouse=True, scope="module")
def small():
    """Tiny sizes; trainings here are of one classifier, so they have one compiled step."""
    with tiny.few_layers(), mock.patch.dict(unet.SIZES, {"tiny": SMALL}):
        compiled, made = loop.compile_step, []

        def once(*args):
            made[:] = made or [compiled(*args)]
            return made[0]

        with mock.patch.object(loop, "compile_step", once):
            yield


@pytest.fixture(autouse=True)
def few_pictures(monkeypatch):
    monkeypatch.setattr(classifier, "PICTURES", 12)


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a classifier after 4 steps, with checkpoints of 2 and 4."""
    path = tmp_path_factory.mktemp("classifier")
    with mock.patch.object(classifier, "PICTURES", 12):
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
    shutil.rmtree(parts / "checkpoints/4")  # as if it had been killed after half of its steps
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
    (found,) = [line for line in lines(parts / "evaluation.jsonl") if line["step"] == 4]
    assert 0 <= found["accuracy"] <= 1 and (parts / "samples/4.png").exists()
    assert loop.run(config, str(parts))  # nothing to do
    assert len(lines(parts / "evaluation.jsonl")) == 1


@pytest.fixture(scope="module")
def objective():
    config = tiny.config(**FIELDS)
    return classification.create(config, create_vocabulary(config, create_source(config)))


def pictures(n):
    source = create_source(tiny.config(**FIELDS), "validation")
    records = [source[i] for i in range(n)]
    images = [center(record["image"], 16) for record in records]
    return {
        "image": jnp.asarray(np.stack(images)),
        "label": jnp.array([record["label"] for record in records]),
    }


def test_the_loss_is_the_cross_entropy_of_noised_pictures(objective):
    batch, rng = pictures(8), np.random.default_rng(0)
    params = jax.tree.map(
        lambda a: rng.normal(0, 0.3, a.shape).astype(np.float32), objective.shapes
    )
    noise = objective.draw_noise(jax.random.key(1), 8)
    assert sorted(np.asarray(noise["t"]) // 125) == list(range(8))  # one of each eighth
    run = jax.jit(objective.loss)
    loss, parts = run(params, batch, noise)
    x0 = batch["image"] / 127.5 - 1
    x = add_noise(objective.schedule, x0, noise["t"], noise["eps"])
    logits = jax.jit(objective.model.apply)({"params": params["classifier"]}, x, noise["t"])
    logits, label = np.asarray(logits, np.float64), np.asarray(batch["label"])
    probability = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    assert loss == pytest.approx(-np.log(probability[range(8), label]).mean(), rel=1e-4)
    right = logits.argmax(1) == label
    assert parts["accuracy"] == pytest.approx(right.mean())
    for i in range(4):
        inside = np.asarray(noise["t"]) // 250 == i
        assert inside.sum() == 2
        assert parts[f"accuracy_{i + 1}"] == pytest.approx(right[inside].mean())


def test_the_loss_falls_where_classes_are_seen(objective):
    """Class 0 is dark, class 1 is bright; noise hides it from some of t alone."""
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
    assert losses[0] == pytest.approx(np.log(10), rel=1e-4)  # it begins with no opinion
    assert np.mean(losses[-10:]) < 0.55  # log 2 is 0.69: more than how frequent they are
    assert metrics["accuracy_1"] == 1


def test_flops_are_those_of_the_network(objective):
    found = objective.forward_flops()
    resolution = objective.config.data.resolution
    assert found > 2 * 9 * 8 * 8 * resolution**2  # one of its convolutions


# ---------------------------------------------------------------------------------------------
# Guided sampling


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(folder, parameters) of a denoiser with random parameters."""
    path = tmp_path_factory.mktemp("denoiser")
    return path, tiny.finished(tiny.config(steps=2, **DENOISER), path)


def guided(trained, **fields):
    return tiny.config(**DENOISER | {"steps": 2, "sampling.classifier": str(trained)} | fields)


def one_device():
    return sharding.create_mesh(devices=jax.devices()[:1])


def saved(objective, path, value):
    """The folder of a classifier whose parameters are all `value`, and their averages -value."""
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
    """Also where the grid of an evaluation goes from one to another with the same sampler."""

    def guide(sampler):
        params = jax.device_get(sampler.frozen["classifier"])
        return {value for leaf in jax.tree.leaves(params) for value in leaf.ravel().tolist()}

    one, two = (saved(objective, tmp_path / str(n), n) for n in (1.0, 2.0))
    raw, other = (guided(path, **{"sampling.ema": False}) for path in (one, two))
    denoiser = tiny.objective(raw)
    sampler = sampler_lib.Sampler(denoiser, one_device(), raw.sampling)
    assert guide(sampler) == {1} and guide(sampler.at(other)) == {2}
    assert guide(sampler_lib.Sampler(denoiser, one_device(), guided(one).sampling)) == {-1}


@pytest.mark.parametrize("name", ["ddpm", pytest.param("ddim", marks=pytest.mark.slow)])
def test_sampling_takes_the_form_that_the_sampler_has(name, trained, run):
    """What `Sampler` draws is what the samplers draw with the two forms of the guidance."""
    fields = {"sampling.sampler": name, "sampling.guidance": 2.0, "sampling.clip": False}
    configs = {
        weight: guided(trained, **fields, **{"sampling.classifier_guidance": weight})
        for weight in (0.0, 1000.0)
    }
    objective, (params, asked) = tiny.objective(configs[1000.0]), (run[1], [0, 3, 5, 9])
    sampler = sampler_lib.Sampler(objective, one_device(), configs[1000.0].sampling)
    batch = requests(objective, asked)
    network, own = classifier_guide.load(objective, one_device(), configs[1000.0].sampling)

    @jax.jit
    def by_hand(weight):
        keys = sampler_lib.noise_keys(0, jnp.arange(4))[:, 1]
        cond = objective.condition(params, batch, None)

        def log_prob(x, t):
            logits = network.apply({"params": own}, x, t)
            return jax.nn.log_softmax(logits)[jnp.arange(4), jnp.array(asked)].sum()

        eps, shift = sampler_lib.dual_guidance(objective.denoise(params), 2.0), {}
        if name == "ddpm":
            denoise = eps
            shift["gradient"] = lambda x, t, cond: weight * jax.grad(log_prob)(x, t)
        else:

            def denoise(x, t, cond):
                std = jnp.sqrt(1 - objective.schedule.alpha_bar_at(t, 4))
                return eps(x, t, cond) - weight * std * jax.grad(log_prob)(x, t)

        x = sampler_lib.initial_noise(keys, objective.latent_shape)
        x = sampler_lib.SAMPLERS[name](denoise, objective.schedule, x, cond, keys, steps=3, **shift)
        return objective.autoencoder.decode(None, x)

    found = {w: sampler.at(config)(params, batch).astype(int) for w, config in configs.items()}
    assert sampler.program._cache_size() == 1
    for weight, pictures in found.items():
        assert np.abs(pictures - by_hand(weight)).max() <= 1
    assert np.abs(found[1000.0] - found[0.0]).max() > 5


def test_a_grid_of_weights_has_one_program_and_its_own_records(trained, run):
    fields = {
        "evaluation.metrics": ("prompt_accuracy",), "evaluation.prompts": 4,
        "evaluation.grid": "classifier_guidance=0,1,2,4", "sampling.batch_size": 8,
    }  # fmt: skip
    config = guided(trained, **fields)
    made = []
    created = sampler_lib.Sampler.__init__

    def noting(self, *args):
        created(self, *args)
        made.append(self)

    with mock.patch.object(sampler_lib.Sampler, "__init__", noting):
        records = evaluate.run(config, str(run[0]))
    (sampler,) = made
    assert sampler.program._cache_size() == 1
    assert [one["sampling"]["classifier_guidance"] for one in records] == [0, 1, 2, 4]
    assert {one["sampling"]["classifier"]["step"] for one in records} == {4}
    with mock.patch.object(sampler_lib.Sampler, "__call__", side_effect=AssertionError("sampled")):
        assert evaluate.run(config, str(run[0])) == records
    # Records from before there were classifiers stay what they are.
    plain = tiny.evaluation(tiny.config(**DENOISER)).identity["sampling"]
    assert not {"classifier", "classifier_guidance"} & plain.keys()


def test_parameters_are_arguments_and_no_constants(trained, run):
    config = guided(trained)
    objective = tiny.objective(config)
    sampler = sampler_lib.Sampler(objective, one_device(), config.sampling)
    program, scales = sampler_lib.SamplingProgram.create(config.sampling, 16, sampler.classifier)
    args = run[1], sampler.frozen, requests(objective, [1]), np.arange(1), scales
    made = jax.make_jaxpr(partial(sampler_lib.generate, objective=objective, program=program))(
        *args
    )
    biggest = max((np.size(constant) for constant in made.consts), default=0)
    assert biggest < objective.schedule.timesteps + 1


def test_mode_sample_writes_guided_pictures(trained, run):
    """With a sampler that the classifier guides; what one draws is measured above."""
    guides = []

    def draw(sampler, params, batch):
        guides.append(sampler.frozen["classifier"])
        return np.zeros((len(batch["label"]), 16, 16, 3), np.uint8)

    with mock.patch.object(sampler_lib.Sampler, "__call__", draw):
        out = sample.run(guided(trained, **{"sampling.n": 2}), str(run[0]))
    assert (out / "000001.png").exists() and len(guides) == 1


def changed(trained, tmp_path, **fields):
    """A copy of the classifier's folder that says it has other fields."""
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
def test_a_classifier_of_other_noised_pictures_is_refused(trained, tmp_path, fields):
    config = guided(changed(trained, tmp_path, **fields))
    ((field, value),) = fields.items()
    with pytest.raises(ConfigError, match=f"sampling.classifier: it has {field}={value}, this"):
        sampler_lib.Sampler(tiny.objective(config), one_device(), config.sampling)


def test_the_same_noise_levels_by_another_name_will_do(trained, tmp_path):
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
    found, folder = classification.create(config, objective.vocabulary), Workdir(str(tmp_path))
    file = tmp_path / "coder.safetensors"
    file.write_bytes(b"weights")
    coder = dataclasses.replace(objective.frozen["autoencoder"], path=str(file))
    objective.__dict__["frozen"] = {"autoencoder": coder}  # as the cached property keeps it
    for known, refused in ((weights.sha256([file]), False), ("ab", True)):
        folder.encoders.write_text(json.dumps({"autoencoder": known}))
        message = "latents of other files than those at autoencoder.path"
        with pytest.raises(ConfigError, match=message) if refused else contextlib.nullcontext():
            classifier_guide._check(found, objective, folder)


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
def test_what_classification_has_not_is_named(fields, message):
    fields |= {"autoencoder.name": "kl"} if "data.name" in fields else {}
    with pytest.raises(ConfigError, match=f"^{message}.*objective=classification"):
        tiny.config(**FIELDS | fields)


def test_settings_of_sampling_that_make_no_sense_are_named():
    with pytest.raises(ConfigError, match="sampling.classifier: guides to a class"):
        tiny.config(**{"sampling.classifier": "x"})
    with pytest.raises(ConfigError, match="classifier_guidance: needs sampling.classifier"):
        tiny.config(**CLASSES, **{"sampling.classifier_guidance": 2.0})


def test_a_classifier_is_not_sampled():
    with pytest.raises(ConfigError, match="objective: classification has no denoiser"):
        tiny.objective(tiny.config(**FIELDS))


def test_the_config_trains_what_it_says():
    for classes in (10, 30):
        config = create_config(classifier_config.get_config(f"classes={classes}"))
        assert config.objective == "classification" and config.data.classes == classes
