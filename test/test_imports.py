"""Who may import what. The two tables below are the rule; the rest of the file enforces them by parsing the source."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "pi05_ros"

# A part of the package -> what its files may import, beside the standard library and the part itself. Names of this
# package are written without `pi05_ros.`; a name covers what is below it. The longest matching part decides.
CONTRACTS = "schema config errors numpy"
ROS = ("rclpy rcl_interfaces lifecycle_msgs sensor_msgs sensor_msgs_py std_msgs std_srvs trajectory_msgs "
       "diagnostic_msgs builtin_interfaces rosgraph_msgs cv_bridge ament_index_python")
TRANSFORMS = f"{CONTRACTS} transforms"
MODEL = f"{TRANSFORMS} model torch safetensors"
BACKENDS = f"{MODEL} backends"
BELOW = f"{BACKENDS} runtime ros PIL yaml rich"  # all that the tools on top may use

ALLOWED = {
    "schema": CONTRACTS,
    "config": CONTRACTS,
    "errors": CONTRACTS,
    "transforms": f"{CONTRACTS} sentencepiece PIL yaml",
    "model": f"{CONTRACTS} transforms.images torch safetensors",
    "backends": f"{MODEL} triton cuda tensorrt tensorrt_rtx torch_tensorrt onnx onnx_ir onnxscript onnxruntime",
    "backends.torch_tensorrt": f"{BACKENDS} torch_tensorrt modelopt",
    "runtime": f"{TRANSFORMS} backends.base torch model.checkpoint model.pinned model.recipe model.weights",
    "runtime.gpu_sensors": "torch pynvml",
    "ros": f"{TRANSFORMS} runtime {ROS}",  # no torch: the node makes no CUDA call
    "sim": f"{BELOW} {ROS} mujoco",
    "sim.demonstrations": f"{BELOW} sim train.dataset",
    "bag": f"{BELOW} {ROS} rosbags mcap mcap_ros2",
    "train": f"{BELOW} sentencepiece",
    "benchmark": BELOW,
    "benchmark.recipes": f"{BELOW} benchmark quantize",
    "benchmark.end_to_end": f"{BELOW} benchmark {ROS}",
    "quantize": BELOW,
    "quantize.modelopt": f"{BELOW} quantize modelopt",
    "quantize.lerobot": f"{BELOW} quantize av pyarrow",
    "quantize.recorded": f"{BELOW} quantize bag train.dataset train.statistics",
    "cli": f"{BELOW} sim bag train benchmark quantize",
    "cli.demo": f"{BELOW} cli sim bag train benchmark quantize {ROS}",
    "cli.soak": f"{BELOW} cli sim {ROS}",
    "__main__": "cli",
    "__init__": "",
}

# Libraries that need not be installed: imported in files of their own, which nothing imports before it needs them.
OPTIONAL = {"pynvml", "triton", "cuda", "tensorrt", "tensorrt_rtx", "torch_tensorrt", "modelopt",
            "onnx", "onnx_ir", "onnxscript", "onnxruntime"}
ALWAYS_IMPORTABLE = ("backends.base", "backends.eager")  # and every package

MAX_LINES = 300


@dataclass(frozen=True)
class Import:
    name: str  # the package's own modules without `pi05_ros.`, and `__init__` for the package itself
    line: int
    at_import: bool  # runs when the file is imported: not inside a function, not for type checkers only


def module_name(path: Path) -> str:
    """backends/base.py -> backends.base; backends/__init__.py -> backends; __init__.py -> __init__"""
    parts = path.relative_to(ROOT / PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if len(parts) > 1 and parts[-1] == "__init__" else parts)


FILES = {module_name(path): path for path in sorted((ROOT / PACKAGE).rglob("*.py"))}


def imports(source: str) -> Iterator[Import]:
    """Every import of a file, at module level or deeper, and `import_module("literal")`."""

    def walk(node: ast.AST, at_import: bool) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            for name in _names(child):
                yield Import(name, getattr(child, "lineno", 0), at_import)
            deferred = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)) or (
                isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test))
            yield from walk(child, at_import and not deferred)

    return walk(ast.parse(source), True)


def _names(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        return [_own(alias.name) for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        base = node.module or ""
        if node.level:  # in no table: this package writes its imports in full
            return ["." * node.level + base]
        # `from a import b` imports a.b where that is a module, and a otherwise.
        return [_own(f"{base}.{alias.name}") if _own(f"{base}.{alias.name}") in FILES else _own(base)
                for alias in node.names]
    if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module") and node.args:
        return [_own(node.args[0].value)] if isinstance(node.args[0], ast.Constant) else []
    return []


def _own(name: str) -> str:
    return "__init__" if name == PACKAGE else name.removeprefix(f"{PACKAGE}.")


def _covers(part: str, name: str) -> bool:
    return name == part or name.startswith(f"{part}.")


def _part(module: str) -> str | None:
    return max((part for part in ALLOWED if _covers(part, module)), key=len, default=None)


def _has_own_libraries(module: str) -> bool:
    """A file that may need an optional library."""
    is_package = module in FILES and FILES[module].name == "__init__.py"
    return not is_package and module not in ALWAYS_IMPORTABLE and bool(OPTIONAL & {*ALLOWED[_part(module)].split()})


def violations(module: str, source: str) -> list[str]:
    """What a file imports and may not, in words."""
    part = _part(module)
    if part is None:
        return [f"{module}: not in the table ALLOWED of {Path(__file__).name}"]
    allowed = [*ALLOWED[part].split(), part.split(".")[0], "__init__", *sys.stdlib_module_names]
    found = []
    for item in imports(source):
        if not any(_covers(name, item.name) for name in allowed):
            found.append(f"{module}:{item.line} imports {item.name}; {part} may import {ALLOWED[part] or 'nothing'}")
        elif item.name.split(".")[0] in OPTIONAL and not _has_own_libraries(module):
            found.append(f"{module}:{item.line} imports {item.name}, which is optional; give that a file of its own")
    return found


def reached_at_import(module: str) -> dict[str, str]:
    """Every module that importing `module` imports, ours and others, each with the module of ours that does it."""
    reached, todo = {}, [module]
    while todo:
        current = todo.pop()
        packages = [current.rsplit(".", n)[0] for n in range(1, current.count(".") + 1)]
        names = [item.name for item in imports(FILES[current].read_text()) if item.at_import]
        for name in (*packages, *names):
            if name not in reached:
                reached[name] = current
                if name in FILES:
                    todo.append(name)
    return reached


@pytest.mark.parametrize("module", FILES)
def test_imports_only_what_the_table_allows(module):
    assert not violations(module, FILES[module].read_text())


@pytest.mark.parametrize("module", [module for module in FILES if not _has_own_libraries(module)])
def test_optional_libraries_are_imported_lazily(module):
    reached = reached_at_import(module)
    assert not {name: by for name, by in reached.items() if name.split(".")[0] in OPTIONAL}


@pytest.mark.parametrize("path", [*FILES.values(), *sorted((ROOT / "test").rglob("*.py")),
                                  *sorted((ROOT / "launch").rglob("*.py"))], ids=lambda p: str(p.relative_to(ROOT)))
def test_files_are_short(path):
    assert len(path.read_text().splitlines()) <= MAX_LINES


def test_importing_the_package_imports_nothing_heavy():
    code = f"import sys, {PACKAGE}; print(*{{name.split('.')[0] for name in sys.modules}})"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT).stdout
    assert not {"torch", "rclpy", "numpy", "PIL", "yaml", "rich", "sentencepiece"} & set(loaded.split())


@pytest.mark.parametrize(("module", "source", "name"), [
    ("schema", "import torch", "torch"),
    ("runtime.mailbox", "import rclpy.node", "rclpy.node"),
    ("runtime.mailbox", "def load():\n    import tensorrt", "tensorrt"),
    ("runtime.policy", "from pi05_ros.backends import eager", "backends.eager"),
    ("ros.node", "import torch.cuda", "torch.cuda"),
    ("ros.node", "import importlib\nimportlib.import_module('pi05_ros.model.pi05')", "model.pi05"),
    ("model.gemma", "from ..backends import base", "..backends"),
    ("cli.infer", "from rclpy.node import Node", "rclpy.node"),
    ("backends.eager", "def f():\n    import triton", "triton"),
    ("benchmark.latency", "from pi05_ros.train import loop", "train"),
    ("elsewhere.new", "", "elsewhere.new"),
])
def test_the_checker_sees(module, source, name):
    (found,) = violations(module, source)
    assert name in found


@pytest.mark.parametrize(("module", "source"), [
    ("runtime.policy", "import numpy as np\nfrom pi05_ros.backends import base"),
    ("backends.cuda.kernels.glu", "import triton.language as tl\nfrom pi05_ros.model import gemma"),
    ("cli.demo", "import rclpy\nfrom pi05_ros import __version__\nfrom pi05_ros.sim import tabletop_node"),
])
def test_the_checker_passes(module, source):
    assert not violations(module, source)
