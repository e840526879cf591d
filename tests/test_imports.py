"""Imports run one way, from diffusion (JAX only) up to main; read off the syntax trees."""

import ast
import sys
from pathlib import Path

import pytest

from tests.children import CONTEXT

ROOT = Path(__file__).parents[1]
CONVERT = ROOT / "condiff_jax" / "convert"
TWIN = CONVERT / "twin.py"  # the file of PyTorch users
# Who may import PyTorch; all but the exported files do so inside the function that needs it.
TORCH = {
    TWIN: {"torch"},
    CONVERT / "pipeline.py": {"torch", "diffusers"},
    CONVERT / "weights.py": {"torch"},
}
# Part -> the parts of condiff_jax it may import; others may import anything but main.
ALLOWED = {
    "conditioning": {"conditioning"},
    "diffusion": {"diffusion"},
    "models": {"models", "conditioning"},
    "data": {"data", "conditioning.cond"},
    "metrics": {"metrics", "models", "data", "sharding"},
    "grid": set(),
    "flops": set(),
    "hlo": set(),
    "sharding": set(),
    "state": set(),
}
FORBIDDEN_LIBRARIES = {
    "diffusion": {"flax", "transformers", "tokenizers", "grain"},
    "data": {"jax", "flax", "optax"},
    "grid": {"jax", "flax"},
}


def imports(path: Path) -> set[str]:
    """Modules imported at run time (not those under `if TYPE_CHECKING`)."""
    tree = ast.parse(path.read_text())
    typing_only = {
        id(node)
        for branch in ast.walk(tree)
        if isinstance(branch, ast.If) and getattr(branch.test, "id", "") == "TYPE_CHECKING"
        for statement in branch.body
        for node in ast.walk(statement)
    }
    found = set()
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def modules() -> list[Path]:
    return sorted((ROOT / "condiff_jax").rglob("*.py"))


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(ROOT)))
def test_module_imports_only_what_its_layer_may(path):
    part = path.relative_to(ROOT / "condiff_jax").with_suffix("").parts[0]
    for name in imports(path):
        library, _, rest = name.partition(".")
        if library == "condiff_jax":
            assert not rest.startswith("main")
            if part in ALLOWED and rest != "__version__":
                allowed = any(f"{rest}.".startswith(f"{a}.") for a in ALLOWED[part])
                assert allowed, f"{path.name} imports {name}"
        assert library not in FORBIDDEN_LIBRARIES.get(part, ()), f"{path.name} imports {name}"
        assert library not in {"configs", "tests", "benchmarks", "tensorflow"}
        assert library not in {"torch", "diffusers"} or library in TORCH.get(path, ())


def end_with_whether_pytorch_is_loaded():
    assert "tensorboardX" in sys.modules  # all modes are loaded
    sys.exit(int("torch" in sys.modules))


def test_no_library_loads_pytorch_for_a_mode():
    process = CONTEXT.Process(target=end_with_whether_pytorch_is_loaded)
    process.start()
    process.join()
    assert process.exitcode == 0


def test_twin_is_copied_to_where_there_is_only_pytorch():
    libraries = {name.partition(".")[0] for name in imports(TWIN)}
    assert libraries - sys.stdlib_module_names == {"torch", "safetensors"}


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("[!_]*.py")), ids=lambda p: p.name)
def test_configs_import_only_ml_collections_and_what_they_share(path):
    for name in imports(path):
        others = ("configs.base", "configs.recipes", "configs.quickstart", "configs.emoji_64")
        shared = name.startswith(others)
        assert name.split(".")[0] == "ml_collections" or shared, name


def test_main_stays_small():
    assert len((ROOT / "condiff_jax" / "main.py").read_text().splitlines()) <= 80
