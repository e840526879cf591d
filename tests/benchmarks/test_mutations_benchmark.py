"""benchmarks.mutations: the list of faults is up to date, and outcomes are reported."""

import ast
import dataclasses
import functools
import json

import pytest

from benchmarks import mutations
from benchmarks.faults import FAULTS, Fault


@functools.cache
def functions(path):
    """The source of the decorators of each function of a file."""
    tree = ast.parse((mutations.ROOT / path).read_text())
    return {
        node.name: [ast.unparse(decorator) for decorator in node.decorator_list]
        for node in tree.body
        if isinstance(node, ast.FunctionDef)
    }


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: f"{fault.file}: {fault.name}")
def test_faults_are_in_their_files_once_and_their_tests_exist(fault):
    source = (mutations.ROOT / fault.file).read_text()
    assert source.count(fault.text) == 1
    compile(source.replace(fault.text, fault.replacement), fault.file, "exec")
    assert fault.tests
    for test in fault.tests:
        path, name = test.split("::")
        name, case, _ = name.partition("[")
        decorators = functions(path)[name]
        assert "pytest.mark.slow" not in decorators  # the default suite finds it
        assert not case or any("parametrize" in decorator for decorator in decorators)


def test_there_are_at_least_60_faults_with_unique_names():
    assert len(FAULTS) >= 60
    assert len({(fault.file, fault.name) for fault in FAULTS}) == len(FAULTS)
    assert len({(fault.file, fault.text, fault.replacement) for fault in FAULTS}) == len(FAULTS)


EQ_4 = next(fault for fault in FAULTS if "Eq. 4: s lambda" in fault.name)
SAME = dataclasses.replace(EQ_4, name="factors", replacement="1 + (scale - 1) * upsampling")


def test_faults_are_made_one_at_a_time_and_their_tests_run(monkeypatch, tmp_path, capsys):
    """Of a fault and an equivalent change of the same line, only the fault is found."""
    monkeypatch.setattr(mutations, "FAULTS", (SAME, EQ_4))
    out = tmp_path / "record.json"
    assert mutations.main([f"--out={out}"]) == 1
    assert "1 survived, 1 killed in" in capsys.readouterr().out
    record = json.loads(out.read_text())
    assert record["counts"] == {"survived": 1, "killed": 1} and record["versions"]["jax"]
    assert [fault["outcome"] for fault in record["faults"]] == ["survived", "killed"]
    assert record["faults"][1]["replacement"] == EQ_4.replacement


@pytest.fixture
def checkout(tmp_path):
    """A repository with one line and a test of it."""
    (tmp_path / "line.py").write_text("VALUE = 1\n")
    (tmp_path / "test_line.py").write_text(
        "def test_line():\n    import line; assert line.VALUE == 1\n"
    )
    return tmp_path


def fault(**changed):
    parts = {"name": "two", "file": "line.py", "text": "= 1", "replacement": "= 2"}
    return Fault(**parts | {"tests": ("test_line.py",)} | changed)


def test_a_fault_is_undone_and_an_equivalent_one_is_no_survivor(checkout):
    assert mutations.outcome(checkout, fault()) == "killed"
    assert (checkout / "line.py").read_text() == "VALUE = 1\n"
    same = {"replacement": "= 1.0", "equivalent": "the same number"}
    assert mutations.outcome(checkout, fault(**same)) == "equivalent"


def test_missing_text_and_tests_that_do_not_run_are_errors(checkout):
    with pytest.raises(ValueError, match="two: line.py has this 0 times, not once: = 7"):
        mutations.outcome(checkout, fault(text="= 7"))
    with pytest.raises(RuntimeError, match="test_none.py cannot be run"):
        mutations.outcome(checkout, fault(tests=("test_none.py",)))
