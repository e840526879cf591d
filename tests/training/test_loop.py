"""The train step and loop: equal on any number of devices, exact resume, and error messages."""

import json
import signal
from functools import cached_property
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.parity import jit, random_like
from condiff_jax.config.errors import ConfigError
from condiff_jax.data.pipeline import batches, create_source
from condiff_jax.models import MODELS
from condiff_jax.objectives import diffusion
from condiff_jax.runs import optimizer, state
from condiff_jax.runs.checkpoint import Checkpoints
from condiff_jax.runs.workdir import Workdir
from condiff_jax.runtime import sharding
from condiff_jax.runtime.distributed import Interrupt
from condiff_jax.training import loop, reporters
from condiff_jax.training import step as step_lib
from tests import rows, tiny

COMPILE_STEP = loop.compile_step
QUICK = {"model.name": "dit_ln", "data.semantics": "class"}  # the fastest model to trace


@pytest.fixture(autouse=True, scope="module")
def few_layers():
    with rows.small_models(), tiny.few_layers():
        yield


def batch_of(config):
    objective = tiny.objective(config)
    return objective, next(batches(config, create_source(config), objective.encode_text))


def loss_and_grads(objective, mesh, parts=1):
    """Loss and gradient at random parameters on a mesh."""

    @jax.jit
    def compute(params, batch, noise):
        value_and_grad = jax.value_and_grad(lambda *a: objective.loss(*a)[0])
        return step_lib.accumulated(value_and_grad, params, (batch, noise), parts)

    params = random_like(objective.shapes)
    params = jax.device_put(params, sharding.tree_shardings(mesh, params))
    _, batch = batch_of(objective.config)
    noise = jax.device_get(objective.draw_noise(jax.random.key(1), 16))
    placed = sharding.put_batch(mesh, (batch, noise))
    return jax.device_get(compute(params, *placed))


def assert_close(a, b, tolerance=2e-5):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, atol=tolerance * (1e-2 + np.abs(x).max()))


def test_first_loss_is_the_mean_square_of_what_is_predicted():
    """The model's output is zero at initialization."""
    params = None
    for prediction in ("epsilon", "v"):
        objective, batch = batch_of(tiny.config(**{"diffusion.prediction": prediction}))
        if params is None:
            params = jit(objective.init)(jax.random.key(0))
        noise = jit(objective.draw_noise, static_argnums=1)(jax.random.key(1), 16)
        root = np.sqrt(objective.schedule.alpha_bar[noise["t"]]).reshape(-1, 1, 1, 1)
        target = noise["eps"]
        if prediction == "v":
            target = root * target - np.sqrt(1 - root**2) * objective.autoencoder.encode(
                None, batch["image"], None
            )
        loss, _ = jit(objective.loss)(params, batch, noise)
        np.testing.assert_allclose(loss, np.square(target).mean(), rtol=1e-4)


def meshes():
    single = jax.sharding.Mesh(np.array(jax.devices()[:1]).reshape(1, 1), sharding.BATCH_AXES)
    return {"one": single, "data": sharding.create_mesh(1), "fsdp": sharding.create_mesh(8)}


@pytest.fixture(scope="module")
def reference():
    objective = tiny.objective(tiny.config())
    return objective, loss_and_grads(objective, meshes()["one"])


@pytest.mark.parametrize("mesh", ["data", "fsdp"])
def test_eight_devices_compute_what_one_does(reference, mesh):
    objective, expected = reference
    assert_close(expected, loss_and_grads(objective, meshes()[mesh]))


def test_parameters_are_traced_once_for_their_shapes(monkeypatch):
    """Shardings, FLOPs and transfer share them."""
    calls, init = [], diffusion.DiffusionObjective.init
    monkeypatch.setattr(
        diffusion.DiffusionObjective, "init", lambda *a: calls.append(a) or init(*a)
    )
    objective = tiny.objective(tiny.config())
    loop.compile_step(objective, sharding.local_mesh())
    assert objective.forward_flops() > 0 and len(calls) == 1
    assert objective.shapes == jax.eval_shape(objective.init, jax.random.key(7))


def test_fsdp_splits_parameters(reference):
    objective, _ = reference
    mesh = sharding.create_mesh(8)
    params = jax.eval_shape(objective.init, jax.random.key(0))
    shardings = sharding.tree_shardings(mesh, params)
    sizes = [
        np.prod(each.shard_shape(leaf.shape)) / leaf.size
        for each, leaf in zip(jax.tree.leaves(shardings), jax.tree.leaves(params), strict=True)
        if leaf.size >= 1024
    ]
    assert np.mean(np.array(sizes) == 1 / 8) > 0.9


def test_accumulation_equals_one_big_batch(reference):
    objective, expected = reference
    assert_close(expected, loss_and_grads(objective, meshes()["one"], parts=4))


def test_noise_is_a_function_of_seed_and_step():
    objective = tiny.objective(tiny.config())
    draw = lambda i: objective.draw_noise(jax.random.fold_in(jax.random.key(0), i), 64)  # noqa: E731
    first, again, other = draw(3), draw(3), draw(4)
    assert_close(first, again, 0)
    assert not np.array_equal(first["eps"], other["eps"])
    assert first["t"].min() >= 0 and first["t"].max() < 1000
    eps, text = np.asarray(first["eps"]).ravel(), np.asarray(first["text"]).ravel()
    n = min(len(eps), len(text))
    assert abs(np.corrcoef(eps[:n], text[:n])[0, 1]) < 0.05  # drawn from different keys


class Linear(diffusion.DiffusionObjective):
    """An objective whose denoiser is a * x_t with one parameter a."""

    @cached_property
    def seen(self):
        """The conditions passed to the denoiser."""
        return []

    def denoise(self, params, **inputs):
        def eps(x, t, cond):
            self.seen.append(cond)
            return params["model"] * x

        return eps


def linear(**fields):
    objective = Linear(**vars(tiny.objective(tiny.config(**fields, **{"data.semantics": "class"}))))
    rng, batch = np.random.default_rng(0), objective.example(8)
    batch["image"] = rng.integers(0, 255, batch["image"].shape, np.uint8)
    return objective, batch


def test_the_denoiser_gets_the_flags_that_are_drawn():
    objective, batch = linear()
    noise = objective.draw_noise(jax.random.key(0), 8)
    semantics, control = jnp.arange(8) % 2 == 0, jnp.arange(8) < 3
    noise |= {"drop_semantics": semantics, "drop_control": control}
    objective.loss({"model": 0.5}, batch, noise)
    (cond,) = objective.seen
    np.testing.assert_array_equal(cond.drop_semantics, semantics)
    np.testing.assert_array_equal(cond.drop_control, control)
    np.testing.assert_array_equal(cond.semantics, batch["label"])


@pytest.mark.parametrize("semantics, control", [(0.0, 1.0), (1.0, 0.0)])
def test_conditions_are_dropped_as_often_as_the_config_says(semantics, control):
    fields = {"drop_semantics": semantics, "drop_control": control, "drop_mode": "independent"}
    objective, _ = linear(**{f"conditioning.{name}": value for name, value in fields.items()})
    noise = objective.draw_noise(jax.random.key(0), 16)
    assert noise["drop_semantics"].mean() == semantics and noise["drop_control"].mean() == control


def test_the_noise_of_a_step_comes_from_its_seed_and_number():
    """The loss of a step is that of the noise of (seed, step); all are different."""
    losses = []
    for seed, step in ((0, 0), (0, 1), (1, 0), (1, 1)):
        objective, batch = linear(seed=seed)
        tx, params = optimizer.create(objective.config), {"model": jnp.array(0.5)}
        train_state = state.create(params, tx).replace(step=jnp.array(step))
        new_state, metrics = step_lib.train_step(train_state, batch, objective=objective, tx=tx)
        key = jax.random.fold_in(jax.random.key(seed), step)
        noise = objective.draw_noise(key, 8)
        expected, _ = objective.loss(params, batch, noise)
        np.testing.assert_allclose(metrics["loss"], expected, rtol=1e-6)
        assert new_state.step == step + 1
        losses.append(float(expected))
    assert len(set(losses)) == 4


def test_twenty_steps_equal_ten_and_ten_bit_for_bit(tmp_path, capsys):
    fields = {**QUICK, "checkpoint.every": 100, "sampling.n": 2, "log.every": 5}
    loop.run(tiny.config(steps=20, **fields), str(tmp_path / "whole"))
    loop.run(tiny.config(steps=10, **fields), str(tmp_path / "parts"))
    loop.run(tiny.config(steps=20, **fields), str(tmp_path / "parts"))
    config = tiny.config(steps=20, **fields)
    objective, mesh = tiny.objective(config), sharding.create_mesh(1)
    restored = []
    for name in ("whole", "parts"):
        checkpoints = Checkpoints(Workdir(tmp_path / name).checkpoints, config)
        restored.append(checkpoints.restore(objective, mesh))
    whole, parts = restored
    assert int(whole.step) == 20
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(parts), strict=True):
        np.testing.assert_array_equal(a, b)
    losses = [
        [json.loads(line)["loss"] for line in (tmp_path / n / "metrics.jsonl").open()]
        for n in ("whole", "parts")
    ]
    assert losses[0] == losses[1] and len(losses[0]) == 4
    capsys.readouterr()
    loop.run(config, str(tmp_path / "parts"))
    assert "finished its 20 steps" in capsys.readouterr().out
    with pytest.raises(ConfigError, match=r"conditioning.alpha: 8.0 -> 2.0"):
        loop.run(tiny.config(**fields, **{"conditioning.alpha": 2.0}), str(tmp_path / "parts"))
    grid, metrics = (tmp_path / "parts" / name for name in ("samples/20.png", "metrics.jsonl"))
    before = metrics.read_text(), grid.read_bytes()
    grid.unlink()  # as when the run was killed right after its last checkpoint
    assert loop.run(config, str(tmp_path / "parts"))
    assert (metrics.read_text(), grid.read_bytes()) == before
    assert list((tmp_path / "parts").glob("events*"))


def test_class_conditional_training_runs_and_learns(tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "compile_step", COMPILE_STEP)  # with the real initialization
    fields = {**QUICK, "sampling.n": 2}
    fields |= {"log.every": 10, "checkpoint.every": 100, "sampling.ema": False}
    with mock.patch.object(state, "to_sample", wraps=state.to_sample) as chosen:
        loop.run(tiny.config(steps=30, **fields), str(tmp_path))
    assert [call.args[1] for call in chosen.call_args_list] == [False]  # for the last grid
    losses = [json.loads(line)["loss"] for line in (tmp_path / "metrics.jsonl").open()]
    assert losses[-1] < 0.9 * losses[0]


def test_bad_loss_stops_with_its_step_and_keeps_the_last_checkpoint(tmp_path, monkeypatch):
    compile_step = loop.compile_step

    def compile_bad_step(objective, mesh):
        init, step = compile_step(objective, mesh)

        def bad_step(train_state, batch, frozen):
            number = int(train_state.step) + 1
            train_state, metrics = step(train_state, batch, frozen)
            if number == 3:
                metrics = {**metrics, "loss": metrics["loss"] + np.nan}
            return train_state, metrics

        return init, bad_step

    monkeypatch.setattr(loop, "compile_step", compile_bad_step)
    config = tiny.config(steps=6, **QUICK, **{"checkpoint.every": 2, "log.every": 2})
    with pytest.raises(FloatingPointError, match=r"step 3: loss nan.*learning_rate"):
        loop.run(config, str(tmp_path))
    assert Checkpoints(Workdir(tmp_path).checkpoints, config).latest == 2


def test_sigterm_is_remembered_and_the_handler_restored():
    before = signal.getsignal(signal.SIGTERM)
    with Interrupt() as interrupt:
        assert not interrupt.requested
        signal.raise_signal(signal.SIGTERM)
        assert interrupt.requested
    assert signal.getsignal(signal.SIGTERM) is before


def test_sigterm_in_the_last_step_stops_a_run_too(tmp_path, monkeypatch, capsys):
    """The work after the last step, such as an evaluation, is left to the next run."""
    finished = []
    monkeypatch.setattr(reporters.diffusion.Reporter, "finish", lambda *_: finished.append(1))

    def stopped(*arguments):
        arguments[-1].requested = True
        return arguments[2]

    config = tiny.config(steps=2)
    with monkeypatch.context() as patch:
        patch.setattr(loop, "train_steps", stopped)
        assert not loop.run(config, str(tmp_path))
    assert not finished and "goes on from there" in capsys.readouterr().out


def test_two_processes_do_not_train_in_one_folder(tmp_path):
    with (
        Workdir(tmp_path).locked(),
        pytest.raises(ConfigError, match="another process trains here"),
    ):
        loop.run(tiny.config(), str(tmp_path))
    with Workdir(tmp_path).locked():
        pass  # the first lock was released


def test_batch_must_divide_over_devices(tmp_path):
    with pytest.raises(ConfigError, match="batch_size: must be a multiple of 8 devices"):
        loop.run(tiny.config(batch_size=12), str(tmp_path))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"data.semantics": "class", "sampling.labels": (10,)},
            "sampling.labels: must be between 0 and 9, got 10",
        ),
        ({"sampling.prompt_file": "/no/such/prompts.txt"}, "does not exist"),
    ],
)
def test_bad_requests_for_the_sample_grids_stop_a_run_before_it_trains(tmp_path, fields, message):
    with pytest.raises(ConfigError, match=message):
        loop.run(tiny.config(**fields), str(tmp_path))
    assert not (tmp_path / "metrics.jsonl").exists()


@pytest.mark.parametrize("name", [name for name in MODELS if name not in ("ours", "mmdit")])
def test_every_architecture_has_a_loss_that_reaches_its_parameters(name):
    fields = {"model.name": name, "model.size": "tiny/4" if MODELS[name].patched else "tiny"}
    objective = tiny.objective(tiny.config(**fields, **{"data.semantics": "class"}))
    batch, noise = objective.example(4), objective.draw_noise(jax.random.key(0), 4)
    batch["label"] = np.arange(4, dtype=np.int32)
    params = random_like(jax.eval_shape(objective.init, jax.random.key(1)))
    loss = jit(jax.value_and_grad(lambda p: objective.loss(p, batch, noise)[0]))
    value, grads = loss(params)
    assert np.isfinite(value)
    for path, grad in jax.tree_util.tree_leaves_with_path(grads):
        # A softmax over one class token has no gradient.
        token = "cross" in sharding.path_name(path) and ("query" in str(path) or "key" in str(path))
        assert np.isfinite(grad).all() and (token or np.any(grad)), path
