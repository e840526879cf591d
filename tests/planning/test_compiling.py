"""Memory estimates of compiled programs, complete and before code generation."""

import math
import multiprocessing
import os
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import SingleDeviceSharding

from condiff_jax.config.errors import ConfigError
from condiff_jax.objectives.vocabulary import load_vocabulary
from condiff_jax.planning import compiling, hlo, plan, topology
from tests import tiny


def lower_tiny(name):
    """Lower the tiny train step for a topology of four chips."""
    with tiny.few_layers():
        config = tiny.config(**{"parallel.fsdp": 4, "model.attention": "xla"})
        vocabulary = load_vocabulary(config)
        return plan.lower(plan.lower_step, config, topology.parse(name), vocabulary)


def lower_sort(rows):
    """Lower a program of one chip with large temporaries of short lifetimes."""
    device = SingleDeviceSharding(topology.parse("v5e:1x1").devices()[0])

    def sort(x, w):
        def layer(h, w):
            h = jax.nn.relu(h @ w)
            return h, h

        _, features = jax.lax.scan(layer, x, w)
        return jnp.sum(jnp.sort(features, axis=0).astype(jnp.float32), axis=(0, 2))

    x = jax.ShapeDtypeStruct((rows, 1024), jnp.bfloat16, sharding=device)
    w = jax.ShapeDtypeStruct((8, 1024, 1024), jnp.bfloat16, sharding=device)
    return jax.jit(sort).lower(x, w), {"x": x, "w": w}


def lower_layers(rows):
    """Lower a program of one chip that compiles fast, with temporaries of rows x 4 kB."""
    device = SingleDeviceSharding(topology.parse("v5e:1x1").devices()[0])
    x = jax.ShapeDtypeStruct((rows, 1024), jnp.float32, sharding=device)
    w = jax.ShapeDtypeStruct((1024, 1024), jnp.float32, sharding=device)
    return jax.jit(lambda x, w: jax.nn.relu(x @ w) @ w).lower(x, w), {"x": x, "w": w}


def raise_error(error):
    raise error


def exit_process():
    os._exit(9)


@pytest.mark.parametrize(
    "program", [(lower_layers, 1024), pytest.param((lower_tiny, "v5e:2x2"), marks=pytest.mark.slow)]
)
def test_early_and_complete_estimates_agree(tmp_path, program):
    lower, size = program
    early = compiling.measure_early(lower, size)
    complete = compiling.measure(*lower(size), dump=str(tmp_path))
    assert complete.complete and not early.complete
    assert (early.inputs, early.total) == (complete.inputs, complete.total)
    assert hlo.collectives(early.runs) == hlo.collectives(complete.runs)
    assert bool(hlo.collectives(complete.runs)) == (lower is lower_tiny)  # of several chips
    assert hlo.cycles(complete.runs) > 0 == hlo.cycles(early.runs)


def test_a_program_that_does_not_fit_is_infinite():
    assert compiling.measure_early(lower_layers, 2**21).total == math.inf  # 3 x 8 GiB of 16


@pytest.mark.slow
def test_a_program_that_compiles_fits_and_others_are_infinite(tmp_path):
    """JAX's figure of the first is above the chip's 16 GiB, as it counts fragmentation twice."""
    lowered, inputs = lower_sort(195 * 1024)
    estimate = compiling.measure(lowered, inputs, dump=str(tmp_path))
    assert estimate.inputs == {"x": 195 * 2**21, "w": 8 * 2**21}
    assert 12 * 2**30 < estimate.total < 16 * 2**30 < compiling.measure(lowered, inputs).total
    assert compiling.measure_early(lower_sort, 195 * 1024).total == estimate.total
    assert compiling.measure_early(lower_sort, 400 * 1024).total == math.inf


@pytest.mark.parametrize(
    "error, raised",
    [
        (ConfigError("model", "no such thing"), ConfigError("model", "no such thing")),
        (ValueError("not\nso"), RuntimeError("not so")),
    ],
)
def test_errors_of_the_compiler_process_are_raised(error, raised):
    with pytest.raises(type(raised), match=str(raised)):
        compiling.measure_early(raise_error, error)


def test_a_compiler_process_that_dies_is_an_error():
    with pytest.raises(RuntimeError, match="compiler process ended early"):
        compiling.measure_early(exit_process)


def write_pid_and_wait(path):
    path.write_text(str(os.getpid()))
    time.sleep(100)


def test_the_compiler_process_ends_with_its_parent(tmp_path):
    """Otherwise a killed parent would leave it compiling for an hour."""
    path = tmp_path / "pid"
    waiting = multiprocessing.get_context("spawn").Process(
        target=compiling.measure_early, args=(write_pid_and_wait, path)
    )
    waiting.start()
    while not (path.exists() and path.read_text()):
        assert waiting.is_alive()
        time.sleep(0.1)
    compiler = int(path.read_text())
    assert runs(compiler)
    waiting.kill()
    waiting.join()
    end = time.monotonic() + 20
    while runs(compiler) and time.monotonic() < end:
        time.sleep(0.1)
    assert not runs(compiler)


def runs(pid):
    """Return whether the process exists and is not a zombie."""
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


COMPILE_ONLY = """
from condiff_jax.runtime import process; process.compile_only()
import jax
from condiff_jax.planning import topology
device = jax.sharding.SingleDeviceSharding(topology.parse("v5e:1x1").devices()[0])
jax.jit(lambda x: 2 * x).lower(jax.ShapeDtypeStruct((8,), "float32", sharding=device)).compile()
"""


def test_compilers_of_absent_devices_leave_the_users_cache_alone(tmp_path):
    """They cannot load from it: JAX would warn of each program, and compile it again."""
    environment = {
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    subprocess.run([sys.executable, "-c", COMPILE_ONLY], env=os.environ | environment, check=True)
    assert not list(tmp_path.iterdir())
