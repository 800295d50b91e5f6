"""The native kernel inside the wheel; everything else of the package is in pyproject.toml."""

import runpy
import subprocess
from pathlib import Path
from typing import Any

from setuptools import Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent


class BuildNative(build_py):
    """Also compile the libraries into the package; without a compiler it is installed all the same, and runs slower."""

    def run(self) -> None:
        super().run()
        # Not imported: the package's own folder is not on the path of an isolated build.
        native: dict[str, Any] = runpy.run_path(str(ROOT / "plugins" / "build.py"))
        folder = native["BUILT"] if self.editable_mode else Path(self.build_lib) / "plugins" / "built"
        try:
            native["build"](folder)
        except (OSError, subprocess.CalledProcessError) as error:
            self.warn(f"native kernel: not built, training and serving will be slower: {error}")


class PlatformWheel(bdist_wheel):
    """The libraries are the platform's, and no Python's in particular."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


class NativeDistribution(Distribution):
    """Goes where a platform's own files go."""

    def has_ext_modules(self) -> bool:
        return True


setup(cmdclass={"build_py": BuildNative, "bdist_wheel": PlatformWheel}, distclass=NativeDistribution)
