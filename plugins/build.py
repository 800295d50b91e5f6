"""Compile the native libraries beside their source: `python -m plugins.build`.

Without a C++ compiler it says so and exits 0: what would use the libraries then runs without them, slower.
"""

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

SOURCE = Path(__file__).parent / "msda"
# The kernel is compiled into each: they load nothing of ours.
LIBRARIES = {
    "libmsda_cpu.so": ("msda_cpu.cpp",),
    "libmsda_onnxruntime.so": ("msda_onnxruntime.cpp", "msda_cpu.cpp"),
}
FLAGS = ["-std=c++17", "-O3", "-fPIC", "-shared", "-fno-math-errno", "-fno-trapping-math", "-fassociative-math",
         "-fno-signed-zeros", "-Wall", "-Wextra", "-Wno-psabi", "-Wno-maybe-uninitialized",
         "-Wl,-Bsymbolic"]  # fmt: skip


def compiler() -> list[str] | None:
    """The C++ compiler's command: $CXX, else the first one found; None where there is none."""
    if os.environ.get("CXX"):
        return shlex.split(os.environ["CXX"])
    found = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
    return [found] if found else None


def build(folder: Path = SOURCE) -> list[Path]:
    """Compile every library into `folder` and return their paths; none, with a printed line, without a compiler.

    A library in use is replaced, not overwritten. Raises subprocess.CalledProcessError where the compiler fails.
    """
    command = compiler()
    if command is None:
        print("native kernel: no C++ compiler found (apt install g++); training and serving will be slower")
        return []
    built = []
    for name, sources in LIBRARIES.items():
        fresh = folder / f"{name}.{os.getpid()}.new"
        try:
            subprocess.run([*command, *FLAGS, *(str(SOURCE / each) for each in sources), "-o", str(fresh)], check=True)
            built.append(fresh.replace(folder / name))
        finally:
            fresh.unlink(missing_ok=True)
        print(f"native kernel: built {name}")
    return built


if __name__ == "__main__":
    try:
        build()
    except (OSError, subprocess.CalledProcessError) as error:
        print(f"native kernel: not built, training and serving will be slower: {error}")
        sys.exit(1)
