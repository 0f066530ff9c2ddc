"""Who may import whom, read from the source: the rules of the layers, held by a test."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Import:
    """One imported name: ``from a.b import c`` gives ``a.b.c``, ``import a.b`` gives ``a.b``."""

    file: Path
    line: int
    name: str
    lazy: bool  # within a function
    typing_only: bool  # under `if TYPE_CHECKING:`

    def is_of(self, *modules: str) -> bool:
        return any(self.name == module or self.name.startswith(module + ".") for module in modules)

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.name}"


def package_of(file: Path) -> list[str]:
    """Where the relative imports of a file start: kernels/x.py is in qvlfast.kernels."""
    parts = list(file.parts[:-1])
    return ["qvlfast", *parts] if parts[:1] == ["kernels"] else parts


def imports_of(file: Path, source: str) -> Iterator[Import]:
    """Every import in the text of ``file``, a path relative to the root, with absolute names."""

    def visit(node: ast.AST, lazy: bool, typing_only: bool) -> Iterator[Import]:
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            package = package_of(file)
            base = package[: len(package) - node.level + 1] if node.level else []
            base += node.module.split(".") if node.module else []
            names = [".".join([*base, alias.name]) for alias in node.names]
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in (
            "importlib.import_module",
            "import_module",
            "__import__",
        ):
            names = [str(a.value) for a in node.args[:1] if isinstance(a, ast.Constant)]
        for name in names:
            yield Import(file, getattr(node, "lineno", 0), name, lazy, typing_only)
        lazy = lazy or isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        for child in ast.iter_child_nodes(node):
            under_typing = typing_only or (
                isinstance(node, ast.If)
                and ast.unparse(node.test).endswith("TYPE_CHECKING")
                and child in node.body
            )
            yield from visit(child, lazy, under_typing)

    yield from visit(ast.parse(source), False, False)


def python_files(*folders: str) -> list[Path]:
    return sorted(
        path.relative_to(ROOT) for folder in folders for path in (ROOT / folder).rglob("*.py")
    )


def imports(*folders: str) -> list[Import]:
    """All imports of the folders or files named."""
    files = [f for name in folders for f in ([Path(name)] if name.endswith(".py") else [])]
    files += python_files(*(name for name in folders if not name.endswith(".py")))
    return [
        found
        for file in files
        if (ROOT / file).exists()
        for found in imports_of(file, (ROOT / file).read_text(encoding="utf-8"))
    ]


PACKAGE = ("qvlfast", "kernels")


def refuse(broken: list[Import], rule: str) -> None:
    assert not broken, rule + ":\n  " + "\n  ".join(map(str, broken))


def test_the_reader_sees_every_kind_of_import() -> None:
    source = """
import a.b, c as d
from e.f import g
from . import h
from ..i import j
if TYPE_CHECKING:
    import k
def f():
    from l import m
    importlib.import_module("n.o")
"""
    found = list(imports_of(Path("qvlfast/model/x.py"), source))
    assert [(i.name, i.lazy, i.typing_only) for i in found] == [
        ("a.b", False, False),
        ("c", False, False),
        ("e.f.g", False, False),
        ("qvlfast.model.h", False, False),
        ("qvlfast.i.j", False, False),
        ("k", False, True),
        ("l.m", True, False),
        ("n.o", True, False),
    ]
    assert [i.name for i in imports_of(Path("kernels/x.py"), "from . import y")] == [
        "qvlfast.kernels.y"
    ]
    assert Import(Path("x"), 1, "torch.nn", False, False).is_of("torch")
    assert not Import(Path("x"), 1, "torchvision", False, False).is_of("torch")


def test_triton_is_imported_in_kernels_only() -> None:
    found = [i for i in imports("qvlfast") if i.is_of("triton")]
    refuse(found, "triton belongs in kernels/")


def test_transformers_is_imported_by_verify_only_and_lazily() -> None:
    verify = (Path("qvlfast/cli/verify.py"), Path("qvlfast/verify.py"))
    found = [i for i in imports(*PACKAGE) if i.is_of("transformers")]
    refuse(
        [i for i in found if i.file not in verify or not (i.lazy or i.typing_only)],
        "transformers may be imported in the verify command alone, within a function",
    )


def test_the_package_does_not_import_tests_or_benchmarks() -> None:
    found = [i for i in imports(*PACKAGE) if i.is_of("tests", "benchmarks", "pytest")]
    refuse(found, "the package must run without its tests and benchmarks")


def test_the_scheduler_knows_no_torch() -> None:
    pure = [f"qvlfast/{name}.py" for name in ("cost", "fair", "lane", "scheduler")]
    refuse([i for i in imports(*pure) if i.is_of("torch")], "no torch here")


def test_ops_know_nothing_above_them() -> None:
    above = (
        "batch",
        "embedder",
        "engine",
        "model",
        "reranker",
        "runtime",
        "scheduler",
        "served",
        "server",
    )
    names = tuple(f"qvlfast.{name}" for name in above)
    found = [i for i in imports("qvlfast/ops") if i.is_of(*names)]
    refuse(found, "ops/ is below the model and whatever runs it")


def test_the_model_does_not_choose_implementations() -> None:
    below = ("qvlfast.dispatch", "qvlfast.kernels", "qvlfast._C")
    found = [i for i in imports("qvlfast/model") if i.is_of(*below)]
    refuse(found, "model/ is written in ops; dispatch chooses what they run on")


def test_the_model_does_not_ask_what_device_it_is_on() -> None:
    asked = []
    for file in python_files("qvlfast/model"):
        for node in ast.walk(ast.parse((ROOT / file).read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Attribute):
                continue
            text = ast.unparse(node)
            if node.attr in ("is_cuda", "is_cpu") or re.search(r"device\.type$|^torch\.cuda", text):
                asked.append(f"{file}:{node.lineno}: {text}")
    assert not asked, "model/ must be the same for every device:\n  " + "\n  ".join(asked)


def test_kernels_import_nothing_of_the_package() -> None:
    found = [
        i
        for i in imports("kernels")
        if i.is_of("qvlfast", "kernels") and not i.is_of("qvlfast.kernels")
    ]
    refuse(found, "kernels/ stands alone")


def test_kernels_reach_users_through_one_file() -> None:
    assert not (ROOT / "kernels" / "__init__.py").exists()
    inside = [p.name for p in (ROOT / "qvlfast" / "kernels").iterdir() if p.name != "__pycache__"]
    assert inside == ["__init__.py"]
    tree = ast.parse((ROOT / "qvlfast/kernels/__init__.py").read_text(encoding="utf-8"))
    kinds = [type(node) for node in tree.body]
    assert kinds == [ast.ImportFrom, ast.Expr], "it appends to its __path__ and holds nothing else"


def test_nobody_imports_kernels_as_a_top_level_name() -> None:
    found = [i for i in imports("qvlfast", "kernels", "tests", "benchmarks") if i.is_of("kernels")]
    refuse(found, "the name `kernels` is another project's; ours is qvlfast.kernels")


def test_csrc_includes_no_torch() -> None:
    sources = [path for path in (ROOT / "csrc").rglob("*") if path.suffix in (".h", ".cpp")]
    assert sources
    pattern = re.compile(r'^\s*#\s*include\s*[<"](torch|ATen|c10|caffe2)[/.]', re.MULTILINE)
    broken = [str(path.relative_to(ROOT)) for path in sources if pattern.search(path.read_text())]
    assert not broken, f"one build serves every torch: {broken}"


USE = """
import PIL.Image
from qvlfast import Embedder, Reranker
from qvlfast.gallery import EMBEDDER, RERANKER
picture = {"image": PIL.Image.new("RGB", (64, 64))}
with Embedder.from_pretrained(EMBEDDER, backend="native") as embedder:
    embedder.encode(["one", picture])
with Reranker.from_pretrained(RERANKER, backend="native", quantization="int8") as reranker:
    reranker.rank("one", ["two", picture])
"""


@pytest.mark.parametrize(
    "code", ["import qvlfast", "import qvlfast._C", USE], ids=["package", "extension", "use"]
)
def test_nothing_is_loaded_that_is_not_needed(code: str) -> None:
    """Least of all torch's compiler, which takes a second, and which operations on tensors without
    storage make torch import."""
    heavy = [
        "transformers",
        "triton",
        "kernels",
        "pytest",
        "tests",
        "benchmarks",
        "torch._dynamo",
        "sympy",
    ]
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            f"{code}\nimport sys\nprint(sorted(set({heavy}) & sys.modules.keys()))",
        ],
        cwd=ROOT,
        env=os.environ,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr
