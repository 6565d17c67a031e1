"""The repository itself: nothing dangerous, nothing stale, documents that tell the truth."""

from __future__ import annotations

import ast
import json
import os
import re
import shlex
import tomllib
from collections.abc import Iterator
from importlib.metadata import entry_points, version
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from compress_tool.arguments import build_parser
from vllm_moesvd.format import FAMILIES, MoEShape, parse_spec, spec_to_json

ROOT = Path(__file__).parent.parent
SOURCE_FOLDERS = ("compress_tool", "vllm_moesvd", "examples", "tools", "benchmarks", "tests")
DOCUMENTS = sorted(
    path.relative_to(ROOT).as_posix()
    for pattern in ("*.md", "docs/*.md", "examples/**/*.md", "compress_tool/**/*.md")
    for path in ROOT.glob(pattern)
)
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
CONSTRAINTS = ROOT / "constraints" / "cpu-py311.txt"
CODE_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)


def python_files(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def calls(tree: ast.AST) -> Iterator[tuple[str, ast.Call]]:
    """Every call with its dotted name, e.g. `torch.load`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


def test_nothing_can_run_code_of_a_checkpoint() -> None:
    banned_modules = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
    banned_calls = {"eval", "exec", "torch.load", "yaml.load", "yaml.unsafe_load", "os.system"}
    for path in python_files("compress_tool", "vllm_moesvd", "examples", "tools"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            assert not {name.split(".")[0] for name in names} & banned_modules, path
        for name, call in calls(tree):
            assert name not in banned_calls, f"{path}:{call.lineno} calls {name}"
            for keyword in call.keywords:
                value = keyword.value
                if keyword.arg == "trust_remote_code":
                    assert isinstance(value, ast.Constant) and value.value is False, path
                if keyword.arg == "shell":
                    assert isinstance(value, ast.Constant) and value.value is False, path


def test_the_version_is_in_pyproject_only() -> None:
    assert version("vllm-moesvd") == PROJECT["version"]
    for path in python_files("compress_tool", "vllm_moesvd"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant):
                assert node.value != PROJECT["version"], f"{path}:{node.lineno}"


def test_files_stay_readable_in_one_sitting() -> None:
    for path in python_files("compress_tool", "vllm_moesvd", "examples", "tools"):
        assert len(path.read_text(encoding="utf-8").splitlines()) <= 350, path


def test_no_drawer_for_everything() -> None:
    for path in python_files(*SOURCE_FOLDERS):
        assert path.stem not in {"utils", "util", "helpers", "common", "misc"}, path


def test_nothing_is_left_to_do_later() -> None:
    marker = re.compile(r"\b(TODO|FIXME|XXX|HACK)\b")
    for path in python_files(*SOURCE_FOLDERS):
        if path.name != Path(__file__).name:
            assert not marker.search(path.read_text(encoding="utf-8")), path


def test_nothing_depends_on_one_machine() -> None:
    """No home folders, no scratch folders of developers, no package index by address."""
    local = re.compile(r"(/home/|/root/|/work/|/Users/|pythonhosted|pypi\.org|download\.pytorch)")
    files = python_files(*SOURCE_FOLDERS) + [ROOT / name for name in DOCUMENTS]
    files += [ROOT / "Makefile", ROOT / ".ci" / "run", ROOT / "tools" / "setup.sh", CONSTRAINTS]
    for path in files:
        if path.name != Path(__file__).name:
            found = local.search(path.read_text(encoding="utf-8"))
            assert found is None, f"{path}: {found}"


def test_constraints_are_exact_versions_without_addresses() -> None:
    for line in CONSTRAINTS.read_text().splitlines():
        assert re.fullmatch(r"#.*|[A-Za-z0-9._-]+==[A-Za-z0-9.+]+", line), line


@pytest.mark.parametrize("extra", ["", "cpu", "report", "eval", "dev"])
def test_constraints_satisfy_pyproject(extra: str) -> None:
    pinned = dict(line.split("==") for line in CONSTRAINTS.read_text().splitlines() if "==" in line)
    pinned = {re.sub(r"[-_.]+", "-", name).lower(): number for name, number in pinned.items()}
    wanted = PROJECT["optional-dependencies"][extra] if extra else PROJECT["dependencies"]
    for requirement in map(Requirement, wanted):
        name = re.sub(r"[-_.]+", "-", requirement.name).lower()
        assert name in pinned, f"{CONSTRAINTS.name} has no {name}"
        assert requirement.specifier.contains(pinned[name]), f"{name} {pinned[name]}"


def test_every_requirement_is_bounded_or_exact() -> None:
    extras = PROJECT["optional-dependencies"]
    for text in PROJECT["dependencies"] + extras["gpu"] + extras["cpu"]:
        operators = {clause.operator for clause in Requirement(text).specifier}
        assert operators & {"==", "<", "<=", "~="}, text


def test_entry_points_lead_somewhere() -> None:
    (plugin,) = entry_points(group="vllm.general_plugins", name="moesvd")
    assert callable(plugin.load())
    (script,) = entry_points(group="console_scripts", name="compress_tool")
    assert callable(script.load())


def test_ci_runs_exactly_make_test() -> None:
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    lines = [line for line in script.read_text().splitlines() if "make" in line]
    assert lines == ["exec make test"]


def test_the_licence_is_there() -> None:
    text = (ROOT / "LICENSE").read_text()
    assert "Apache License" in text and "END OF TERMS AND CONDITIONS" in text
    assert PROJECT["license"] == "Apache-2.0"


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_and_paths_of_documents_exist(document: str) -> None:
    text = (ROOT / document).read_text(encoding="utf-8")
    folder = (ROOT / document).parent
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text):
        if "://" not in target:
            assert (folder / target).exists(), f"{document}: {target}"
    for target in re.findall(r"`((?:compress_tool|vllm_moesvd|docs|tests|tools)/[\w./-]+)`", text):
        assert (ROOT / target).exists(), f"{document}: {target}"


@pytest.mark.parametrize("document", DOCUMENTS)
def test_commands_in_documents_exist(document: str) -> None:
    """`make X` is a target; `compress_tool …` parses, with every flag."""
    text = (ROOT / document).read_text(encoding="utf-8")
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z-]+):", makefile, re.MULTILINE))
    assert set(re.findall(r"`make ([a-z-]+)`", text)) <= targets
    blocks = [body for kind, body in CODE_BLOCK.findall(text) if kind in ("", "sh", "bash")]
    indented = re.findall(r"^ {4}(\S.*)$", text, re.MULTILINE)
    for line in "\n".join([*blocks, *indented]).replace("\\\n", " ").splitlines():
        words = (
            shlex.split(line, comments=True)
            if re.match(r"\$?\s*(make|compress_tool) ", line)
            else []
        )
        words = words[1:] if words[:1] == ["$"] else words
        if words[:1] == ["make"]:
            assert {word for word in words[1:] if "=" not in word} <= targets, line
        elif words[:1] == ["compress_tool"]:
            build_parser().parse_args(words[1:])


def test_the_example_of_the_format_document_is_valid() -> None:
    text = (ROOT / "docs" / "format.md").read_text(encoding="utf-8")
    (example,) = (body for kind, body in CODE_BLOCK.findall(text) if kind == "json")
    config = json.loads("{" + example + "}")
    shape = MoEShape(hidden_size=64, expert_width=96, num_experts=4, top_k=2)
    spec = parse_spec(config["moesvd"], shape, num_layers=4)
    assert spec_to_json(spec) == config["moesvd"]
    assert config["architectures"] == [FAMILIES[0].factored_architecture]


def test_the_readme_names_every_command_and_exit_code() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    (commands,) = (a for a in build_parser()._actions if a.dest == "command")
    assert commands.choices is not None
    for command in commands.choices:
        assert f"`{command}" in text, f"README.md does not mention {command}"
    for code in (0, 2, 3, 4, 5, 6, 7, 75, 130, 143):
        assert re.search(rf"(?<!\d){code}(?!\d)", text), f"README.md does not mention {code}"
