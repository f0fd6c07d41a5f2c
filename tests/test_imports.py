"""The arrows: who may import whom, read from the source of every file, function-level imports included."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
LEAVES = {"config", "geometry"}

# Part of lpmflow -> parts it may import. A part is a file of the package's top level or a folder, and may always import
# itself. "lpmflow" is the package's own __init__, which holds the public names.
ARROWS: dict[str, set[str]] = {
    "lpmflow": LEAVES | {"matcher", "result", "model", "ops"},
    "config": set(),
    "geometry": set(),
    "flowfile": set(),
    "memory": {"config"},
    "images": LEAVES,
    "visualize": LEAVES | {"result"},
    "result": LEAVES | {"visualize", "flowfile"},
    "reference": set(),
    "ops": {"reference", "lpmflow_kernels"},
    "model": LEAVES | {"ops", "memory"},
    "matcher": LEAVES | {"images", "result", "model", "memory"},
    "data": LEAVES | {"images", "memory", "flowfile"},
    "evaluation": LEAVES | {"data"},
    "training": LEAVES | {"images", "data", "model", "evaluation", "flowfile"},
    "identity": LEAVES | {"images", "result"},
    "benchmark": LEAVES
    | {"lpmflow", "images", "data", "evaluation", "matcher", "identity", "result", "visualize", "flowfile"},
    "info": LEAVES | {"lpmflow", "model", "ops"},
    "profile": LEAVES | {"matcher", "memory", "model", "ops"},
    "demo": LEAVES | {"images", "matcher", "result", "visualize", "flowfile"},
    "cli": LEAVES
    | {"lpmflow", "images", "matcher", "result", "model", "benchmark", "data", "info", "demo", "profile", "flowfile"},
    "__main__": {"cli"},
    "lpmflow_kernels": set(),
}

# Other packages -> the parts that may import them at all, for those whose place is fixed.
HOMES: dict[str, set[str]] = {
    "timm": {"model"},
    "torchvision": set(),
    "triton": {"lpmflow_kernels"},
    "matplotlib": {"visualize", "result"},
    "safetensors": {"model", "benchmark"},
    "tqdm": {"training", "benchmark", "data", "cli"},
    "skimage": set(),
    "hypothesis": set(),
    "pytest": set(),
    "tests": set(),
    "benchmarks": set(),
    "kernels": set(),
}

# What `import lpmflow` must not load, and so no file may import outside a function.
HEAVY = ("matplotlib", "timm", "PIL", "torchvision", "triton", "lpmflow_kernels")


@dataclass(frozen=True)
class Import:
    """One imported module: who imports it, and whether it is needed when that file is imported."""

    path: Path
    line: int
    part: str
    module: str
    at_import: bool

    def __str__(self) -> str:
        return f"{self.path.relative_to(ROOT)}:{self.line}: {self.part} imports {self.module}"


def sources() -> list[Path]:
    return sorted(path for folder in ("lpmflow", "kernels") for path in (ROOT / folder).rglob("*.py"))


def part_of(module: str) -> str:
    """The part of ours a dotted module name belongs to; the top-level name for other people's modules."""
    names = module.split(".")
    if names[0] != "lpmflow":
        return names[0]
    is_part = len(names) > 1 and ((ROOT / "lpmflow" / names[1]).is_dir() or (ROOT / f"lpmflow/{names[1]}.py").is_file())
    return names[1] if is_part else "lpmflow"


def module_name(path: Path) -> str:
    names = ["lpmflow_kernels" if name == "kernels" else name for name in path.relative_to(ROOT).with_suffix("").parts]
    return ".".join(names[:-1] if names[-1] == "__init__" else names)


def imports(path: Path, text: str | None = None) -> Iterator[Import]:
    """Every import in a file, `from lpmflow import x` counted as an import of the part `x` where it is one."""
    own = module_name(path)
    package = own if path.name == "__init__.py" else own.rpartition(".")[0]

    def walk(node: ast.AST, at_import: bool) -> Iterator[Import]:
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(path, node.lineno, part_of(own), alias.name, at_import)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package.split(".")[: len(package.split(".")) + 1 - node.level]) if node.level else ""
            module = ".".join(filter(None, (base, node.module or "")))
            for name in [f"{module}.{alias.name}" for alias in node.names] if module == "lpmflow" else [module]:
                yield Import(path, node.lineno, part_of(own), name, at_import)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            for name in [argument.value for argument in node.args if isinstance(argument, ast.Constant)]:
                yield Import(path, node.lineno, part_of(own), name, at_import)
        inner = at_import and not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        typing_only = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        body = node.body if isinstance(node, ast.If) and typing_only else []
        for child in ast.iter_child_nodes(node):
            yield from walk(child, inner and child not in body)

    yield from walk(ast.parse(text if text is not None else path.read_text(encoding="utf-8")), True)


def all_imports() -> list[Import]:
    return [found for path in sources() for found in imports(path)]


def test_every_part_has_a_row_in_the_table() -> None:
    assert {part_of(module_name(path)) for path in sources()} <= set(ARROWS)


def test_the_table_has_no_loops() -> None:
    # visualize draws results and results draw themselves: the one pair that may know each other.
    left = {part: targets - {"result"} if part == "visualize" else targets for part, targets in ARROWS.items()}
    while left:
        free = {part for part, targets in left.items() if not targets & set(left) - {part}}
        assert free, f"these import each other in a circle: {sorted(left)}"
        left = {part: targets for part, targets in left.items() if part not in free}


def test_arrows() -> None:
    wrong = [
        str(found)
        for found in all_imports()
        if part_of(found.module) in ARROWS and part_of(found.module) not in ARROWS[found.part] | {found.part}
    ]
    assert not wrong, "\n".join(wrong)


def test_other_packages_stay_where_they_belong() -> None:
    wrong = [
        str(found)
        for found in all_imports()
        if found.module.split(".")[0] in HOMES and found.part not in HOMES[found.module.split(".")[0]]
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("part", "allowed"), [("reference", {"torch"}), ("lpmflow_kernels", {"torch", "triton", "lpmflow_kernels"})]
)
def test_reference_and_kernels_import_next_to_nothing(part: str, allowed: set[str]) -> None:
    own = {"lpmflow.reference"} if part == "reference" else set()
    wrong = [
        str(found)
        for found in all_imports()
        if found.part == part
        and found.module.split(".")[0] not in allowed | sys.stdlib_module_names
        and not any(found.module == name or found.module.startswith(f"{name}.") for name in own)
    ]
    assert not wrong, "\n".join(wrong)


def test_heavy_packages_are_imported_inside_functions() -> None:
    # The kernels are themselves imported late, so they may import triton where they like.
    wrong = [
        str(found)
        for found in all_imports()
        if found.at_import and found.module.split(".")[0] in HEAVY and found.part != "lpmflow_kernels"
    ]
    assert not wrong, "\n".join(wrong)


def test_the_model_never_names_a_backend() -> None:
    from lpmflow.ops import BACKENDS

    wrong = []
    for path in sorted((ROOT / "lpmflow" / "model").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            named = isinstance(node, ast.Constant) and node.value in BACKENDS
            passed = isinstance(node, ast.keyword) and node.arg == "backend"
            if named or passed:
                wrong.append(f"{path.relative_to(ROOT)}:{node.lineno}")
    assert not wrong, f"a backend is named in {', '.join(wrong)}"


@pytest.mark.parametrize(
    ("file", "text", "expected"),
    [
        ("lpmflow/model/layout.py", "from lpmflow.ops import correlation", [("model", "ops", True)]),
        ("lpmflow/model/layout.py", "from ..ops.correlation import x", [("model", "ops", True)]),
        ("lpmflow/model/__init__.py", "from .layout import x", [("model", "model", True)]),
        ("lpmflow/model/__init__.py", "from .. import ops, x", [("model", "ops", True), ("model", "lpmflow", True)]),
        ("lpmflow/config.py", "def f():\n    from lpmflow import ops", [("config", "ops", False)]),
        ("lpmflow/config.py", "from lpmflow import __version__", [("config", "lpmflow", True)]),
        ("lpmflow/config.py", "class A:\n    import PIL.Image", [("config", "PIL", True)]),
        ("lpmflow/config.py", "if TYPE_CHECKING:\n    import PIL\nelse:\n    import timm",
         [("config", "PIL", False), ("config", "timm", True)]),
        ("lpmflow/config.py", "importlib.import_module('lpmflow.ops')", [("config", "ops", True)]),
        ("kernels/__init__.py", "import lpmflow.ops", [("lpmflow_kernels", "ops", True)]),
    ],
)  # fmt: skip
def test_the_reader_of_imports(file: str, text: str, expected: list[tuple[str, str, bool]]) -> None:
    found = [(one.part, part_of(one.module), one.at_import) for one in imports(ROOT / file, text)]
    assert found == expected


def test_import_lpmflow_is_light_and_quick() -> None:
    """`import lpmflow` loads not even torch, and takes a few milliseconds."""
    said = measured("import lpmflow")
    assert not {*HEAVY, "torch", "numpy"} & set(said["modules"])
    assert said["seconds"] < 0.5


def test_using_the_public_names_is_light() -> None:
    """Every public name can be had without the packages that only some uses need; triton may come with torch itself."""
    with_torch = set(measured("import torch")["modules"])
    said = measured("import lpmflow\nfor name in dir(lpmflow):\n    getattr(lpmflow, name)")
    assert {"torch", "lpmflow"} <= set(said["modules"])
    assert not set(HEAVY) & (set(said["modules"]) - with_torch)


def measured(program: str) -> dict[str, Any]:
    """Run a program in a fresh interpreter: its `seconds`, and the top-level `modules` it left loaded."""
    timed = f"import sys, time\nstart = time.perf_counter()\n{program}\nseconds = time.perf_counter() - start\n"
    report = "import json\nprint(json.dumps({'seconds': seconds, 'modules': [n for n in sys.modules if '.' not in n]}))"
    done = subprocess.run([sys.executable, "-c", timed + report], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)
