"""benchmarks.same_results, on small handmade folders."""

import functools
import json
import shutil

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

from benchmarks import same_results
from configs import quickstart

ALL = ("*.jsonl", "vocabulary.json", "control.npy", "samples/**/*", "export/**/*")
METRICS = [{"step": step, "loss": step / 10, "step_time": 0.5} for step in (10, 20, 30)]
INDEX = {
    "_class_name": ["pipeline", "Ours"],
    "network": ["models", "Network"],
    "scheduler": ["a", "b"],
}
TENSORS = {"bias": np.zeros(3, np.float32), "weight": np.arange(6, dtype=np.float32).reshape(2, 3)}
PIXELS = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)


def write_lines(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


@pytest.fixture
def folders(tmp_path):
    """Two equal work directories, named run."""
    before = tmp_path / "before" / "run"
    (before / "samples" / "30-seed0").mkdir(parents=True)
    (before / "export" / "30").mkdir(parents=True)
    write_lines(before / "metrics.jsonl", METRICS)
    write_lines(before / "evaluation.jsonl", [{"step": 30, "fid": 1.5, "seconds": 2.0}])
    (before / "vocabulary.json").write_text('{"words": ["blue", "red"]}')
    np.save(before / "control.npy", np.ones((2, 8), np.float32))
    Image.fromarray(PIXELS).save(before / "samples/30-seed0/000000.png")
    (before / "samples/30-seed0/captions.txt").write_text("red\n")
    save_file(TENSORS, before / "export/30/model.safetensors", metadata={"format": "pt"})
    (before / "export/30/model_index.json").write_text(json.dumps(INDEX))
    (before / "export/30/models.py").write_text("VALUE = 1\n")
    after = tmp_path / "after" / "run"
    shutil.copytree(before, after)
    return before, after


def compare(folders, capsys, patterns=ALL):
    """Whether all files are equal, and the printed differences and notes."""
    outcomes = same_results.compare(*folders, patterns)
    lines = capsys.readouterr().out.splitlines()
    other = [line for line in lines if not line.startswith("equal: run: ")]
    assert len(lines) == len(outcomes) + sum(line.startswith("note: ") for line in lines)
    assert outcomes.count(False) == sum(line.startswith("DIFFERENT: ") for line in lines)
    return all(outcomes), other


def test_equal_folders(folders, capsys):
    assert len(same_results.compare(*folders, ALL)) == 9
    capsys.readouterr()
    assert compare(folders, capsys) == (True, [])


def test_time_measurements_may_differ(folders, capsys):
    slower = [record | {"step_time": 0.75} for record in METRICS]
    write_lines(folders[1] / "metrics.jsonl", slower)
    write_lines(folders[1] / "evaluation.jsonl", [{"step": 30, "fid": 1.5, "seconds": 3.0}])
    assert compare(folders, capsys) == (True, [])
    write_lines(folders[1] / "metrics.jsonl", [r | {"step_time_s": 1} for r in METRICS])
    assert not compare(folders, capsys)[0]  # but its fields may not


@pytest.mark.parametrize(
    "records, message",
    [
        (
            [*METRICS[:2], {**METRICS[2], "loss": np.nextafter(3.0, 4.0)}],
            "[2].loss 3.0, then 3.0000000000000004",
        ),
        ([METRICS[0], METRICS[2]], "[1].step 20, then 30"),
        (METRICS[:2], " (length) 3, then 2"),
        ([*METRICS, METRICS[2]], " (length) 3, then 4"),
        ([{**METRICS[0], "step": 10.0}, *METRICS[1:]], "[0].step 10, then 10.0"),
        (
            [{"step": 10, "step_time": 0.5}, *METRICS[1:]],
            "[0] (fields that the other lacks) ['loss'], then []",
        ),
    ],
    ids=["digit", "line", "last line", "more lines", "type", "field"],
)
def test_other_metrics(folders, capsys, records, message):
    write_lines(folders[1] / "metrics.jsonl", records)
    assert compare(folders, capsys) == (False, [f"DIFFERENT: run: metrics.jsonl: {message}"])


def test_equal_nans_are_equal():
    assert not list(same_results.json_differences([float("nan")], [float("nan")]))
    assert list(same_results.json_differences([float("nan")], [0.0]))


@pytest.mark.parametrize("index, where", [(0, "after"), (1, "before")])
def test_a_missing_file(folders, capsys, index, where):
    (folders[index] / "samples/30-seed0/000000.png").unlink()
    line = f"DIFFERENT: run: samples/30-seed0/000000.png: only {where}"
    assert compare(folders, capsys) == (False, [line])


def test_a_pattern_without_files_is_a_difference(folders, capsys):
    assert compare(folders, capsys, ["none.jsonl"]) == (
        False,
        ["DIFFERENT: run: none.jsonl: in neither"],
    )


def test_a_changed_pixel(folders, capsys):
    path = folders[1] / "samples/30-seed0/000000.png"
    Image.fromarray(PIXELS).save(path, compress_level=0)  # other bytes, the same image
    assert compare(folders, capsys) == (True, [])
    changed = PIXELS.copy()
    changed[2, 1, 0] += 1
    Image.fromarray(changed).save(path)
    line = "samples/30-seed0/000000.png: 1 of 48 values, at [2, 1, 0] 27, then 28"
    assert compare(folders, capsys) == (False, [f"DIFFERENT: run: {line}"])
    Image.fromarray(PIXELS).convert("L").save(path)
    assert compare(folders, capsys)[1] == [
        "DIFFERENT: run: samples/30-seed0/000000.png: RGB, then L"
    ]


@pytest.mark.parametrize(
    "changed, message",
    [
        (
            {"bias": np.array([0, -0.0, 0], np.float32)},  # equal, but not in each bit
            "bias: 1 of 3 values, at [1] 0.0, then -0.0",
        ),
        (
            {"weight": TENSORS["weight"] + np.float32([[0, 0, 0], [0, 0, 2**-21]])},
            "weight: 1 of 6 values, at [1, 2] 5.0, then 5.000000476837158",
        ),
        (
            {"weight": TENSORS["weight"].astype(np.float16)},
            "weight: float32 (2, 3), then float16 (2, 3)",
        ),
        (
            {"weight": TENSORS["weight"].reshape(3, 2)},
            "weight: float32 (2, 3), then float32 (3, 2)",
        ),
        ({"scale": np.ones(1, np.float32)}, "scale is in one file only"),
    ],
    ids=["sign", "bit", "type", "shape", "name"],
)
def test_changed_tensors(folders, capsys, changed, message):
    path = folders[1] / "export/30/model.safetensors"
    save_file(TENSORS | changed, path, metadata={"format": "pt"})
    line = f"DIFFERENT: run: export/30/model.safetensors: {message}"
    assert compare(folders, capsys) == (False, [line])


def test_changed_arrays_words_and_captions(folders, capsys):
    np.save(folders[1] / "control.npy", np.full((2, 8), 2, np.float32))
    (folders[1] / "vocabulary.json").write_text('{"words": ["red", "blue"]}')
    (folders[1] / "samples/30-seed0/captions.txt").write_text("blue\n")
    assert compare(folders, capsys) == (
        False,
        [
            "DIFFERENT: run: vocabulary.json: .words[0] blue, then red",
            "DIFFERENT: run: control.npy: 16 of 16 values, at [0, 0] 1.0, then 2.0",
            "DIFFERENT: run: samples/30-seed0/captions.txt: other content",
        ],
    )


def test_own_names_and_source_are_notes(folders, capsys):
    export = folders[1] / "export/30"
    index = {**INDEX, "_class_name": ["pipeline", "Theirs"]}
    (export / "model_index.json").write_text(json.dumps(index))
    (export / "models.py").rename(export / "other.py")
    assert compare(folders, capsys) == (
        True,
        [
            "note: run: export/30/model_index.json: ._class_name[1] Ours, then Theirs",
            "note: run: export/30/models.py: only before",
            "note: run: export/30/other.py: only after",
        ],
    )
    (export / "models.py").write_text("VALUE = 2\n")
    assert "note: run: export/30/models.py: other source" in compare(folders, capsys)[1]
    for other in ({"scheduler": ["a", "c"]}, {"network": ["models", 1]}):
        (export / "model_index.json").write_text(json.dumps(INDEX | other))
        assert not compare(folders, capsys)[0]


MAIN = """
import json, os, pathlib, sys
flags = dict(flag.removeprefix("--").split("=", 1) for flag in sys.argv[1:])
assert os.environ["PYTHONPATH"] == os.getcwd() and os.environ["JAX_PLATFORMS"] == "cpu"
workdir = pathlib.Path(flags["workdir"])
workdir.mkdir(exist_ok=True)
if flags["mode"] == "broken":
    sys.exit("no such mode")
with open(workdir / "metrics.jsonl", "a") as file:
    file.write(json.dumps({"steps": flags["config.steps"], "value": VALUE}) + "\\n")
"""


@pytest.fixture
def checkouts(tmp_path, monkeypatch):
    """Two checkouts of a program that writes one line per run; patches what is run and compared."""
    for name in ("one", "two"):
        (tmp_path / name / "condiff_jax").mkdir(parents=True)
        (tmp_path / name / "condiff_jax/main.py").write_text("VALUE = 1" + MAIN)
    short, long = ("--config.steps=10",), ("--config.steps=20",)
    begun, resumed = ("begun", "train", short), ("resumed", "train", long, "begun")
    monkeypatch.setattr(same_results, "RUNS", [same_results.Run(*r) for r in (begun, resumed)])
    continued = same_results.Run("continued", "train", long, "../before/begun")
    monkeypatch.setattr(same_results, "CONTINUED", [continued])
    files = {name: ["metrics.jsonl"] for name in ("begun", "resumed")}
    monkeypatch.setattr(same_results, "COMPARED", files)
    return tmp_path / "one", tmp_path / "two"


def test_runs_resume_in_copies_and_are_compared(checkouts, tmp_path, capsys):
    out = tmp_path / "out"
    assert same_results.main([*map(str, checkouts), f"--out={out}"]) == 0
    lines = (out / "after/continued/metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["steps"] for line in lines] == ["10", "20"]
    assert len((out / "before/begun/metrics.jsonl").read_text().splitlines()) == 1
    compare = capsys.readouterr().out.splitlines()
    assert compare[0].startswith("before: train begun ... ")
    assert compare[-2:] == ["equal: resumed, continued: metrics.jsonl", "all 3 equal"]


def test_other_results_and_failures_have_exit_codes(checkouts, tmp_path, capsys, monkeypatch):
    (checkouts[1] / "condiff_jax/main.py").write_text("VALUE = 2" + MAIN)
    assert same_results.main([*map(str, checkouts)]) == 1
    compare = capsys.readouterr().out.splitlines()
    assert "DIFFERENT: begun: metrics.jsonl: [0].value 1, then 2" in compare
    assert "DIFFERENT: resumed, continued: metrics.jsonl: [1].value 1, then 2" in compare
    assert compare[-1] == "3 of 3 DIFFERENT"
    monkeypatch.setattr(same_results, "RUNS", [same_results.Run("begun", "broken")])
    assert same_results.main([*map(str, checkouts)]) == 2
    assert "ended with code 1: no such mode" in capsys.readouterr().err


def test_folders_must_be_checkouts_and_out_must_be_empty(checkouts, tmp_path, capsys):
    for arguments, message in (
        ([str(checkouts[0]), str(tmp_path)], "is no checkout"),
        ([*map(str, checkouts), f"--out={tmp_path}"], "is not empty"),
    ):
        with pytest.raises(SystemExit):
            same_results.main(arguments)
        assert message in capsys.readouterr().err


def test_command_lines_name_existing_fields():
    runs = (*same_results.RUNS, *same_results.CONTINUED)
    for flag in {*same_results.COMMON, *(flag for run in runs for flag in run.flags)}:
        field = flag.partition("=")[0].removeprefix("--config.")
        functools.reduce(getattr, field.split("."), quickstart.get_config())
    assert {run.workdir for run in same_results.RUNS} == same_results.COMPARED.keys()
