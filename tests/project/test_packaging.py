"""The wheel holds what it should: four packages, their data, their types, their extras."""

import email
import email.message
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

#: package -> its source root
ROOTS = {"bar_edge": "", "bar_edge_cli": "cli", "bar_edge_kernels": "kernels", "bar_edge_calibration": "calibration"}


@pytest.fixture(scope="module")
def wheel(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[zipfile.ZipFile]:
    pytest.importorskip("build", reason="the extra [test] is not installed")
    # built from a copy: a build leaves folders behind, and other tests read the tree meanwhile
    source = tmp_path_factory.mktemp("source") / "tree"
    built = shutil.ignore_patterns(".*", "*.egg-info", "__pycache__")
    beside = {"runs", "build", "dist", "tests", "benchmarks"}  # of the repository's root, not the package bar_edge.runs

    def ignored(folder: str, names: list[str]) -> set[str]:
        return built(folder, names) | (beside & set(names) if Path(folder) == repository else set())

    shutil.copytree(repository, source, ignore=ignored)
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    with zipfile.ZipFile(next(out.glob("*.whl"))) as archive:
        yield archive


def metadata(wheel: zipfile.ZipFile) -> email.message.Message:
    name = next(n for n in wheel.namelist() if n.endswith(".dist-info/METADATA"))
    return email.message_from_bytes(wheel.read(name))


def test_top_level_names(wheel: zipfile.ZipFile) -> None:
    tops = {name.split("/")[0] for name in wheel.namelist()}
    assert {top for top in tops if not top.endswith(".dist-info")} == set(ROOTS)


def test_every_module_and_data_file_is_in_it(wheel: zipfile.ZipFile, repository: Path) -> None:
    expected = set()
    for package, root in ROOTS.items():
        base = repository / root
        for path in (base / package).rglob("*"):
            if path.suffix in (".py", ".j2", ".css", ".toml") or path.name == "py.typed":
                expected.add(path.relative_to(base).as_posix())
    assert "bar_edge/report/report.html.j2" in expected and "bar_edge/report/style.css" in expected
    assert expected == {name for name in wheel.namelist() if ".dist-info/" not in name}


def test_types_are_declared(wheel: zipfile.ZipFile) -> None:
    assert {f"{package}/py.typed" for package in ROOTS} <= set(wheel.namelist())


def test_extras_and_licence(wheel: zipfile.ZipFile) -> None:
    data = metadata(wheel)
    assert set(data.get_all("Provides-Extra", [])) == {"openvino", "trt", "hf", "timm", "kernels", "test"}
    assert data["License-Expression"] == "Apache-2.0"
    assert any(name.endswith("licenses/LICENSE") for name in wheel.namelist())


def test_the_core_needs_no_extra(wheel: zipfile.ZipFile) -> None:
    needs = metadata(wheel).get_all("Requires-Dist", [])
    core = {re.split(r"[^\w-]", need)[0].lower() for need in needs if "extra ==" not in need}
    assert not core & {"openvino", "tensorrt", "transformers", "timm", "torchvision", "pytest"}
    assert {"torch", "onnxruntime", "typer"} <= core


def test_console_script(wheel: zipfile.ZipFile) -> None:
    name = next(n for n in wheel.namelist() if n.endswith("entry_points.txt"))
    assert "bar-edge = bar_edge_cli.main:run" in wheel.read(name).decode()


def test_constraints_pin_every_direct_dependency(repository: Path) -> None:
    project = tomllib.loads((repository / "pyproject.toml").read_text())["project"]
    needed = project["dependencies"] + project["optional-dependencies"]["test"]
    pins = {}
    for line in (repository / "constraints.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            name, _, version = line.partition("==")
            pins[name.lower().replace("_", "-")] = version
    names = {re.split(r"[^\w-]", need)[0].lower() for need in needed}
    assert names <= pins.keys()
    assert pins["torch"] == "2.13.0"
    # a local version such as 2.13.0+cpu is not on every index
    assert all(re.fullmatch(r"[\d.]+", version) for version in pins.values())
