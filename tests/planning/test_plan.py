"""Mode plan: names of topologies, programs compiled for absent TPUs, and the printed figures.

libtpu compiles without a TPU; it is installed with the extra `test`.
"""

import importlib.util
import json
import math

import jax
import pytest

from condiff_jax.conditioning.cond import Cond
from condiff_jax.config.errors import ConfigError
from condiff_jax.models import clip, kl, layers, unet, unet2d
from condiff_jax.objectives.validate import create_config
from condiff_jax.planning import compiling, hlo, plan, topology
from condiff_jax.planning.hlo import Run
from condiff_jax.runtime import flops, sharding
from configs import recipes
from tests import tiny


@pytest.mark.parametrize(
    "name, kind, grid",
    [
        ("v5e:8x8", "v5e", (8, 8)),
        ("v5e-64", "v5e", (8, 8)),
        ("v5litepod-8", "v5e", (2, 4)),
        ("v6e-32", "v6e", (4, 8)),
        ("v6e-1", "v6e", (1, 1)),
        ("v4-8", "v4", (2, 2, 1)),  # TensorCores, two a chip
        ("v4-32", "v4", (2, 2, 4)),
        ("v5p-256", "v5p", (4, 4, 8)),
        ("v5p:2x2x1", "v5p", (2, 2, 1)),
        ("h100:1x8", "h100", (1, 8)),
        ("a100:2x8", "a100", (2, 8)),
    ],
)
def test_names(name, kind, grid):
    parsed = topology.parse(name)
    assert (parsed.kind, parsed.grid, parsed.size) == (kind, grid, math.prod(grid))
    assert parsed.chip is flops.CHIPS[kind]


@pytest.mark.parametrize(
    "name",
    ["", "v5e", "v5e:8", "v5e:2x2x2", "v4:4x4", "v5e-48", "v4-9", "v9x:2x2", "v5e:0x4", "h100-8",
     "h100:8", "a100-40:1x8", "v5e:8x8:2"],
)  # fmt: skip
def test_unknown_names_are_errors_with_examples(name):
    with pytest.raises(
        ConfigError, match=r"--topology: .* is unknown; examples: v5e:8x8 or v5e-64"
    ):
        topology.parse_all(f"v5e:2x2,{name}")


@pytest.mark.parametrize("name, extra", [("v5e:2x2", "tpu"), ("h100:1x8", "cuda12")])
def test_a_missing_compiler_says_what_to_install(monkeypatch, name, extra):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ConfigError, match=rf'run pip install -e "\.\[{extra}\]"'):
        topology.parse(name).devices()


def test_a_grid_that_no_slice_has():
    with pytest.raises(ConfigError, match="--topology: v5e:3x5: .*divisible"):
        topology.parse("v5e:3x5").devices()


@pytest.mark.parametrize("name, devices", [("v5e-1", 1), ("v4-128", 64), ("v6e-256", 256)])
def test_devices_are_of_the_kind_and_take_a_mesh(name, devices):
    target = topology.parse(name)
    described = target.devices()
    assert len(described) == target.size == devices
    assert described[0].device_kind in target.chip.kinds
    assert sharding.create_mesh(0, described).shape["fsdp"] == min(8, devices)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"parallel.fsdp": 3}, "parallel.fsdp: must divide the 4 devices of v5e:2x2, got 3"),
        ({"batch_size": 10}, "batch_size: must be a multiple of 4 devices of v5e:2x2 x"),
        ({"optimizer.accumulate": 8}, r"x optimizer.accumulate=8"),
    ],
)
def test_configs_that_do_not_divide(changes, message):
    with pytest.raises(ConfigError, match=message):
        plan.run(tiny.config(**changes), "v5e:2x2")


def test_a_missing_topology_is_an_error():
    with pytest.raises(ConfigError, match="--topology: missing"):
        plan.run(tiny.config(), None)


@pytest.mark.parametrize("first", [1, 7, 100, 5000])
@pytest.mark.parametrize("power", [1.0, 0.9, 1.2])
@pytest.mark.parametrize("fixed", [0, 50, 150])
def test_the_largest_batch_is_a_boundary(first, power, fixed):
    """Memory of 50 + size^power; `fixed` is what the search assumes for size 0."""
    sizes = []

    def total(size):
        sizes.append(size)
        return 50 + size**power

    fits, fails = plan.largest(total, 1050, first, fixed, probes=40)
    assert total(fits) <= 1050 < total(fails) and fails - fits <= max(1, fits // 16)
    tries = sizes[:-2]  # the last two are this test's
    assert len(tries) <= 12 and len(set(tries)) == len(tries) and tries[0] == first
    if power == 1 and fixed == 50:
        assert (fits, fails) == (1000, 1001) or first == 5000
        assert len(tries) <= (7 if first == 1 else 6)


def test_the_search_ends_where_nothing_fits_and_when_probes_are_used():
    assert plan.largest(lambda size: math.inf, 10, 8, 0, probes=40) == (0, 1)
    assert plan.largest(lambda size: 0, 10, 8, 0, probes=1) == (8, None)


class Fake(plan.Planner):
    """Planner of programs of 1 GiB per image and device; half with remat, a quarter with fsdp."""

    def estimate(self, lower_program, config, *, complete=False):
        size = config.batch_size if lower_program is plan.lower_step else 1
        share = {"none": 1, "dots": 0.75, "block": 0.5}[config.model.remat]
        share *= 0.25 if config.parallel.fsdp == 0 else 1
        needed = plan.GIB * size / self.topology.size * share / config.optimizer.accumulate
        line = "%f = f32[] fusion()"
        if complete:
            line += ', backend_config={"estimated_cycles":"1500000000"}'
        return compiling.MemoryEstimate({}, needed, [Run(line, "main", 2)], complete)


@pytest.mark.parametrize(
    "batch, fields, remedy, fits",
    [
        (64, {}, None, 16),
        (128, {}, {"model.remat": "block"}, 16),
        (256, {}, {"parallel.fsdp": 0}, 16),
        (512, {}, {"parallel.fsdp": 0, "model.remat": "block"}, 16),
        (512, {"model.remat": "block"}, {"parallel.fsdp": 0}, 32),
        (1024, {}, {"parallel.fsdp": 0, "model.remat": "block", "optimizer.accumulate": 2}, 16),
        (4096, {}, None, 16),
    ],
)
def test_printed_figures(monkeypatch, capsys, batch, fields, remedy, fits):
    monkeypatch.setattr(plan, "Planner", Fake)
    monkeypatch.setattr(plan, "device_bytes", lambda _: 0)  # of an empty batch
    plan.run(tiny.config(batch_size=batch, **fields), "v5e:2x2,v5e-4")
    out = capsys.readouterr().out
    records = [json.loads(line) for line in out.splitlines() if line.startswith("{")]
    assert [record["topology"] for record in records] == ["v5e:2x2", "v5e-4"]
    assert out.splitlines()[-1].startswith("{")
    assert records[0]["train"]["fits"] == (batch == 64)
    assert records[0].get("remedy") == remedy
    assert records[0]["largest"]["fits"] in range(fits - fits // 16, fits + 1)
    if batch == 64:
        assert records[0]["train"]["seconds"] == 2.0  # 3 * 10^9 cycles at 1.5 GHz
        assert records[0]["train"]["images_per_sec"] == 32 and "32 images/s" in out
    else:
        assert "DOES NOT FIT" in out and "seconds" not in records[0]["train"]
    assert records[0]["sampler"]["seconds"] == 2.0
    if remedy:
        assert " ".join(f"--config.{k}={v}" for k, v in remedy.items()) in out


def test_times_are_left_out_on_request(monkeypatch, capsys):
    monkeypatch.setattr(plan, "Planner", Fake)
    monkeypatch.setattr(plan, "device_bytes", lambda _: 0)
    plan.run(tiny.config(batch_size=64), "v5e:2x2", times=False)
    out = capsys.readouterr().out
    assert "estimated" not in out and "seconds" not in json.loads(out.splitlines()[-1])["train"]


@pytest.fixture(scope="module")
def compiled():
    """Return figures of a tiny train step by fsdp: replicated parameters, and sharded ones."""
    with tiny.few_layers():
        figures = {}
        for fsdp in (1, 4):
            config = tiny.config(**{"parallel.fsdp": fsdp})
            figures[fsdp] = plan.Planner(config, topology.parse("v5e:2x2")).train(complete=True)
        return figures


@pytest.mark.slow
def test_the_train_step_compiles_for_tpus(compiled):
    for figures in compiled.values():
        assert figures["fits"] and 0 < figures["gib"]["total"] < 0.1
        assert 1e-6 < figures["seconds"] < 0.1 and 0 < figures["mfu"] < 0.1
    replicated, sharded = (compiled[fsdp]["gib"] for fsdp in (1, 4))
    for name in ("parameters", "average", "optimizer"):
        assert sharded[name] < 0.5 * replicated[name]
    assert replicated["average"] == replicated["parameters"]
    assert replicated["parameters"] == pytest.approx(replicated["optimizer"] / 2, 1e-3)


@pytest.mark.slow
def test_data_parallel_reduces_all_gradients_once(compiled):
    size = compiled[1]["gib"]["parameters"] * plan.GIB / 1e9  # f32, as the gradients of f32 compute
    sent = compiled[1]["sent_gb"]
    assert set(sent) == {"all-reduce"}
    assert sent["all-reduce"] == pytest.approx(2 * 3 / 4 * size, rel=0.01)


@pytest.mark.slow
def test_fsdp_gathers(compiled):
    assert compiled[4]["sent_gb"]["all-gather"] > 0


def test_the_sampler_compiles_for_tpus():
    with tiny.few_layers():
        config = tiny.config(**{"sampling.batch_size": 6})
        figures = plan.Planner(config, topology.parse("v5e:2x2")).sample(complete=True)
    assert figures["batch_size"] == 8 and figures["fits"] and figures["images_per_sec"] > 0


@pytest.mark.parametrize("fields", [{}, {"data.name": "latents", "encode.text": True}])
def test_a_recipe_of_the_paper_lowers_for_a_slice(fields):
    """The step contains the autoencoder and CLIP's text tower, without their weight files."""
    values = recipes.paper("ours", "cc12m", 256)
    values.update_from_flattened_dict(fields)
    config = create_config(values)
    target = topology.parse("v5e-64")
    planner = plan.Planner(config, target)
    mesh = sharding.create_mesh(config.parallel.fsdp, planner.devices)
    objective = plan.diffusion.create(planner.config, planner.vocabulary)
    lowered, inputs = plan.lower_step(objective, mesh)
    assert "mhlo.num_partitions = 64" in lowered.as_text()
    assert compiling.device_bytes(inputs["parameters"]) == pytest.approx(4 * 791.6e6 / 8, rel=0.01)
    tower = 123.06e6  # parameters of CLIP ViT-L/14's text tower, bf16
    leaves = jax.tree.leaves(inputs["encoders"]["text_encoder"])
    assert sum(a.size * a.dtype.itemsize for a in leaves) == pytest.approx(2 * tower, 0.01)


@pytest.mark.parametrize(
    "name, dtype, backend",
    [
        ("v5e:2x2", "float32", "flash"),
        ("h100:1x8", "bfloat16", "cudnn"),
        ("h100:1x8", "float32", "xla"),
    ],
)
def test_the_attention_backend_is_that_of_the_topology(monkeypatch, name, dtype, backend):
    monkeypatch.setattr(topology.Topology, "devices", lambda _: [])
    planner = plan.Planner(tiny.config(**{"model.dtype": dtype}), topology.parse(name))
    assert planner.config.model.attention == backend


def test_data_parallel_reduces_all_gradients_once_on_any_device():
    """The same on eight devices of this machine."""
    with tiny.few_layers():
        objective = tiny.objective(tiny.config())
        lowered, inputs = plan.lower_step(objective, sharding.create_mesh(1))
    size = sum(4 * a.size for a in jax.tree.leaves(objective.shapes))
    sent = hlo.collectives(compiling.measure(lowered, inputs).runs)
    assert sent == {"all-reduce": pytest.approx(2 * 7 / 8 * size, rel=0.01)}


def test_fsdp_sends_parameters_and_not_activations():
    """Three times the parameters: gathered forward and backward, and their gradients scattered.

    `layers.constrain_batch` ensures it; the features of one block are larger for this batch. With
    small batches XLA may send features where they are smaller than the parameters.
    """
    config = tiny.config(batch_size=2048, **{"parallel.fsdp": 8})
    with tiny.few_layers():
        objective = tiny.objective(config)
        lowered, inputs = plan.lower_step(objective, sharding.create_mesh(8))
    sent = sum(hlo.collectives(compiling.measure(lowered, inputs).runs).values())
    parameters = sum(4 * a.size for a in jax.tree.leaves(objective.shapes))
    assert parameters < sent < 3.2 * parameters


def forward_sends(name, module, inputs):
    """Return the bytes that each of eight devices sends with sharded parameters of a module."""
    mesh = sharding.create_mesh(8)
    inputs = plan.with_sharding(inputs, sharding.batch_sharding(mesh))
    shapes = {name: jax.eval_shape(module.init, jax.random.key(0), *inputs)["params"]}
    params = jax.tree.map(plan.with_sharding, shapes, sharding.tree_shardings(mesh, shapes))
    lowered = jax.jit(
        sharding.traced_on(mesh, lambda params, inputs: module.apply({"params": params}, *inputs)),
        out_shardings=sharding.batch_sharding(mesh),
    ).lower(params[name], inputs)
    return sum(hlo.collectives(compiling.measure(lowered, {"parameters": params}).runs).values())


def clip_texts(batch):
    """Texts gathered from other devices: would be 24 GB a step instead of 5 at XL/2's size."""
    size = clip.Size(width=128, depth=2, heads=2, hidden=512, words=64, length=8)
    ids = jax.numpy.zeros((batch, size.length), int)
    return "text_encoder", clip.TextTower(size), (ids, ids)


def unet_features(batch):
    """Features that upsampling convolutions would gather from all examples."""
    size = unet.Size((32, 32), (False, False), 16, heads=1, resnets=1)
    zeros = jax.numpy.zeros(batch, int)
    inputs = jax.numpy.zeros((batch, 4, 4, 4)), zeros, Cond.of(zeros)
    return "model", unet.UNet(size, classes=3), inputs


def unet_classes(batch):
    """Features that attention to one class token would gather from all examples."""
    size = unet.Size((32, 96), (False, True), 64, head_size=8, resnets=1)
    zeros = jax.numpy.zeros(batch, int)
    inputs = jax.numpy.zeros((batch, 8, 8, 4)), zeros, Cond.of(zeros)
    return "model", unet.UNet(size, classes=3), inputs


def unet2d_classes(batch):
    """Class embeddings, which are added to the time embedding of all layers."""
    size = unet2d.Size((32, 64), (False, True), resnets=1, groups=8)
    zeros = jax.numpy.zeros(batch, int)
    inputs = jax.numpy.zeros((batch, 8, 8, 3)), zeros, Cond.of(zeros)
    return "model", unet2d.UNet2D(size, classes=3, conditioner="adanorm"), inputs


def autoencoder_images(batch):
    """Features of the decoder's upsampling convolutions."""
    network = kl.AutoencoderKL(kl.Size((32, 64), resnets=1))
    return "autoencoder", network, (jax.numpy.zeros((batch, 16, 16, 3)),)


@pytest.mark.parametrize(
    "case",
    [
        clip_texts,
        unet_features,
        unet_classes,
        pytest.param(unet2d_classes, marks=pytest.mark.slow),
        pytest.param(autoencoder_images, marks=pytest.mark.slow),
    ],
)
def test_other_networks_do_not_send_activations(case):
    sent = [forward_sends(*case(batch)) for batch in (64, 256)]
    assert 0 < sent[1] < 1.02 * sent[0], sent


def lower_transformer(batch):
    """Lower the gradient of two UNet blocks, conditioned on one token, for TPUs that shard them."""
    mesh = sharding.create_mesh(8, topology.parse("v5e:2x4").devices())
    block = unet.TransformerBlock(12, 32, True, "flash", jax.numpy.bfloat16)
    x = jax.ShapeDtypeStruct((batch, 16, 16, 384), jax.numpy.bfloat16)
    context = jax.ShapeDtypeStruct((batch, 1, 512), jax.numpy.bfloat16)
    shapes = {"model": jax.eval_shape(block.init, jax.random.key(0), x, context)["params"]}
    shardings = sharding.tree_shardings(mesh, shapes)

    def loss(params, x, context):
        for _ in range(2):
            x = block.apply({"params": params["model"]}, layers.constrain_batch(x), context)
        return jax.numpy.square(layers.constrain_batch(x).astype(float)).mean()

    params = jax.tree.map(plan.with_sharding, shapes, shardings)
    inputs = plan.with_sharding((x, context), sharding.batch_sharding(mesh))
    step = jax.jit(sharding.traced_on(mesh, jax.grad(loss)), out_shardings=shardings)
    return step.lower(params, *inputs), {"parameters": params}


@pytest.mark.slow
def test_attention_on_tpus_does_not_send_activations():
    """The partitioner of TPUs, unlike that of CPUs, would gather the outputs of cross-attention."""
    sent = [
        hlo.collectives(compiling.measure_early(lower_transformer, n).runs) for n in (256, 1024)
    ]
    assert sent[0] == sent[1] and sum(sent[0].values()) > 0
