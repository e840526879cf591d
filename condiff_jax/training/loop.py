"""Training: a pure train step, and the loop around it."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import optax
from absl import logging
from jax.sharding import Mesh
from tqdm import tqdm

from condiff_jax.conditioning.cond import Cond
from condiff_jax.conditioning.dropout import drop_flags
from condiff_jax.config.errors import ConfigError
from condiff_jax.config.schema import Config
from condiff_jax.data.pipeline import batches, first_controls
from condiff_jax.diffusion.loss import denoising_loss, draw_timesteps
from condiff_jax.diffusion.prediction import loss_weight
from condiff_jax.evaluation import evaluate
from condiff_jax.models.autoencoder import Latents
from condiff_jax.models.mdt import MDT, hide
from condiff_jax.objectives import classification, reconstruction
from condiff_jax.objectives.diffusion import (
    System,
    Trainable,
    Vocabulary,
    create_vocabulary,
    open_source,
)
from condiff_jax.objectives.diffusion import create as create_system
from condiff_jax.objectives.reconstruction import Reconstructor
from condiff_jax.runs import optimizer, state
from condiff_jax.runs.checkpoint import Checkpoints, abstract_state
from condiff_jax.runs.workdir import Workdir, write
from condiff_jax.runtime import flops, sharding
from condiff_jax.runtime.distributed import Interrupt
from condiff_jax.runtime.process import Stopped
from condiff_jax.sampling import classifier_guide
from condiff_jax.sampling.classifier_guide import NoisyClassifier
from condiff_jax.training import encode, transfer
from condiff_jax.training.meters import Meter, Trace, Watchdog, throughput
from condiff_jax.training.reporters.diffusion import Reporter


def draw_noise(key: jax.Array, system: System, batch: int) -> dict[str, jax.Array]:
    """All randomness of one step, each use with its own key; leading dimension B."""
    settings = system.config.conditioning
    key_t, key_eps, key_drop, key_text, key_hide, key_latent = jax.random.split(key, 6)
    drop_semantics, drop_control = drop_flags(
        key_drop, batch, settings.drop_semantics, settings.drop_control, settings.drop_mode
    )
    noise = {
        "t": draw_timesteps(key_t, batch, system.schedule.timesteps),
        "eps": jax.random.normal(key_eps, (batch, *system.latent_shape)),
        "drop_semantics": drop_semantics,
        "drop_control": drop_control,
    }
    if system.text_encoder is not None and settings.padding == "noisy_replicate":
        text = system.config.text_encoder
        noise["text"] = jax.random.normal(key_text, (batch, text.length, text.width))
    if isinstance(system.autoencoder, Latents):
        noise["latent"] = jax.random.normal(key_latent, (batch, *system.latent_shape))
    if isinstance(system.model, MDT) and system.model.mask_ratio:
        tokens = math.prod(system.latent_shape[:2]) // system.model.patch**2
        noise["hidden"] = hide(key_hide, batch, tokens, system.model.mask_ratio)
    return noise


def loss_fn(
    params: dict, batch: dict, noise: dict, *, system: System, frozen: dict | None = None
) -> jax.Array:
    """Mean loss of a batch with given noise, (); MDTv2 adds the loss of its masked pass.

    frozen: see `System.load_frozen`.
    """
    params = {**params, **(frozen or {})}
    cond: Cond = system.condition(params, batch, noise.get("text"))
    cond = cond.replace(drop_semantics=noise["drop_semantics"], drop_control=noise["drop_control"])
    x0 = system.clean(params, batch, noise.get("latent"))
    inputs = (system.schedule, x0, noise["t"], noise["eps"], cond)
    loss = denoising_loss(system.denoise(params), *inputs)
    if "hidden" in noise:
        loss = loss + denoising_loss(system.denoise(params, hidden=noise["hidden"]), *inputs)
    weight = loss_weight(system.schedule, noise["t"], system.config.diffusion.prediction)
    return (weight * loss).mean()


def objective(system: Trainable) -> tuple[Callable, Callable]:
    """(draw_noise, loss) of what `config.objective` names.

    draw_noise(key, system, batch size, step) -> noise; loss(params, batch, noise, system=, frozen=)
    -> (mean (), its parts by name).
    """
    if isinstance(system, Reconstructor):
        return reconstruction.draw_noise, reconstruction.loss_fn
    if isinstance(system, NoisyClassifier):
        return classification.draw_noise, classification.loss_fn
    return (
        lambda key, system, batch, step: draw_noise(key, system, batch),
        lambda *inputs, **settings: (loss_fn(*inputs, **settings), {}),
    )


def accumulated(value_and_grad: Callable, params: dict, inputs, parts: int):
    """Mean of what value_and_grad gives for `parts` equal parts of a batch, one after the other.

    Part j takes every parts-th example, so each part is spread over all devices like the whole.
    """
    if parts == 1:
        return value_and_grad(params, *inputs)
    inputs = jax.tree.map(
        lambda a: a.reshape(a.shape[0] // parts, parts, *a.shape[1:]).swapaxes(0, 1), inputs
    )

    def add(total, part):
        return jax.tree.map(jnp.add, total, value_and_grad(params, *part)), None

    first = jax.tree.map(lambda a: a[0], inputs)
    shapes = jax.eval_shape(value_and_grad, params, *first)
    zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), shapes)
    total, _ = jax.lax.scan(add, zeros, inputs)
    return jax.tree.map(lambda a: a / parts, total)


def train_step(
    train_state: state.State,
    batch: dict,
    frozen: dict | None = None,
    *,
    system: Trainable,
    tx: optax.GradientTransformation,
) -> tuple[state.State, dict]:
    """One update; the noise of step i comes from (config.seed, i). Pure, to be jitted.

    frozen: parameters that are not trained, see `System.load_frozen`.
    """
    settings = system.config.optimizer
    key = jax.random.fold_in(jax.random.key(system.config.seed), train_state.step)
    draw, loss = objective(system)
    noise = draw(key, system, batch["label"].shape[0], train_state.step)
    value_and_grad = jax.value_and_grad(partial(loss, system=system, frozen=frozen), has_aux=True)
    (mean, parts), grads = accumulated(
        value_and_grad, train_state.params, (batch, noise), settings.accumulate
    )
    metrics = {
        **parts,
        "loss": mean,
        "grad_norm": optax.global_norm(grads),
        "broken": batch["broken"].sum(),
    }
    train_state = state.update(
        train_state, grads, tx, ema=settings.ema, ema_warmup=settings.ema_warmup
    )
    return train_state, metrics


def compile_step(system: Trainable, mesh: Mesh):
    """(init, step): jitted `State` creation from a key, and the sharded, donating train step.

    step(state, batch, frozen) -> (state, metrics).
    """
    tx = optimizer.create(system.config)
    places = jax.tree.map(lambda a: a.sharding, abstract_state(system, mesh))
    init = jax.jit(lambda key: state.create(system.init(key), tx), out_shardings=places)
    step = jax.jit(
        sharding.traced_on(mesh, partial(train_step, system=system, tx=tx)),
        in_shardings=(places, sharding.batch_sharding(mesh), None),  # frozen: as they are placed
        out_shardings=(places, sharding.replicated(mesh)),
        donate_argnums=0,
    )
    return init, step


def forward_flops(system: Trainable) -> int:
    """FLOPs of the denoiser for one image, multiply-add = 2; those of encoders are left out.

    Of an autoencoder's training: of coding and decoding, without critic and LPIPS.
    """
    if isinstance(system, Reconstructor):
        return reconstruction.forward_flops(system)
    if isinstance(system, NoisyClassifier):
        return classification.forward_flops(system)
    params = system.shapes
    # Other attention is a kernel, whose products nobody sees.
    system = dataclasses.replace(system, model=system.model.clone(backend="xla"))
    x = jax.ShapeDtypeStruct((1, *system.latent_shape), jnp.float32)
    t = jax.ShapeDtypeStruct((1,), jnp.int32)
    cond = jax.eval_shape(system.example_cond)
    return flops.count(lambda params, *inputs: system.denoise(params)(*inputs), params, x, t, cond)


def trainable(config: Config, vocabulary: Vocabulary) -> Trainable:
    """What `config.objective` trains; nothing is allocated."""
    if config.objective == "reconstruction":
        return reconstruction.create(config)
    create = classifier_guide.create if config.objective == "classification" else create_system
    return create(config, vocabulary)


def run(config: Config, workdir: str) -> bool:
    """Mode `train`: start, resume or notice that all is done; whether it is (SIGTERM saves first).

    An experiment of several stages runs them in order, the first in its folder pretrain/.
    """
    with Workdir(workdir).locked():
        return _run(config, workdir)


def _run(config: Config, workdir: str) -> bool:
    mesh = sharding.create_mesh(config.parallel.fsdp)
    if config.batch_size % (mesh.size * config.optimizer.accumulate):
        raise ConfigError(
            "batch_size",
            f"must be a multiple of {mesh.size} devices x "
            f"optimizer.accumulate={config.optimizer.accumulate}, got {config.batch_size}",
        )
    evaluate.check(config)
    source = open_source(config)
    coded = config.objective == "reconstruction"
    vocabulary = Vocabulary((), ()) if coded else create_vocabulary(config, source)
    system = trainable(config, vocabulary)
    if config.data.name == "latents":
        encode.check(system, source)
    folder = Workdir(workdir)
    checkpoints = Checkpoints(folder.checkpoints, config, create=True)
    first = checkpoints.latest
    folder.open(config, vocabulary, begun=first is not None)
    done = (first or 0) >= config.steps
    if done and folder.grid(first).exists():  # the last thing that a run leaves
        print(f"Nothing to do: {workdir} has finished its {config.steps} steps.")
        return True
    frozen = sharding.put(mesh, folder.load_frozen(system))
    encode_text = system.encode_text if system.text_encoder is not None else None
    data = batches(
        config, source, encode_text, first=first or 0,
        process=jax.process_index(), processes=jax.process_count(),
    )  # fmt: skip
    init, step = compile_step(system, mesh)
    step_fn = lambda train_state, batch: step(train_state, batch, frozen)  # noqa: E731
    if first is not None:
        train_state = checkpoints.restore(system, mesh)
        logging.info("resumed %s at step %d", workdir, first)
    elif config.init.pretrain or config.init.path:
        train_state = start(system, mesh, folder)
        if train_state is None:
            return False
    else:
        train_state = init(jax.random.key(config.seed))
    if isinstance(system, System) and (first is None or folder.load_control() is None):
        folder.save_control(first_controls(config, source))
    kinds = {Reconstructor: reconstruction.Reporter, NoisyClassifier: classification.Reporter}
    reporter = kinds.get(type(system), Reporter)(system, mesh, folder, frozen, first=first or 0)
    # SIGTERM may come again while the last checkpoint is being written.
    with Interrupt() as interrupt, contextlib.closing(checkpoints):
        train_state = train_steps(
            system, mesh, train_state, data, step_fn, checkpoints, reporter, interrupt
        )
    if interrupt.asked:
        reporter.close()
        print(f"Stopped at step {int(train_state.step)}; the same command goes on from there.")
        return False
    params = state.to_sample(train_state, config.sampling.ema)
    reporter.finish(int(train_state.step), params)
    return True


def start(system: System, mesh: Mesh, folder: Workdir) -> state.State | None:
    """The state at step 0 from the run that config.init names, with a report of what is kept.

    An earlier stage, init.pretrain, is trained first; None when SIGTERM stopped that.
    """
    config, settings = system.config, system.config.init
    earlier, path = settings.pretrain, settings.path or str(folder.path / "pretrain")
    if earlier is None:
        old = transfer.origin(path)
    else:
        old = create_system(earlier, create_vocabulary(earlier, open_source(earlier)))
    moves = transfer.plan(old, system)  # before days of training for nothing
    if earlier is not None:
        print(f"First stage: {earlier.steps} steps in {path}")
        if not run(earlier, path):
            return None
    steps = earlier.steps if earlier else None
    params = transfer.load(path, old, mesh, ema=settings.ema, step=steps)
    text = transfer.report(moves, transfer.shapes_of(old), transfer.shapes_of(system))
    print(f"Start from {path}:\n{text}")
    if jax.process_index() == 0:
        write(folder.path / "transfer.txt", text + "\n")
    tx = optimizer.create(config)

    def create(params: dict, key: jax.Array) -> state.State:
        return state.create(transfer.move(moves, params, system.init(key)), tx)

    places = jax.tree.map(lambda a: a.sharding, abstract_state(system, mesh))
    return jax.jit(create, out_shardings=places)(params, jax.random.key(config.seed))


def train_steps(
    system: Trainable, mesh, train_state, data, step_fn, checkpoints, reporter, interrupt
) -> state.State:
    """Steps until config.steps or an interrupt; logs, saves and shows samples on the way."""
    config = system.config
    first = int(train_state.step)
    meter, watchdog = Meter(first * config.batch_size), Watchdog(config.log.stall)
    trace = Trace(config, reporter.folder.path)
    flop_image = forward_flops(system)
    bar = tqdm(
        total=config.steps, initial=first, desc="train", unit="step", smoothing=0.05,
        disable=jax.process_index() != 0,
    )  # fmt: skip

    def log(step: int) -> None:
        values = meter.read()  # waits for the device
        values |= throughput(config, values["step_time"], flop_image)
        reporter.scalars(step, values)
        bar.set_postfix(loss=f"{values['loss']:.4f}", img_s=f"{values['images_per_sec']:.0f}")

    with bar, contextlib.closing(trace), contextlib.closing(watchdog):
        with contextlib.suppress(Stopped):  # what is done until then is saved
            for step in range(first + 1, config.steps + 1):
                trace.before(step)
                with interrupt.immediate():
                    batch = meter.wait(data)
                train_state, metrics = step_fn(train_state, sharding.put_batch(mesh, batch))
                meter.add(step, metrics, config.batch_size)
                trace.after(step, metrics)
                if step == first + 1:  # it was compiled
                    jax.block_until_ready(metrics)
                    meter.restart_clock()
                watchdog.step()
                bar.update()
                if interrupt.after(step) or step == config.steps:
                    break
                save = step % config.checkpoint.every == 0
                if save or step % config.log.every == 0:
                    log(step)
                if save:
                    checkpoints.save(step, train_state, meter.loss)
                shown, measured = config.log.samples_every, config.evaluation.every
                shown = shown and step % shown == 0
                measured = measured and step % measured == 0 and config.evaluation.metrics
                if shown or measured:
                    watchdog.close()
                    with interrupt.immediate():
                        params = state.to_sample(train_state, config.sampling.ema)
                        if shown:
                            reporter.samples(step, params)
                        if measured:
                            reporter.early(step, params)
                    meter.restart_clock()
        last = int(train_state.step)
        if meter.pending:
            log(last)
        if last > first:
            checkpoints.save(last, train_state, meter.loss)
    return train_state
