"""Builds the C++ extension `qvlfast._C`; everything else is in pyproject.toml."""

from __future__ import annotations

import os
import shutil
from glob import glob

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension, build_ext
from setuptools import setup

# Kernels rely on a product and a sum in one instruction where the processor has it.
COMPILE_ARGS = ["-O3", "-ffp-contract=fast", "-Wall", "-Wextra", "-fvisibility=hidden", "-pthread"]
# Newer compilers warn about more; that must not stop a user's build, only ours.
if os.environ.get("QVLFAST_WERROR") == "1":
    COMPILE_ARGS.append("-Werror")


class BuildExtension(build_ext):
    """Says what to install where there is no C++ compiler."""

    def build_extensions(self) -> None:
        compiler = self.compiler.compiler_cxx[0]
        if shutil.which(compiler) is None:
            raise SystemExit(
                f"A part of qvlfast is C++17, and the compiler '{compiler}' was not found.\n"
                "Install one (Debian, Ubuntu: apt-get install g++; Fedora: dnf install gcc-c++),\n"
                "or set CXX to the one to use."
            )
        super().build_extensions()


ParallelCompile("QVLFAST_BUILD_JOBS", default=0).install()
setup(
    ext_modules=[
        Pybind11Extension(
            "qvlfast._C",
            sorted(glob("csrc/*.cpp")),
            depends=sorted([*glob("csrc/*.h"), *glob("csrc/*.inl")]),
            cxx_std=17,
            extra_compile_args=COMPILE_ARGS,
            extra_link_args=["-pthread"],
        )
    ],
    cmdclass={"build_ext": BuildExtension},
)
