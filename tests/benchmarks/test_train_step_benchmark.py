"""benchmarks.train_step on tiny networks, and its record."""

import json
from types import SimpleNamespace

import pytest
import torch

from benchmarks import parity, train_methods, train_step
from benchmarks.timing import OURS, THEIRS
from condiff_jax.models import unet
from condiff_jax.training import step
from tests import tiny

TINY = ["--size=tiny/4", "--side=8", "--batch=2", "--steps=1", "--repetitions=2", "--no-compile"]


@pytest.fixture(autouse=True)
def few_layers():
    with tiny.few_layers():
        yield


@pytest.fixture(scope="module")
def cache():
    """The cache of `once`."""
    return {}


@pytest.fixture
def once(cache, monkeypatch):
    """Create our train step and its parameters once for all tests."""

    def first(name, call):
        def create(*args):
            if name not in cache:
                cache[name] = call(*args)
            return cache[name]

        return create

    for module, name in ((step, "compile_step"), (train_methods, "create_params")):
        monkeypatch.setattr(module, name, first(name, getattr(module, name)))


@pytest.mark.slow
def test_both_frameworks_take_the_same_step(once, capsys, tmp_path):
    path = tmp_path / "record.json"
    assert train_step.main([*TINY, f"--save={path}"]) == 0
    record = json.loads(path.read_text())
    ours, theirs = record["rows"]
    assert (ours["method"], theirs["method"]) == (OURS, THEIRS)
    assert theirs["speed"] == {THEIRS: 1.0} and ours["speed"][THEIRS] > 0
    expected = 3 * record["gflop_forward"] * 2 / ours["seconds"] / 1e3
    assert ours["tflops"] == pytest.approx(expected) and "mfu" not in ours
    assert record["agreement"][THEIRS]["grad_norm_error"] > 0  # computed by another framework
    assert "speed against" in capsys.readouterr().out


def test_another_network_fails(once, capsys, monkeypatch, tmp_path):
    create = train_methods.create_reference

    def perturbed(*args):
        network = create(*args)
        with torch.no_grad():
            network.transformer_blocks[1].attn1.to_v.weight *= 1.5
        return network

    monkeypatch.setattr(train_methods, "create_reference", perturbed)
    assert train_step.main([*TINY, f"--save={tmp_path / 'none.json'}"]) == 1
    assert capsys.readouterr().err.startswith("error: the methods disagree")
    assert not (tmp_path / "none.json").exists()


def test_unets_are_compared_too(monkeypatch):
    small = unet.Size((8, 16), (False, True), 16, head_size=8, resnets=1)
    monkeypatch.setitem(unet.SIZES, "tiny", small)
    options = train_step.parse(["--model=unet", "--size=tiny", "--side=8", "--batch=2"])
    objective = train_methods.create_objective(options)
    params = parity.random_like(objective.shapes)
    network = train_methods.create_reference(objective, params)
    assert train_methods.count(params) == sum(p.numel() for p in network.parameters())
    x, ones = torch.zeros(2, 4, 8, 8), torch.ones(2, dtype=torch.long)
    assert network(x, ones, ones).sample.shape == x.shape


def test_the_torch_step_is_adam_with_an_ema():
    """Adam's first step changes every weight by the learning rate."""
    options = train_step.parse(TINY)
    objective = train_methods.create_objective(options)
    network = torch.nn.Conv2d(4, 4, 1)
    step = train_methods.TorchStep(network, objective, train_methods.create_batch(objective, 2), 1)
    step.call = lambda x, t, labels: SimpleNamespace(sample=network(x))
    before = [p.detach().clone() for p in network.parameters()]
    step.run()
    settings = objective.config.optimizer
    for old, new, average in zip(before, network.parameters(), step.average, strict=True):
        moved = new.detach() - old
        torch.testing.assert_close(moved.abs(), torch.full_like(moved, settings.learning_rate))
        torch.testing.assert_close(average, old + (1 - settings.ema) * moved)


@pytest.mark.parametrize("limit", [0, 7, 8, 100, 1000])
@pytest.mark.parametrize("begin", [1, 8, 40, 4096])
def test_largest_batch_is_found(limit, begin):
    tried = []
    assert train_step.find_largest(lambda n: tried.append(n) or n <= limit, begin) == limit // 8 * 8
    assert len(set(tried)) == len(tried) and not any(n % 8 for n in tried)


def fake_child(limits, calls):
    """A replacement of `child` for a GPU on which batches up to `limits` fit."""

    def child(options, **changes):
        calls.append(changes)
        if "only" not in changes:
            agreed = {train_step.METHODS[name]: {} for name in limits}
            return {
                "device": "NVIDIA H100 80GB HBM3", "agreement": agreed, "attention": {},
                "left_out": {}, "rows": [], "gflop_forward": 100.0, "peak_tflops": 989.0,
                "settings": vars(options),
            }  # fmt: skip
        name, batch = changes["only"], changes["batch"]
        if batch > limits[name]:
            return None
        title = train_step.METHODS[name]
        seconds = [[batch / (200.0 if name == "ours" else 100.0), 1.0]]
        return {"seconds": {title: seconds}, "memory": {title: 2**30 * batch}}

    return child


def test_each_method_is_timed_at_its_largest_and_at_the_common_batch(monkeypatch, tmp_path):
    calls, path = [], tmp_path / "record.json"
    monkeypatch.setattr(train_step, "child", fake_child({"ours": 50, "eager": 30}, calls))
    flags = ["--dtype=bfloat16", "--batch=16", "--largest", f"--save={path}"]
    assert train_step.main(flags) == 0
    record = json.loads(path.read_text())
    assert record["largest"] == {OURS: 48, THEIRS: 24}
    rows = [(row["batches"], row["method"], row["batch"]) for row in record["rows"]]
    assert rows == [
        ("common", OURS, 24), ("common", THEIRS, 24),
        ("largest", OURS, 48), ("largest", THEIRS, 24),
    ]  # fmt: skip
    for row in record["rows"]:
        rate = 200 if row["method"] == OURS else 100
        assert row["speed"] == {THEIRS: rate / 100} and row["memory_gib"] == row["batch"]
        assert row["mfu"] == pytest.approx(3 * 100 * rate / 1e3 / 989)
    turns = [(call["only"], call["batch"]) for call in calls[1:] if "steps" not in call]
    assert turns == 2 * [("ours", 24), ("eager", 24), ("ours", 48)]


def test_a_batch_that_never_fits_is_an_error(capsys, monkeypatch):
    monkeypatch.setattr(train_step, "child", fake_child({"ours": 50, "eager": 7}, []))
    assert train_step.main(["--largest"]) == train_step.NO_MEMORY
    assert capsys.readouterr().err == "error: not even 8 fit in diffusers\n"


def test_flags_go_to_children():
    options = train_step.parse([*TINY, "--largest", "--attention=xla"])
    assert train_step.parse(train_step.to_flags(vars(options))) == options


@pytest.mark.parametrize("text", ["RESOURCE_EXHAUSTED: Out of", "CUDA out of memory. Tried"])
def test_no_memory_has_its_exit_code(capsys, monkeypatch, text):
    def full(options):
        raise RuntimeError(text)

    monkeypatch.setattr(train_step, "run", full)
    assert train_step.main([]) == train_step.NO_MEMORY
    assert capsys.readouterr().err.startswith("error: out of memory at --batch=8")


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--size=Z/2"], "model.size"),
        (["--side=7"], "multiple of"),
        (["--model=unet", "--size=tiny", "--unroll=2"], "model.unroll"),
        (["--cores=x"], "--cores: must be among"),
    ],
)
def test_bad_input_is_one_line(capsys, flags, message):
    assert train_step.main(flags) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and message in error


def test_steps_are_at_least_one(capsys):
    with pytest.raises(SystemExit):
        train_step.main(["--steps=0"])
    assert "--steps must be at least 1" in capsys.readouterr().err


def test_recorded_steps_are_equal():
    record = json.loads(train_step.RESULTS.read_text())
    assert train_step.agree(record, record["settings"]["dtype"])
    assert {OURS, THEIRS} <= {row["method"] for row in record["rows"]}
