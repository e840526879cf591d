"""Training with several real processes: results of a single one, coordinated stops, lost ones."""

import fnmatch
import json
import signal
import time

import jax
import numpy as np
import pytest
from etils import epath

from condiff_jax.models import kl
from condiff_jax.runs.checkpoint import Checkpoints
from condiff_jax.runs.workdir import Workdir
from condiff_jax.runtime import distributed, sharding
from condiff_jax.runtime.process import STOPPED_MESSAGE
from condiff_jax.training.reporters import autoencoder
from tests import tiny
from tests.children import Children

DEVICES = 4  # of all processes together
SMALL = [
    "--config=configs/quickstart.py",
    "--config.model.name=dit_ln",  # the fastest to trace
    "--config.data.semantics=class",
    "--config.optimizer.eps=1e-3",  # Adam amplifies rounding errors of small gradients less
    "--config.model.unroll=1",
    "--config.log.every=1",
    "--config.checkpoint.every=3",
    "--config.sampling.n=4",
    "--config.sampling.steps=2",
    "--config.evaluation.metrics=('frechet_shapes',)",
    "--config.evaluation.samples=4",
]
SIZES = [
    "--config.evaluation.metrics=('frechet_shapes','size_response')",
    "--config.evaluation.size_prompts=2",
    "--config.evaluation.sizes=(12,24)",
]
ENDLESS = "--config.steps=100000"


def start(folder, *args, n=1):
    arguments = [*SMALL, f"--workdir={folder}", *args]
    return Children(arguments, folder.with_suffix(".log"), n=n, devices=DEVICES // n)


def curve(folder):
    """Return {step: loss}; assert that each step is logged once."""
    path = folder / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    records = [json.loads(line) for line in lines if line.endswith("\n")]
    assert [record["step"] for record in records] == list(range(1, len(records) + 1))
    return {record["step"]: record["loss"] for record in records}


def wait_for_step(folder, children, step):
    deadline = time.time() + 240
    while len(curve(folder)) < step:
        assert time.time() < deadline, children.outputs()
        assert all(process.is_alive() for process in children.processes), children.outputs()
        time.sleep(0.05)


def final(folder, step):
    """Restore the state of the newest checkpoint on this process's devices."""
    config = Workdir(str(folder)).load_config()
    checkpoints = Checkpoints(Workdir(str(folder)).checkpoints, config)
    assert checkpoints.latest == step
    with tiny.few_layers():
        return checkpoints.restore(tiny.objective(config), sharding.local_mesh())


def stop_one(folder, n):
    """Send SIGTERM to one of n processes and return the step after which all of them stop."""
    with start(folder, ENDLESS, n=n) as run:
        wait_for_step(folder, run, 2)
        run.processes[n // 2].terminate()
        assert run.wait(120) == [0] * n
        outputs = run.outputs()
    stopped = len(curve(folder))
    assert all(f"Stopped at step {stopped};" in output for output in outputs)
    assert (folder / "checkpoints" / str(stopped)).is_dir()
    return stopped


def finish(folder, last, *more):
    """Finish a run with two processes; losses, state and evaluation equal a single process's."""
    with start(folder, f"--config.steps={last}", *more, n=2) as run:
        assert run.wait(240) == [0, 0], run.outputs()
        assert "Finished" in run.outputs()[0] and "Finished" not in run.outputs()[1]
    single = folder.with_name("alone")
    with start(single, f"--config.steps={last}", *more) as run:
        assert run.wait(240) == [0], run.outputs()
    assert set(curve(folder)) == set(curve(single)) == set(range(1, last + 1))
    losses, expected = (list(curve(path).values()) for path in (folder, single))
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    state, expected = final(folder, last), final(single, last)
    for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
    records = [
        json.loads((path / "evaluation.jsonl").read_text())["metrics"] for path in (folder, single)
    ]
    metrics, expected = (
        {name: value for name, value in record.items() if value is not None} for record in records
    )
    assert {"frechet_shapes", *(["size_l2"] if more else [])} <= metrics.keys()
    assert metrics == pytest.approx(expected, rel=1e-3, abs=1e-4)


def test_two_processes_that_stop_and_go_on_train_the_model_of_one(tmp_path):
    finish(tmp_path / "run", stop_one(tmp_path / "run", 2) + 2)


@pytest.mark.slow
def test_any_number_of_processes_train_the_same_model(tmp_path):
    """Four processes, one of which gets SIGTERM; two, one of which is killed; two that finish.

    Losses and images equal those of one uninterrupted process, up to f32 rounding.
    """
    folder = tmp_path / "run"
    stopped = stop_one(folder, 4)
    with start(folder, ENDLESS, n=2) as run:
        wait_for_step(folder, run, stopped + 4)  # past the next checkpoint
        run.processes[1].kill()
        killed = time.time()
        codes = run.wait(60)
        assert codes[0] not in (0, None) and codes[1] == -signal.SIGKILL
        assert time.time() - killed < 60
        # Detected by a broken connection, or by the missing heartbeat.
        messages = ("another process is gone", "another task died")
        assert any(message in run.outputs()[0] for message in messages)
    checkpoints = (folder / "checkpoints").iterdir()
    reached = max(int(path.name) for path in checkpoints if path.name.isdigit())
    assert reached > stopped
    finish(folder, reached + 3, *SIZES)


@pytest.mark.slow
def test_processes_share_the_shards_of_a_cache_and_stop_with_sigterm(tmp_path):
    network = kl.AutoencoderKL(kl.SIZES["tiny"])
    shapes = jax.eval_shape(network.init, jax.random.key(0), np.zeros((1, 16, 16, 3)))["params"]
    params = tiny.random_params(shapes)
    autoencoder.export(network, params, epath.Path(tmp_path / "autoencoder"))
    arguments = [
        "--config=configs/quickstart.py",
        "--mode=encode",
        "--config.autoencoder.name=kl",
        "--config.autoencoder.size=tiny",
        f"--config.autoencoder.path={tmp_path / 'autoencoder'}",
        "--config.model.size=tiny/2",
        "--config.encode.records=1500",
        "--config.encode.shard_mb=20",
    ]

    def start(n, out):
        return Children([*arguments, f"--config.encode.path={out}"], tmp_path / f"log{n}", n=n)

    with start(2, tmp_path / "shared") as run:
        deadline = time.time() + 120
        while not list(tmp_path.glob("shared/*.array_record")):
            assert time.time() < deadline, run.outputs()
            time.sleep(0.01)
        for process in run.processes:  # process 0 first: it must wait for the connected ones
            process.terminate()
            time.sleep(1)
        assert run.wait(60) == [0, 0], print("\n=====\n".join(run.outputs()))
        assert all(STOPPED_MESSAGE in output for output in run.outputs())
        assert not (tmp_path / "shared" / "manifest.json").exists()
    contents = []
    for n, name in ((2, "shared"), (1, "alone")):
        with start(n, tmp_path / name) as run:
            assert run.wait(240) == [0] * n, run.outputs()
        contents.append({path.name: path.read_bytes() for path in (tmp_path / name).iterdir()})
    assert contents[0] == contents[1] and len(contents[0]) >= 10  # shards and the manifest


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, None),
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_PROCID": "0"}, None),  # a batch script
        ({"SLURM_STEP_NODELIST": "n[1-2]", "SLURM_NTASKS": "2"}, "Slurm"),
        ({"SLURM_STEP_NODELIST": "n1", "SLURM_NTASKS": "1"}, None),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, "Open MPI"),
        ({"OMPI_COMM_WORLD_SIZE": "1"}, None),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, "Cloud TPU on Kubernetes"),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, None),
        ({"MEGASCALE_COORDINATOR_ADDRESS": "a"}, "Cloud TPU on Kubernetes"),
    ],
)
def test_launchers_are_detected_by_their_environment(environment, expected):
    assert distributed.detect_cluster(environment) == expected


@pytest.mark.parametrize(
    ("devices", "installed", "environment", "expected"),
    [
        (["/dev/accel0"], ["libtpu"], {}, "Cloud TPU"),
        (["/dev/vfio/0"], ["libtpu"], {}, "Cloud TPU"),
        (["/dev/vfio/vfio"], ["libtpu"], {}, None),  # on any machine with vfio
        (["/dev/accel0"], [], {}, None),
        (["/dev/accel0"], ["libtpu"], {"JAX_PLATFORMS": "cpu"}, None),
        (["/dev/accel0"], ["libtpu"], {"TPU_SKIP_MDS_QUERY": "1"}, None),
        ([], ["libtpu"], {}, None),
    ],
)
def test_tpu_machines_are_detected_by_their_devices(
    devices, installed, environment, expected, monkeypatch
):
    monkeypatch.setattr(distributed.glob, "glob", lambda form: fnmatch.filter(devices, form))
    monkeypatch.setattr(
        distributed.util, "find_spec", lambda name: name if name in installed else None
    )
    assert distributed.detect_cluster(environment) == expected


@pytest.mark.parametrize(
    ("flags", "code", "message"),
    [
        (("localhost:1", 2, None), 2, "--process is missing; give --coordinator, --processes"),
        ((None, 2, 0), 2, "--coordinator is missing"),
        ((None, None, 0), 2, "--coordinator is missing"),
        (("localhost:1", 2, 2), 1, "the processes did not connect (process 2 of 2, localhost:1)"),
    ],
)
def test_processes_that_cannot_connect_exit_with_one_line(flags, code, message, capsys):
    with pytest.raises(SystemExit) as exit:
        distributed.initialize(*flags)
    error = capsys.readouterr().err
    assert exit.value.code == code and error.count("\n") == 1
    assert error.startswith(f"error: {message}")


def test_a_single_process_is_not_initialized(monkeypatch):
    monkeypatch.setattr(distributed, "detect_cluster", lambda environment: None)
    monkeypatch.setattr(jax.distributed, "initialize", None)  # would fail
    distributed.initialize(None, None, None)


@pytest.mark.parametrize("flags", [(None, None, None), ("a:1", 2, 0)])
def test_jax_detects_the_processes_without_flags(monkeypatch, flags):
    calls = []
    monkeypatch.setattr(distributed, "detect_cluster", lambda environment: "Slurm")
    monkeypatch.setattr(jax.distributed, "initialize", lambda *a, **k: calls.append((a, k)))
    monkeypatch.setattr(distributed.faulthandler, "disable", lambda: None)
    distributed.initialize(*flags)
    ((arguments, options),) = calls
    assert arguments == flags
    assert options["cluster_detection_method"] == (None if flags[0] is None else "deactivate")
    assert options["heartbeat_timeout_seconds"] < 60
