"""Compile the CPU kernel beside its source: `python -m plugins.build`; without a C++ compiler it says so, exit 0."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

SOURCE = Path(__file__).parent / "msda"
LIBRARY = SOURCE / "libmsda_cpu.so"
FLAGS = ["-std=c++17", "-O3", "-fPIC", "-shared", "-fno-math-errno", "-fno-trapping-math", "-fassociative-math",
         "-fno-signed-zeros", "-Wall", "-Wextra"]  # fmt: skip


def build() -> Path | None:
    """Compile `libmsda_cpu.so` and return its path; None, with a printed line, where there is no compiler."""
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        print("native kernel: no C++ compiler found (apt install g++); training will use plain PyTorch, slower")
        return None
    fresh = LIBRARY.with_suffix(f".{os.getpid()}.so")
    subprocess.run([compiler, *FLAGS, str(SOURCE / "msda_cpu.cpp"), "-o", str(fresh)], check=True)
    fresh.replace(LIBRARY)
    print(f"native kernel: built {LIBRARY.name}")
    return LIBRARY


if __name__ == "__main__":
    try:
        build()
    except subprocess.CalledProcessError as error:
        print(f"native kernel: the compiler failed with status {error.returncode}; plain PyTorch will be used")
        sys.exit(1)
