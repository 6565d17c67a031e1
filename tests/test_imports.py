"""The arrow: imports inside and between the two packages never point back."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("compress_tool", "vllm_moesvd")

# Earlier stages first: none of them may reach a later one, not even through other modules.
TOOL_STAGES = (
    "compress_tool.errors",
    "compress_tool.checkpoint",
    "compress_tool.packing",
    "compress_tool.streaming",
    "compress_tool.calibration",
    "compress_tool.solve",
    "compress_tool.pipeline",
    "compress_tool.cli",
)
PURE_STAGES = ("compress_tool.plan", "compress_tool.factorize", "compress_tool.writer")
PLUGIN_STAGES = (
    "vllm_moesvd.format",
    "vllm_moesvd.loading",
    "vllm_moesvd.layer",
    "vllm_moesvd.models",
)


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def modules() -> dict[str, Path]:
    paths = [path for package in PACKAGES for path in (ROOT / package).rglob("*.py")]
    return {module_name(path): path for path in sorted(paths)}


def imported_names(path: Path) -> Iterator[str]:
    """Every module a file imports, wherever the statement stands; `from a import b` gives both."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import; house style is absolute"
            assert node.module is not None
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@cache
def direct_imports() -> dict[str, frozenset[str]]:
    known = modules()
    return {
        name: frozenset(target for target in imported_names(path) if target in known) - {name}
        for name, path in known.items()
    }


def reachable(start: str) -> frozenset[str]:
    """All project modules that `start` (a module or a package) needs, directly or not."""
    graph = direct_imports()
    found: set[str] = set()
    queue = [name for name in graph if name == start or name.startswith(start + ".")]
    assert queue, f"{start} does not exist: update the stages of this test"
    while queue:
        for target in graph[queue.pop()]:
            if target not in found:
                found.add(target)
                queue.append(target)
    return frozenset(found)


@pytest.mark.parametrize("stages", [TOOL_STAGES, PLUGIN_STAGES], ids=["tool", "plugin"])
def test_no_stage_reaches_a_later_one(stages: tuple[str, ...]) -> None:
    for index, earlier in enumerate(stages):
        later = tuple(stages[index + 1 :])
        back = [n for n in reachable(earlier) if n.startswith(later)]
        assert not back, f"{earlier} reaches {back}"


@pytest.mark.parametrize("stage", PURE_STAGES)
def test_plan_solvers_and_writer_do_not_know_who_calls_them(stage: str) -> None:
    above = ("compress_tool.solve", "compress_tool.pipeline", "compress_tool.cli")
    assert not [name for name in reachable(stage) if name in above]


def test_there_are_no_cycles() -> None:
    """A package and its own submodules count as one; a cycle needs two different files."""
    graph = direct_imports()
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " → ".join([*path[path.index(name) :], name])
        if name not in done:
            for target in graph[name]:
                # `from package.sub import x` inside the package names its own parent: not a cycle.
                if not name.startswith(target + "."):
                    visit(target, (*path, name))
            done.add(name)

    for name in graph:
        visit(name, ())


def test_the_tool_knows_only_the_format_of_the_plugin() -> None:
    for name, targets in direct_imports().items():
        if name.startswith("compress_tool"):
            others = {target for target in targets if target.startswith("vllm_moesvd")}
            assert others <= {"vllm_moesvd", "vllm_moesvd.format"}, f"{name} imports {others}"


def test_the_plugin_does_not_know_the_tool() -> None:
    for name, path in modules().items():
        if name.startswith("vllm_moesvd"):
            assert not [t for t in imported_names(path) if t.split(".")[0] == "compress_tool"]


def test_the_tool_does_not_import_vllm() -> None:
    for name, path in modules().items():
        if name.startswith("compress_tool"):
            assert not [t for t in imported_names(path) if t.split(".")[0] == "vllm"]


def test_the_format_needs_the_standard_library_only() -> None:
    for name in ("format", "families", "family", "moe_block"):
        for target in imported_names(ROOT / "vllm_moesvd" / f"{name}.py"):
            is_part = target.startswith(("vllm_moesvd.famil", "vllm_moesvd.moe_block"))
            assert is_part or target.split(".")[0] in sys.stdlib_module_names


@pytest.mark.parametrize(
    ("module", "forbidden"),
    [
        ("vllm_moesvd", ("torch", "vllm", "transformers")),
        ("vllm_moesvd.format", ("torch", "vllm", "transformers", "numpy")),
        ("compress_tool.plan", ("torch", "vllm", "transformers")),
        ("compress_tool.checkpoint", ("vllm", "transformers")),
        ("compress_tool.report_figures", ("torch", "matplotlib")),
        ("compress_tool.cli", ("vllm", "transformers", "matplotlib")),
    ],
)
def test_importing_stays_light(module: str, forbidden: tuple[str, ...]) -> None:
    code = f"import sys, {module}; print([m for m in {forbidden!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.stdout.strip(), done.returncode) == ("[]", 0), done.stderr
