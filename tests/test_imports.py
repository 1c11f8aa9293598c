"""Imports run one way: beavertails_v <- safe_rlhf_v <- guard, and inside safe_rlhf_v from types up to the command."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("beavertails_v", "safe_rlhf_v", "guard")
FILES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))

# Inside safe_rlhf_v a file imports from its own layer or a lower one.
LAYERS = [
    {"types", "fields", "arguments", "config_io", "files", "random_state"},
    {"console", "errors", "culprit", "jobs", "processes", "command_line"},
    {"tensors"},
    {"losses", "advantages", "duals", "cost_measures", "constraint"},
    {"statistics"},
    {"algorithms"},
    {"config"},
    {"vlm"},
    {"generation", "distributed"},
    {"roles"},
    {"training"},
    {"online"},
    {"direct"},
    {"iterative"},
    {"evaluation"},
    {"refinement"},
    {"stages"},
    {"planning", "demo"},
    {"comparison"},
    {"cli"},
]
APPLICATION = {"stages", "planning", "demo", "comparison", "cli"}  # what may know the guard
MATHS = {"tensors", "losses", "advantages", "duals", "cost_measures", "constraint"}


def module(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path) -> set[str]:
    """Every module named in an import statement, those inside functions included."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import; name the module in full"
            found.add(node.module or "")
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def packages(path: Path) -> set[str]:
    return {name.partition(".")[0] for name in imports(path)}


def layer(name: str) -> int | None:
    """Layer of a module of safe_rlhf_v, or None for the package itself."""
    parts = name.split(".")
    if parts[0] != "safe_rlhf_v" or len(parts) == 1:
        return None
    return next((i for i, names in enumerate(LAYERS) if parts[1] in names), None)


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_imports_run_one_way(path: Path) -> None:
    (package, room), used = path.relative_to(ROOT).parts[:2], packages(path)
    if package == "beavertails_v":
        assert not used & {"torch", "transformers", "safe_rlhf_v", "guard"}
    elif package == "safe_rlhf_v":
        assert room in APPLICATION or "guard" not in used
    else:
        assert not {name.split(".")[1] for name in imports(path) if name.startswith("safe_rlhf_v.")} & APPLICATION
    own = layer(module(path))
    if own is not None:
        above = {name for name in imports(path) if (layer(name) or 0) > own}
        assert not above, f"{name_of(path)} imports from a higher layer: {sorted(above)}"


@pytest.mark.parametrize("path", [p for p in FILES if p.stem in MATHS and p.parent.name == "safe_rlhf_v"], ids=name_of)
def test_maths_needs_torch_and_the_standard_library_alone(path: Path) -> None:
    assert packages(path) <= set(sys.stdlib_module_names) | {"torch", "safe_rlhf_v"}


def test_every_module_has_a_layer() -> None:
    modules = [module(path) for path in FILES if path.is_relative_to(ROOT / "safe_rlhf_v")]
    assert [name for name in modules if layer(name) is None] == ["safe_rlhf_v"]


def test_the_check_sees_imports_in_functions(tmp_path: Path) -> None:
    file = tmp_path / "file.py"
    file.write_text("def f():\n    from safe_rlhf_v import cli\n    import torch.nn\n")
    assert imports(file) == {"safe_rlhf_v", "safe_rlhf_v.cli", "torch.nn"}


def test_nothing_needs_torchvision() -> None:
    """It replaces a CPU build of torch by a CUDA one."""
    assert [name_of(path) for path in FILES if "torchvision" in packages(path)] == []
