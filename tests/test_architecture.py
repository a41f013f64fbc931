"""DESIGN.md's arrows and rules, read off the source: who imports whom, and what no product code does."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PRODUCT = ("jpaged", "pallas_kernels", "checkpoints")
MAX_LINES = 450

FILES = sorted(path.relative_to(ROOT) for package in PRODUCT for path in (ROOT / package).rglob("*.py"))
TREES = {path: ast.parse((ROOT / path).read_text()) for path in FILES}


def module_of(path: Path) -> str:
    parts = path.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path) -> Iterator[str]:
    """Absolute names of all modules that a file imports, wherever in it: `from a import b` gives a.b."""
    package = module_of(path) if path.name == "__init__.py" else module_of(path).rpartition(".")[0]
    for node in ast.walk(TREES[path]):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            yield from (".".join([*above, *filter(None, [node.module]), alias.name]) for alias in node.names)


def offenders(under: str, allowed) -> dict[str, list[str]]:
    found = {
        str(p): sorted({name for name in imports(p) if not allowed(name)}) for p in FILES if inside(module_of(p), under)
    }
    assert found, f"nothing lies under {under}"
    return {path: names for path, names in found.items() if names}


def inside(name: str, *packages: str) -> bool:
    return any(name == package or name.startswith(package + ".") for package in packages)


def test_the_walk_sees_what_is_imported():
    """The other tests say nothing if this one is wrong."""
    assert {"jpaged.memory.BlockManager", "jpaged.scheduling.plan.Bucket", "time", "numpy"} <= set(
        imports(Path("jpaged/scheduling/scheduler.py"))
    )
    assert "tokenizers.decoders.DecodeStream" in set(imports(Path("jpaged/tokenization.py"))), "also inside functions"


def test_kernels_import_only_jax():
    def allowed(name):
        return (
            inside(name, "jax", "jaxlib", "jax_triton", "triton", "numpy", "pallas_kernels")
            or name.split(".")[0] in sys.stdlib_module_names
        )

    assert offenders("pallas_kernels", allowed) == {}


def test_checkpoints_know_the_models_configuration_and_nothing_else_of_the_engine():
    assert (
        offenders("checkpoints", lambda name: not inside(name, "jpaged") or inside(name, "jpaged.models.config")) == {}
    )
    assert offenders("checkpoints", lambda name: not inside(name, "pallas_kernels")) == {}


@pytest.mark.parametrize("room", ["jpaged.memory", "jpaged.scheduling"])
def test_the_host_side_names_no_jax_and_no_device_code(room):
    assert (
        offenders(
            room,
            lambda name: not inside(name, "jax", "jaxlib", "flax", "pallas_kernels", "jpaged.runtime", "jpaged.models"),
        )
        == {}
    )


def test_memory_does_not_know_the_scheduler():
    assert offenders("jpaged.memory", lambda name: not inside(name, "jpaged") or inside(name, "jpaged.memory")) == {}


def test_models_never_see_the_scheduler_or_the_engine():
    allowed_of_jpaged = ("jpaged.models", "jpaged.errors")
    assert offenders("jpaged.models", lambda name: not inside(name, "jpaged") or inside(name, *allowed_of_jpaged)) == {}


@pytest.mark.parametrize(
    "module", ["jpaged", "jpaged.memory", "jpaged.scheduling", "jpaged.sampling_params", "jpaged.models.config"]
)
def test_what_needs_no_jax_does_not_load_it(module):
    """Whatever it imports, and whatever that imports."""
    code = f"import {module}, sys; print([m for m in ('jax', 'jaxlib', 'flax', 'transformers', 'torch') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


FORBIDDEN_MODULES = ("pickle", "cPickle", "dill", "cloudpickle", "shelve", "marshal", "torch")
FORBIDDEN_CALLS = ("eval", "exec", "compile", "__import__")


@pytest.mark.parametrize("path", FILES, ids=str)
def test_no_product_code_unpickles_evaluates_or_asserts(path):
    assert [name for name in imports(path) if inside(name, *FORBIDDEN_MODULES)] == []
    for node in ast.walk(TREES[path]):
        assert not isinstance(node, ast.Assert), f"line {node.lineno}: validate with a typed error"
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id not in FORBIDDEN_CALLS, f"line {node.lineno}"
        if isinstance(node, ast.keyword):
            assert node.arg not in ("allow_pickle", "trust_remote_code") or is_false(node.value), (
                f"line {node.value.lineno}"
            )


def is_false(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and node.value is False


@pytest.mark.parametrize("path", FILES, ids=str)
def test_no_file_needs_a_table_of_contents(path):
    assert len((ROOT / path).read_text().splitlines()) <= MAX_LINES


@pytest.mark.parametrize("path", FILES, ids=str)
def test_every_module_says_what_it_is(path):
    assert ast.get_docstring(TREES[path]) or path.name == "__main__.py"
