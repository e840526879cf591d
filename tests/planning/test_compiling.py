"""What programs need, and what of it is known before code is generated."""

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


def lower_tiny(place):
    """The tiny train step for four chips."""
    with tiny.few_layers():
        config = tiny.config(**{"parallel.fsdp": 4, "model.attention": "xla"})
        words = load_vocabulary(config)
        return plan.lower(plan.lower_step, config, topology.parse(place), words)


def lower_sort(rows):
    """A program of one chip with large temporaries that come and go."""
    here = SingleDeviceSharding(topology.parse("v5e:1x1").devices()[0])

    def sort(x, w):
        def layer(h, w):
            h = jax.nn.relu(h @ w)
            return h, h

        _, features = jax.lax.scan(layer, x, w)
        return jnp.sum(jnp.sort(features, axis=0).astype(jnp.float32), axis=(0, 2))

    x = jax.ShapeDtypeStruct((rows, 1024), jnp.bfloat16, sharding=here)
    w = jax.ShapeDtypeStruct((8, 1024, 1024), jnp.bfloat16, sharding=here)
    return jax.jit(sort).lower(x, w), {"x": x, "w": w}


def lower_layers(rows):
    """A program of one chip that is quick to compile, with temporaries of rows x 4 kB."""
    here = SingleDeviceSharding(topology.parse("v5e:1x1").devices()[0])
    x = jax.ShapeDtypeStruct((rows, 1024), jnp.float32, sharding=here)
    w = jax.ShapeDtypeStruct((1024, 1024), jnp.float32, sharding=here)
    return jax.jit(lambda x, w: jax.nn.relu(x @ w) @ w).lower(x, w), {"x": x, "w": w}


def complain(error):
    raise error


def end():
    os._exit(9)


@pytest.mark.parametrize(
    "program", [(lower_layers, 1024), pytest.param((lower_tiny, "v5e:2x2"), marks=pytest.mark.slow)]
)
def test_what_is_known_early_is_what_the_whole_tells(tmp_path, program):
    lower, size = program
    early = compiling.early(lower, size)
    whole = compiling.measure(*lower(size), dump=str(tmp_path))
    assert whole.whole and not early.whole
    assert (early.given, early.total) == (whole.given, whole.total)
    assert hlo.collectives(early.runs) == hlo.collectives(whole.runs)
    assert bool(hlo.collectives(whole.runs)) == (lower is lower_tiny)  # of several chips
    assert hlo.cycles(whole.runs) > 0 == hlo.cycles(early.runs)


def test_what_does_not_fit_is_infinite():
    assert compiling.early(lower_layers, 2**21).total == math.inf  # 3 x 8 GiB of 16


@pytest.mark.slow
def test_what_compiles_fits_and_what_does_not_is_infinite(tmp_path):
    """JAX's figures of the first are above the chip's 16 GiB: fragmentation is in them twice."""
    lowered, given = lower_sort(195 * 1024)
    whole = compiling.measure(lowered, given, dump=str(tmp_path))
    assert whole.given == {"x": 195 * 2**21, "w": 8 * 2**21}
    assert 12 * 2**30 < whole.total < 16 * 2**30 < compiling.measure(lowered, given).total
    assert compiling.early(lower_sort, 195 * 1024).total == whole.total
    assert compiling.early(lower_sort, 400 * 1024).total == math.inf


@pytest.mark.parametrize(
    "error, raised",
    [
        (ConfigError("model", "no such thing"), ConfigError("model", "no such thing")),
        (ValueError("not\nso"), RuntimeError("not so")),
    ],
)
def test_errors_cross_over(error, raised):
    with pytest.raises(type(raised), match=str(raised)):
        compiling.early(complain, error)


def test_a_compiler_that_dies_is_told_of():
    with pytest.raises(RuntimeError, match="has ended early"):
        compiling.early(end)


def tell_and_wait(path):
    path.write_text(str(os.getpid()))
    time.sleep(100)


def test_the_compiler_ends_with_who_waits_for_it(tmp_path):
    """Else one that is killed would leave it compiling for an hour."""
    path = tmp_path / "pid"
    waiting = multiprocessing.get_context("spawn").Process(
        target=compiling.early, args=(tell_and_wait, path)
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
    """Whether there is a process that is no zombie."""
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


COMPILE_ONLY = """
from condiff_jax import startup; startup.compile_only()
import jax
from condiff_jax import topology
here = jax.sharding.SingleDeviceSharding(topology.parse("v5e:1x1").devices()[0])
jax.jit(lambda x: 2 * x).lower(jax.ShapeDtypeStruct((8,), "float32", sharding=here)).compile()
"""


def test_compilers_of_absent_devices_leave_the_users_cache_alone(tmp_path):
    """They cannot load from it: JAX would warn of each program, and compile it again."""
    kept = {
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    subprocess.run([sys.executable, "-c", COMPILE_ONLY], env=os.environ | kept, check=True)
    assert not list(tmp_path.iterdir())
