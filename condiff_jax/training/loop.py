"""Mode `train`: the training loop."""

from __future__ import annotations

import contextlib
import dataclasses

import jax
from absl import logging
from jax.sharding import Mesh
from tqdm import tqdm

from condiff_jax.config.errors import ConfigError
from condiff_jax.config.schema import Config
from condiff_jax.data.pipeline import batches, first_controls, open_source
from condiff_jax.evaluation.evaluate import Evaluation
from condiff_jax.objectives import diffusion
from condiff_jax.objectives.base import Objective
from condiff_jax.objectives.diffusion import DiffusionObjective
from condiff_jax.objectives.registry import create_objective
from condiff_jax.objectives.vocabulary import create_vocabulary
from condiff_jax.runs import optimizer, state
from condiff_jax.runs.checkpoint import Checkpoints, abstract_state
from condiff_jax.runs.workdir import Workdir
from condiff_jax.runtime import sharding
from condiff_jax.runtime.distributed import Interrupt
from condiff_jax.runtime.files import write_file
from condiff_jax.runtime.process import Stopped
from condiff_jax.training import encode, transfer
from condiff_jax.training.meters import Meter, Trace, Watchdog, throughput
from condiff_jax.training.reporters import REPORTERS
from condiff_jax.training.step import compile_step


@dataclasses.dataclass(frozen=True)
class Outcome:
    """Result of a finished training: the record of its last evaluation, or None without one."""

    record: dict | None


def run(config: Config, workdir: str) -> Outcome | None:
    """Train a config in a work directory, or resume; None if SIGTERM stopped it after saving.

    Stages run in order: an earlier one, init.pretrain, in the folder pretrain/ of the later one.
    """
    with Workdir(workdir).locked():
        return _run(config, workdir)


def _run(config: Config, workdir: str) -> Outcome | None:
    mesh = sharding.create_mesh(config.parallel.fsdp)
    if config.batch_size % (mesh.size * config.optimizer.accumulate):
        raise ConfigError(
            "batch_size",
            f"must be a multiple of {mesh.size} devices x "
            f"optimizer.accumulate={config.optimizer.accumulate}, got {config.batch_size}",
        )
    folder = Workdir(workdir)
    evaluation = Evaluation.create(config, folder, mesh)
    source = open_source(config)
    vocabulary = create_vocabulary(config, source)
    objective = create_objective(config, vocabulary)
    if config.data.name == "latents":
        encode.check(objective, source)
    checkpoints = Checkpoints(folder.checkpoints, config, create=True)
    first = checkpoints.latest
    folder.open(config, vocabulary, begun=first is not None)
    done = (first or 0) >= config.steps
    if done and folder.grid(first).exists():  # the last file that a run writes
        print(f"Nothing to do: {workdir} has finished its {config.steps} steps.")
        return Outcome(evaluation.find(first))
    frozen = sharding.put(mesh, folder.load_frozen(objective))
    encode_text = objective.encode_text if objective.text_encoder is not None else None
    data = batches(
        config, source, encode_text, first=first or 0,
        process=jax.process_index(), processes=jax.process_count(),
    )  # fmt: skip
    init, step = compile_step(objective, mesh)
    step_fn = lambda train_state, batch: step(train_state, batch, frozen)  # noqa: E731
    if first is not None:
        train_state = checkpoints.restore(objective, mesh)
        logging.info("resumed %s at step %d", workdir, first)
    elif config.init.pretrain or config.init.path:
        train_state = start(objective, mesh, folder)
        if train_state is None:
            return None
    else:
        train_state = init(jax.random.key(config.seed))
    if config.objective == "diffusion" and (first is None or folder.load_control() is None):
        folder.save_control(first_controls(config, source))
    reporter = REPORTERS[config.objective](
        objective, mesh, folder, frozen, evaluation, first=first or 0
    )
    # Another SIGTERM may arrive while the last checkpoint is being written.
    with Interrupt() as interrupt, contextlib.closing(checkpoints):
        train_state = train_steps(
            objective, mesh, train_state, data, step_fn, checkpoints, reporter, interrupt
        )
    if interrupt.requested:
        reporter.close()
        print(f"Stopped at step {int(train_state.step)}; the same command goes on from there.")
        return None
    params = state.to_sample(train_state, config.sampling.ema)
    return Outcome(reporter.finish(int(train_state.step), params))


def start(objective: DiffusionObjective, mesh: Mesh, folder: Workdir) -> state.State | None:
    """Create the state at step 0 from the run that config.init names, and report the transfer.

    An earlier stage, init.pretrain, is trained first; returns None if SIGTERM stopped that.
    """
    config, settings = objective.config, objective.config.init
    earlier = settings.pretrain
    path = settings.path or str(folder.path / "pretrain")
    if earlier is None:
        old = transfer.load_objective(path)
    else:
        old = diffusion.create(earlier, create_vocabulary(earlier, open_source(earlier)))
    moves = transfer.plan(old, objective)  # reports a mismatch before the first stage is trained
    if earlier is not None:
        print(f"First stage: {earlier.steps} steps in {path}")
        if not run(earlier, path):
            return None
    steps = earlier.steps if earlier else None
    params = transfer.load(path, mesh, ema=settings.ema, step=steps)
    text = transfer.report(moves, transfer.shapes_of(old), transfer.shapes_of(objective))
    print(f"Start from {path}:\n{text}")
    if jax.process_index() == 0:
        write_file(folder.path / "transfer.txt", text + "\n")
    tx = optimizer.create(config)

    def create(params: dict, key: jax.Array) -> state.State:
        return state.create(transfer.move(moves, params, objective.init(key)), tx)

    shardings = jax.tree.map(lambda a: a.sharding, abstract_state(objective, mesh))
    return jax.jit(create, out_shardings=shardings)(params, jax.random.key(config.seed))


def is_due(step: int, interval: int) -> bool:
    """Whether something done every `interval` steps is due after this step; 0: never."""
    return interval > 0 and step % interval == 0


def train_steps(
    objective: Objective, mesh, train_state, data, step_fn, checkpoints, reporter, interrupt
) -> state.State:
    """Train until config.steps or an interrupt; log, save, sample and evaluate at intervals."""
    config = objective.config
    first = int(train_state.step)
    meter = Meter(first * config.batch_size)
    watchdog = Watchdog(config.log.stall)
    trace = Trace(config, reporter.folder.path)
    flop_image = objective.forward_flops()
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
        with contextlib.suppress(Stopped):  # the finished steps are saved below
            for step in range(first + 1, config.steps + 1):
                trace.before(step)
                with interrupt.immediate():
                    batch = meter.wait(data)
                train_state, metrics = step_fn(train_state, sharding.put_batch(mesh, batch))
                meter.add(step, metrics, config.batch_size)
                trace.after(step, metrics)
                if step == first + 1:  # its time includes compilation
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
                sample = is_due(step, config.log.samples_every)
                evaluate = is_due(step, config.evaluation.every) and config.evaluation.metrics
                if sample or evaluate:
                    watchdog.close()
                    with interrupt.immediate():
                        params = state.to_sample(train_state, config.sampling.ema)
                        if sample:
                            reporter.samples(step, params)
                        if evaluate:
                            reporter.evaluate_early(step, params)
                    meter.restart_clock()
        last = int(train_state.step)
        if meter.pending:
            log(last)
        if last > first:
            checkpoints.save(last, train_state, meter.loss)
    return train_state
