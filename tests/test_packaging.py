"""The folder kernels/ is `qvlfast.kernels` in a bare checkout, an editable install and a wheel."""

from __future__ import annotations

import os
import shutil
import site
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PROBE = "kernels/probe_of_the_test.py"

# Prints the probe's path, and whether a top-level `kernels` of this tree has code in it: a folder
# without __init__.py in the current directory is a namespace, which any real package goes before.
USE_KERNELS = """
import importlib.util
import qvlfast.kernels.probe_of_the_test as probe
assert probe.VALUE == 7
spec = importlib.util.find_spec("kernels")
print(probe.__file__)
print(spec.origin if spec is not None else None)
"""


def copy_of_the_tree(target: Path) -> Path:
    """What a build needs, with one more file in kernels/, and without this tree's own build."""
    ignored = shutil.ignore_patterns("__pycache__", "*.so", "*.egg-info", "build")
    for folder in ("csrc", "kernels", "licenses", "qvlfast", "tests", "benchmarks"):
        shutil.copytree(ROOT / folder, target / folder, ignore=ignored)
    for file in ("pyproject.toml", "setup.py", "LICENSE", "NOTICE", "README.md"):
        shutil.copy(ROOT / file, target / file)
    (target / PROBE).write_text("VALUE = 7\n")
    return target


def run(command: list[str | Path], cwd: Path, **environment: str) -> str:
    """Standard output of the command; fails with all that it printed."""
    clean = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(
        command,
        cwd=cwd,
        env=clean | environment,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def pip(*arguments: str | Path) -> list[str | Path]:
    return [sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments]


def test_bare_checkout(tmp_path: Path) -> None:
    tree = copy_of_the_tree(tmp_path / "tree")
    for built in (ROOT / "qvlfast").glob("_C.*.so"):
        shutil.copy(built, tree / "qvlfast")
    probe, top_level = run([sys.executable, "-c", USE_KERNELS], tree).split()
    assert Path(probe) == tree / PROBE
    assert top_level == "None" or not Path(top_level).is_relative_to(tree)


@pytest.mark.slow
def test_editable_install(tmp_path: Path) -> None:
    tree = copy_of_the_tree(tmp_path / "tree")
    venv.create(tmp_path / "venv", with_pip=False)
    python = tmp_path / "venv" / "bin" / "python"
    # The packages of the environment that runs the tests, but not its own editable qvlfast: .pth
    # files count only in a folder of site-packages proper.
    packages = run([python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], tree)
    Path(packages.strip(), "outer.pth").write_text(
        "\n".join([sysconfig.get_path("purelib"), *site.getsitepackages()])
    )
    run(
        [python, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "-e", tree],
        tmp_path,
    )
    probe, top_level = run([python, "-c", USE_KERNELS], tmp_path).split()
    assert Path(probe) == tree / PROBE
    assert top_level == "None" or not Path(top_level).is_relative_to(tree)
    native = run([python, "-c", "import qvlfast._C as c; print(c.__file__)"], tmp_path)
    assert Path(native.strip()).parent == tree / "qvlfast"


@pytest.mark.slow
def test_wheel(tmp_path: Path) -> None:
    tree = copy_of_the_tree(tmp_path / "tree")
    run(pip("wheel", "-q", "--no-deps", "--no-build-isolation", "-w", tmp_path, tree), tmp_path)
    (wheel,) = tmp_path.glob("qvlfast-*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0].split("-")[0] for name in names} == {"qvlfast"}
    assert "qvlfast/" + PROBE in names
    assert "qvlfast/kernels/__init__.py" not in names
    assert {"qvlfast/py.typed", "qvlfast/_C.pyi", "qvlfast/errors.py"} <= set(names)
    for file in ("LICENSE", "NOTICE", "licenses/OFL-1.1.txt"):
        assert any(name.endswith(f"licenses/{file}") for name in names)
    assets = {
        f"qvlfast/{path.relative_to(ROOT / 'qvlfast')}"
        for path in (ROOT / "qvlfast" / "assets").rglob("*")
        if path.is_file()
    }
    assert assets and assets <= set(names)
    assert not [name for name in names if name.endswith((".cpp", ".h"))]
    built = [name for name in names if name.startswith("qvlfast/_C.") and name.endswith(".so")]
    assert len(built) == 1

    installed = tmp_path / "installed"
    zipfile.ZipFile(wheel).extractall(installed)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    output = run([sys.executable, "-c", USE_KERNELS], elsewhere, PYTHONPATH=str(installed))
    probe, top_level = output.split()
    assert Path(probe) == installed / "qvlfast" / PROBE
    assert top_level == "None" or not Path(top_level).is_relative_to(tmp_path)


@pytest.mark.slow
def test_a_missing_compiler_is_named(tmp_path: Path) -> None:
    tree = copy_of_the_tree(tmp_path / "tree")
    done = subprocess.run(
        pip("wheel", "--no-deps", "--no-build-isolation", "-w", tmp_path, tree),
        env=os.environ | {"CC": "gcc-of-nobody", "CXX": "g++-of-nobody"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode != 0
    said = done.stdout + done.stderr
    assert "the compiler 'g++-of-nobody' was not found" in said
    assert "apt-get install g++" in said
