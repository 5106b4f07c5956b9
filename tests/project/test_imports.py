"""Imports run one way (design: "Imports run one way"), and the command line's help loads nothing heavy."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

#: a layer may import from its own package and from the layers above it in this list
LAYERS = [
    [
        "bar_edge.errors",
        "bar_edge.files",
        "bar_edge.records",
        "bar_edge.config",
        "bar_edge.requests",
        "bar_edge.progress",
        "bar_edge.user_code",
        "bar_edge_kernels",
    ],
    ["bar_edge.network", "bar_edge.data", "bar_edge.models", "bar_edge_calibration"],
    ["bar_edge.methods", "bar_edge.surgery"],
    ["bar_edge.training", "bar_edge.lowering", "bar_edge.bench"],
    ["bar_edge.targets"],
    ["bar_edge.report", "bar_edge.runs"],
    ["bar_edge.latency_budget"],
    ["bar_edge.pipeline"],
    ["bar_edge_cli"],
]
RANK = {part: rank for rank, parts in enumerate(LAYERS) for part in parts}
#: what may be imported within a layer
WITHIN_LAYER = {
    ("bar_edge.files", "bar_edge.errors"),
    ("bar_edge.records", "bar_edge.errors"),
    ("bar_edge.records", "bar_edge.files"),
    ("bar_edge.config", "bar_edge.errors"),
    ("bar_edge.requests", "bar_edge.config"),
    ("bar_edge.requests", "bar_edge.errors"),
    ("bar_edge.requests", "bar_edge.records"),
    ("bar_edge.user_code", "bar_edge.errors"),
    ("bar_edge.methods", "bar_edge.surgery"),  # `BAR.slice()`, the last of the five lines in a user's loop
}
ROOTS = {"bar_edge": "", "bar_edge_cli": "cli", "bar_edge_kernels": "kernels", "bar_edge_calibration": "calibration"}


def part_of(module: str) -> str | None:
    """bar_edge.network.trace -> bar_edge.network; None for bar_edge itself and for modules of others."""
    first, *rest = module.split(".")
    if first not in ROOTS:
        return None
    if first != "bar_edge":
        return first
    return f"bar_edge.{rest[0]}" if rest else None


def imports(path: Path, package: str) -> set[str]:
    """Every module of ours that a file imports, anywhere in it, TYPE_CHECKING blocks too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*parents, *([node.module] if node.module else [])])
            # `from bar_edge import report` names a part too
            found |= {f"{base}.{alias.name}" for alias in node.names} if base == "bar_edge" else {base}
    return found


def files(repository: Path) -> list[tuple[str, Path]]:
    found = []
    for package, root in ROOTS.items():
        folder = repository / root / package
        for path in sorted(folder.rglob("*.py")):
            dotted = ".".join([package, *path.relative_to(folder).with_suffix("").parts])
            found.append((dotted, path))
    return found


def allowed(importer: str, imported: str) -> bool:
    if importer == imported or (importer, imported) in WITHIN_LAYER:
        return True
    return RANK[imported] < RANK[importer]


def test_imports_run_one_way(repository: Path) -> None:
    wrong = []
    for module, path in files(repository):
        importer = part_of(module)
        if importer in (None, "bar_edge.__init__"):
            continue  # the public names: from every part
        assert importer in RANK, f"{module}: give {importer} a place in LAYERS"
        for imported in imports(path, module.rpartition(".")[0]):
            part = part_of(imported)
            assert part is None or part in RANK, f"{module} imports {imported}: it has no place in LAYERS"
            if part and not allowed(importer, part):
                wrong.append(f"{module} imports {imported}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("importer", "imported", "expected"),
    [
        ("bar_edge.network", "bar_edge.methods", False),
        ("bar_edge.methods", "bar_edge.network", True),
        ("bar_edge.lowering", "bar_edge.bench", False),
        ("bar_edge.bench", "bar_edge.targets", False),
        ("bar_edge.training", "bar_edge.targets", False),
        ("bar_edge.errors", "bar_edge.records", False),
        ("bar_edge.pipeline", "bar_edge_cli", False),
    ],
)
def test_the_rule_itself(importer: str, imported: str, expected: bool) -> None:
    assert allowed(importer, imported) is expected


def test_reads_every_kind_of_import(tmp_path: Path) -> None:
    file = tmp_path / "a.py"
    file.write_text(
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from bar_edge.report import page\n"
        "def f():\n    from bar_edge import pipeline\n    from ..bench import worker\n    import bar_edge_cli.main\n"
    )
    found = imports(file, "bar_edge.network")
    assert {part_of(m) for m in found} - {None} == {
        "bar_edge.report",
        "bar_edge.pipeline",
        "bar_edge.bench",
        "bar_edge_cli",
    }


HELP = "import sys; from bar_edge_cli.main import main; code = main(sys.argv[1:]); "


def help_in_a_process(*command: str, then: str = "sys.exit(code)") -> subprocess.CompletedProcess[str]:
    # the paths that pytest added are not in a subprocess: hand them on
    program = f"import sys; sys.path[:0] = {sys.path!r}; {HELP}{then}"
    return subprocess.run([sys.executable, "-c", program, *command], capture_output=True, text=True, check=False)


@pytest.mark.parametrize("command", [(), ("prune",), ("deploy",), ("doctor",)])
def test_help_loads_no_torch(command: tuple[str, ...]) -> None:
    heavy = "print('HEAVY', {'torch', 'onnx', 'onnxruntime', 'matplotlib', 'numpy', 'sklearn'} & set(sys.modules))"
    done = help_in_a_process(*command, "--help", then=heavy)
    assert done.returncode == 0, done.stderr
    assert "Usage: bar-edge" in done.stdout
    assert "HEAVY set()" in done.stdout
