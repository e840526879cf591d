"""Several real processes: the curve of one, stopping together, and the end when one is gone."""

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
from condiff_jax.runtime.process import STOPPED
from condiff_jax.training.reporters import autoencoder
from tests import tiny
from tests.children import Children

DEVICES = 4  # of all processes together
SMALL = [
    "--config=configs/quickstart.py",
    "--config.model.name=dit_ln",  # the quickest to trace
    "--config.data.semantics=class",
    "--config.optimizer.eps=1e-3",  # else Adam makes the rounding of small gradients large
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
    """{step: loss}, and that no step is there twice."""
    path = folder / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    values = [json.loads(line) for line in lines if line.endswith("\n")]
    assert [value["step"] for value in values] == list(range(1, len(values) + 1))
    return {value["step"]: value["loss"] for value in values}


def wait_for_step(folder, children, step):
    deadline = time.time() + 240
    while len(curve(folder)) < step:
        assert time.time() < deadline, children.outputs()
        assert all(process.is_alive() for process in children.processes), children.outputs()
        time.sleep(0.05)


def final(folder, step):
    """The state of the newest checkpoint, on this process's devices."""
    config = Workdir(str(folder)).load_config()
    checkpoints = Checkpoints(Workdir(str(folder)).checkpoints, config)
    assert checkpoints.latest == step
    with tiny.few_layers():
        return checkpoints.restore(tiny.objective(config), sharding.local_mesh())


def stop_one(folder, n):
    """The step after which n processes stop when SIGTERM reaches one of them alone."""
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
    """Two processes go on to the last step; curve, state and evaluation are those of one alone."""
    with start(folder, f"--config.steps={last}", *more, n=2) as two:
        assert two.wait(240) == [0, 0], two.outputs()
        assert "Finished" in two.outputs()[0] and "Finished" not in two.outputs()[1]
    alone = folder.with_name("alone")
    with start(alone, f"--config.steps={last}", *more) as one:
        assert one.wait(240) == [0], one.outputs()
    assert set(curve(folder)) == set(curve(alone)) == set(range(1, last + 1))
    np.testing.assert_allclose(list(curve(folder).values()), list(curve(alone).values()), rtol=1e-5)
    several, single = final(folder, last), final(alone, last)
    for a, b in zip(jax.tree.leaves(several), jax.tree.leaves(single), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
    found = [
        json.loads((path / "evaluation.jsonl").read_text())["metrics"] for path in (folder, alone)
    ]
    several, single = ({k: v for k, v in one.items() if v is not None} for one in found)
    assert {"frechet_shapes", *(["size_l2"] if more else [])} <= several.keys()
    assert several == pytest.approx(single, rel=1e-3, abs=1e-4)


def test_two_processes_that_stop_and_go_on_train_the_model_of_one(tmp_path):
    finish(tmp_path / "run", stop_one(tmp_path / "run", 2) + 2)


@pytest.mark.slow
def test_any_number_of_processes_train_the_same_model(tmp_path):
    """Four processes, one of which is told to stop; two, one of which is killed; two to the end:
    the losses of one undisturbed process, to f32's rounding, and its images.
    """
    run = tmp_path / "run"
    stopped = stop_one(run, 4)
    with start(run, ENDLESS, n=2) as two:
        wait_for_step(run, two, stopped + 4)  # a checkpoint on the way
        two.processes[1].kill()
        killed = time.time()
        codes = two.wait(60)
        assert codes[0] not in (0, None) and codes[1] == -signal.SIGKILL
        assert time.time() - killed < 60
        # By a broken connection, or by the heartbeat that is missing.
        said = ("another process is gone", "another task died")
        assert any(words in two.outputs()[0] for words in said)
    reached = max(int(path.name) for path in (run / "checkpoints").iterdir() if path.name.isdigit())
    assert reached > stopped
    finish(run, reached + 3, *SIZES)


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
        for process in run.processes:  # process 0 first: it must wait for those connected to it
            process.terminate()
            time.sleep(1)
        assert run.wait(60) == [0, 0], print("\n=====\n".join(run.outputs()))
        assert all(STOPPED in output for output in run.outputs())
        assert not (tmp_path / "shared" / "manifest.json").exists()
    found = []
    for n, name in ((2, "shared"), (1, "alone")):
        with start(n, tmp_path / name) as run:
            assert run.wait(240) == [0] * n, run.outputs()
        found.append({path.name: path.read_bytes() for path in (tmp_path / name).iterdir()})
    assert found[0] == found[1] and len(found[0]) >= 10  # shards and the manifest


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
def test_who_has_started_several_processes(environment, expected):
    assert distributed.cluster(environment) == expected


@pytest.mark.parametrize(
    ("devices", "installed", "environment", "expected"),
    [
        (["/dev/accel0"], ["libtpu"], {}, "Cloud TPU"),
        (["/dev/vfio/0"], ["libtpu"], {}, "Cloud TPU"),
        (["/dev/vfio/vfio"], ["libtpu"], {}, None),  # any machine's that can lend devices
        (["/dev/accel0"], [], {}, None),
        (["/dev/accel0"], ["libtpu"], {"JAX_PLATFORMS": "cpu"}, None),
        (["/dev/accel0"], ["libtpu"], {"TPU_SKIP_MDS_QUERY": "1"}, None),
        ([], ["libtpu"], {}, None),
    ],
)
def test_tpu_machines_are_known_by_their_devices(
    devices, installed, environment, expected, monkeypatch
):
    monkeypatch.setattr(distributed.glob, "glob", lambda form: fnmatch.filter(devices, form))
    monkeypatch.setattr(
        distributed.util, "find_spec", lambda name: name if name in installed else None
    )
    assert distributed.cluster(environment) == expected


@pytest.mark.parametrize(
    ("given", "code", "message"),
    [
        (("localhost:1", 2, None), 2, "--process is missing; give --coordinator, --processes"),
        ((None, 2, 0), 2, "--coordinator is missing"),
        ((None, None, 0), 2, "--coordinator is missing"),
        (("localhost:1", 2, 2), 1, "the processes did not meet (process 2 of 2, localhost:1)"),
    ],
)
def test_processes_that_cannot_meet_are_one_line(given, code, message, capsys):
    with pytest.raises(SystemExit) as exit:
        distributed.initialize(*given)
    error = capsys.readouterr().err
    assert exit.value.code == code and error.count("\n") == 1
    assert error.startswith(f"error: {message}")


def test_one_process_alone_joins_nobody(monkeypatch):
    monkeypatch.setattr(distributed, "cluster", lambda environment: None)
    monkeypatch.setattr(jax.distributed, "initialize", None)  # would fail
    distributed.initialize(None, None, None)


@pytest.mark.parametrize("given", [(None, None, None), ("a:1", 2, 0)])
def test_what_the_cluster_knows_is_left_to_it_unless_told(monkeypatch, given):
    called = []
    monkeypatch.setattr(distributed, "cluster", lambda environment: "Slurm")
    monkeypatch.setattr(jax.distributed, "initialize", lambda *a, **k: called.append((a, k)))
    monkeypatch.setattr(distributed.faulthandler, "disable", lambda: None)
    distributed.initialize(*given)
    ((where, how),) = called
    assert where == given
    assert how["cluster_detection_method"] == (None if given[0] is None else "deactivate")
    assert how["heartbeat_timeout_seconds"] < 60
