"""Imports run down: a package may import what stands on lower floors; read off the syntax trees."""

import ast
import sys
from pathlib import Path

import pytest

from tests.children import CONTEXT

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "condiff_jax"
# The lowest first. A package imports itself and lower floors, never its neighbors.
FLOORS = (
    {"config", "conditioning", "diffusion"},
    {"models", "data", "runtime"},
    {"pretrained"},
    {"objectives"},
    {"runs"},
    {"sampling"},
    {"evaluation", "pytorch"},
    {"training"},
    {"studies", "planning"},
    {"main"},
)
FLOOR = {package: floor for floor, packages in enumerate(FLOORS) for package in packages}
FORBIDDEN_LIBRARIES = {
    "conditioning": {"transformers", "tokenizers", "grain"},
    "diffusion": {"flax", "transformers", "tokenizers", "grain"},
    "data": {"jax", "flax", "optax"},
}
EXPORTED = PACKAGE / "pytorch" / "models.py"  # copied to users of PyTorch alone
# Who may import PyTorch; all but the exported files do so inside the function that needs it.
TORCH = {
    EXPORTED: {"torch"},
    PACKAGE / "pytorch" / "pipeline.py": {"torch", "diffusers"},
    PACKAGE / "pretrained" / "weights.py": {"torch"},
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
    return sorted(PACKAGE.rglob("*.py"))


def test_every_package_has_a_floor():
    assert {path.relative_to(PACKAGE).with_suffix("").parts[0] for path in modules()} == {
        "__init__",
        *FLOOR,
    }


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(ROOT)))
def test_module_imports_only_lower_floors(path):
    package = path.relative_to(PACKAGE).with_suffix("").parts[0]
    for name in imports(path):
        library, _, rest = name.partition(".")
        other = rest.partition(".")[0]
        if library == "condiff_jax" and rest != "__version__" and package != "__init__":
            assert other == package or FLOOR[other] < FLOOR[package], f"{path.name} imports {name}"
        if package == "config":
            assert library in {"condiff_jax", *sys.stdlib_module_names}
        assert library not in FORBIDDEN_LIBRARIES.get(package, ()), f"{path.name} imports {name}"
        assert library not in {"configs", "tests", "benchmarks", "tensorflow"}
        assert library not in {"torch", "diffusers"} or library in TORCH.get(path, ())


def test_no_module_imports_itself_through_others():
    """Modules of one package import each other in one direction only."""
    names = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
        for path in modules()
    }
    graph = {}
    for name, path in names.items():
        targets = {t if t in names else t.rpartition(".")[0] for t in imports(path)}
        graph[name] = (targets & names.keys()) - {name}
    while leaves := [name for name, targets in graph.items() if not targets & graph.keys()]:
        for name in leaves:
            del graph[name]
    assert not graph, f"in circles, or above one: {sorted(graph)}"


def end_with_whether_pytorch_is_loaded():
    assert "tensorboardX" in sys.modules  # all modes are loaded
    sys.exit(int("torch" in sys.modules))


def test_no_library_loads_pytorch_for_a_mode():
    process = CONTEXT.Process(target=end_with_whether_pytorch_is_loaded)
    process.start()
    process.join()
    assert process.exitcode == 0


def test_exported_models_need_pytorch_alone():
    libraries = {name.partition(".")[0] for name in imports(EXPORTED)}
    assert libraries - sys.stdlib_module_names == {"torch", "safetensors"}


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("[!_]*.py")), ids=lambda p: p.name)
def test_configs_import_only_ml_collections_and_what_they_share(path):
    shared = ("configs.base", "configs.recipes", "configs.quickstart", "configs.emoji_64")
    for name in imports(path):
        allowed = name.startswith((*shared, "condiff_jax.config.schema"))
        assert allowed or name.split(".")[0] in {"ml_collections", "dataclasses"}, name


def test_main_stays_small():
    assert len((PACKAGE / "main.py").read_text().splitlines()) <= 100
