"""Packages and one extension; CMake does the build, `pyproject.toml` has the rest."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


def required_tool(name: str) -> str:
    path = shutil.which(name)
    if path is None:
        raise SystemExit(
            f"setup.py: {name!r} is not on PATH; the build needs it. "
            f"Build with isolation (the default of pip), or run: pip install {name}"
        )
    return path


class CMakeBuild(build_ext):
    """Configures the `release` preset, builds the modules and installs them where setuptools wants it."""

    def build_extension(self, ext: Extension) -> None:
        if ext.optional:
            return  # made together with the first, if at all
        import pybind11

        destination = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        # Not `self.build_temp`: an editable install would get a fresh one, and compile everything, each time.
        build = ROOT / "build" / str(sys.implementation.cache_tag)
        cmake = required_tool("cmake")
        configure = [cmake, "--preset", "release", "-B", str(build)]
        # An isolated build finds its tools at another path each time, so the cached ones must be replaced.
        configure += [
            f"-DCMAKE_MAKE_PROGRAM={required_tool('ninja')}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DTVFAST_CUDA={os.environ.get('TVFAST_CUDA', 'AUTO')}",
            f"-DTVFAST_CUDA_ARCHITECTURES={os.environ.get('TVFAST_CUDA_ARCHITECTURES', '')}",
            *shlex.split(os.environ.get("CMAKE_ARGS", "")),
        ]
        install = [cmake, "--install", str(build), "--component", "python", "--prefix", str(destination)]
        for command in (configure, [cmake, "--build", str(build)], install):
            try:
                subprocess.run(command, cwd=ROOT, check=True)
            except subprocess.CalledProcessError as error:
                raise SystemExit(f"setup.py: {shlex.join(command)} failed; its message is above.") from error


packages = find_packages(include=["tvfast", "tvfast.*"])
if (ROOT / "kernels" / "__init__.py").exists():
    packages.append("tvfast.kernels")

modules = [
    Extension("tvfast._C_cpu", sources=[]),
    Extension("tvfast._C_cuda", sources=[], optional=True),
    Extension("tvfast._C_simt", sources=[], optional=True),
]
if os.environ.get("TVFAST_NATIVE") == "OFF":
    modules = []  # an editable install of what `setup.py build_ext --inplace` compiles

setup(
    packages=packages,
    package_dir={"tvfast.kernels": "kernels"},
    package_data={"tvfast": ["py.typed"], "tvfast.inspection": ["page/*"]},
    ext_modules=modules,
    cmdclass={"build_ext": CMakeBuild},
)
