"""benchmarks.sampling on a tiny model, and its record."""

import json

import numpy as np
import pytest

from benchmarks import sampling, timing
from tests import tiny

TINY = ["--size=tiny/4", "--batch=2", "--steps=2", "--repetitions=1", "--no-compile"]


@pytest.fixture(autouse=True)
def few_layers():
    with tiny.few_layers():
        yield


@pytest.mark.slow
def test_both_samplers_give_the_same_images(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(sampling, "RESULTS", tmp_path / "sampling.json")
    assert sampling.main([*TINY, "--save"]) == 0
    record = json.loads(sampling.RESULTS.read_text())
    assert [row["method"] for row in record["rows"]] == [
        sampling.OURS, sampling.UNDECODED, sampling.CALLS, sampling.THEIRS,
    ]  # fmt: skip
    (error,) = record["pictures"].values()
    assert error["largest"] <= 1 and error["contrast"] > 10
    assert "outside the denoiser, sampling:" in capsys.readouterr().out


def test_different_images_fail(capsys, monkeypatch):
    ours = (sampling.OURS, sampling.UNDECODED, sampling.CALLS)
    black, gray = np.zeros((2, 8, 8, 3), np.uint8), np.full((2, 8, 8, 3), 0.5)
    monkeypatch.setattr(sampling, "our_methods", lambda *_: dict.fromkeys(ours, lambda: black))
    monkeypatch.setattr(sampling, "their_methods", lambda *_: {sampling.THEIRS: lambda: gray})
    assert sampling.main(TINY) == 1
    out = capsys.readouterr()
    assert "mean 128, largest 128" in out.out and "images differ" in out.err


def test_a_method_that_does_not_compile_is_left_out():
    def broken():
        raise RuntimeError("no compiler\nhere")

    methods = {sampling.THEIRS: lambda: 1, sampling.COMPILED: broken}
    outputs, left_out = timing.warm_up(methods)
    assert outputs == {sampling.THEIRS: 1} and list(methods) == [sampling.THEIRS]
    assert left_out == {sampling.COMPILED: "RuntimeError: no compiler"}
    with pytest.raises(RuntimeError):
        timing.warm_up({sampling.OURS: broken})


def test_steps_must_divide_the_schedule(capsys):
    with pytest.raises(SystemExit):
        sampling.main(["--steps=7"])
    assert "must divide 1000" in capsys.readouterr().err


def test_recorded_images_are_equal():
    record = json.loads(sampling.RESULTS.read_text())
    assert all(
        error["mean"] < sampling.LIMITS[record["settings"]["dtype"]]
        for error in record["pictures"].values()
    )
    assert set(record["outside"]) == {"sampling", "sampling and decoding"}
