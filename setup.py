"""Builds the CPU kernels at install. Without a compiler the package installs all the same, and says so on serving."""

import importlib.util
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

KERNELS = Path(__file__).parent / "moe_collab" / "kernels" / "cpu"


class BuildKernels(build_ext):
    """Runs `moe_collab/kernels/cpu/build.py`, which also rebuilds them by hand."""

    def get_ext_filename(self, name: str) -> str:
        """One binary serves every Python version."""
        return str(Path(*name.split(".")).with_suffix(".so"))

    def build_extension(self, extension: Extension) -> None:
        """Compile; a failure is reported and not fatal."""
        spec = importlib.util.spec_from_file_location("build", KERNELS / "build.py")
        build = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(build)
        try:
            build.build(Path(self.get_ext_fullpath(extension.name)).parent)
        except build.BuildError as error:
            self.warn(f"moe_collab: installed without its CPU kernels: {error}\nLater, run: {build.COMMAND}")


setup(
    ext_modules=[Extension("moe_collab.kernels.cpu._C", [], optional=True, py_limited_api=True)],
    cmdclass={"build_ext": BuildKernels},
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
