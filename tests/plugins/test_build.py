"""The native build: what is made of which compilers and headers, with compilers that only note what they are told."""

from __future__ import annotations

import ctypes
import os
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

import plugins
from plugins import build
from plugins.torch_op import Params

# Stands in for a compiler: notes its arguments, answers nvcc's questions, writes what -o names, fails where it is to.
COMPILER = """#!/bin/sh
echo "$(basename $0) $*" >> {log}
case "$*" in
  *--list-gpu-code*) printf '{codes}'; exit 0;;
  *--version*) echo 'release {version}'; exit 0;;
  *--dryrun*) echo '#$ INCLUDES="-I/toolkit/include"  ' >&2; exit 0;;
  *{fails}*) echo "error: no" >&2; exit 1;;
esac
while [ $# -gt 0 ]; do
  if [ "$1" = -o ]; then echo made > "$2"; fi
  shift
done
"""
CODES = ("sm_75", "sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_110", "sm_120")
CPU_LIBRARIES = ["libmsda_cpu.so", "libmsda_onnxruntime.so", "libresize.so"]
ALL_LIBRARIES = [library.name for library in build.LIBRARIES]


@dataclass
class Machine:
    """What the build finds: a folder of compilers, and TensorRT's headers or none."""

    folder: Path
    monkeypatch: pytest.MonkeyPatch

    @property
    def log(self) -> Path:
        return self.folder / "log"

    def put(
        self, name: str, codes: tuple[str, ...] = CODES, fails: str = "nothing at all", version: str = "13.0"
    ) -> None:
        path = self.folder / "bin" / name
        path.parent.mkdir(exist_ok=True)
        text = COMPILER.format(log=self.log, codes="\\n".join(codes), fails=fails.replace(" ", "\\ "), version=version)
        path.write_text(text)
        path.chmod(0o755)

    def put_headers(self) -> Path:
        include = self.folder / "tensorrt" / "include"
        include.mkdir(parents=True)
        (include / "NvInferRuntime.h").touch()
        self.monkeypatch.setenv("TENSORRT_ROOT", str(include.parent))
        return include

    def calls(self, pattern: str) -> list[str]:
        return [line for line in self.log.read_text().splitlines() if re.search(pattern, line)]


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    """A machine with nothing on it."""
    for name in ("CXX", "NVCC", "TENSORRT_ROOT"):
        monkeypatch.delenv(name, raising=False)
    folder = tmp_path / "machine"
    folder.mkdir()
    is_file = Path.is_file
    monkeypatch.setattr(
        build.shutil,
        "which",
        lambda name: str(path) if (path := folder / "bin" / name).exists() and "/" not in name else None,
    )
    monkeypatch.setattr(build.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(Path, "is_file", lambda path: is_file(path) and not path.is_relative_to("/usr/include"))
    return Machine(folder, monkeypatch)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """Where libraries go."""
    folder = tmp_path / "out"
    folder.mkdir()
    return folder


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_without_a_compiler_nothing_is_built(machine: Machine, out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    machine.put("nvcc")
    assert build.build(out) == []
    assert "no C++ compiler found" in capsys.readouterr().out
    assert not names(out)


def test_a_compiler_of_cpp_makes_what_the_cpu_needs(
    machine: Machine, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    machine.put("g++")
    assert sorted(path.name for path in build.build(out)) == CPU_LIBRARIES
    assert names(out) == CPU_LIBRARIES
    assert not machine.calls("MSDA_WITH_CUDA")
    assert len(machine.calls(r"-c \S*msda_cpu\.cpp")) == 1, "what two libraries share is compiled once"
    lines = capsys.readouterr().out.splitlines()
    assert sum("no nvcc found" in line for line in lines) == 1
    assert not any("TensorRT" in line for line in lines), "one missing piece, one line"


def test_nvcc_makes_the_kernel_too(machine: Machine, out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    machine.put("g++")
    machine.put("nvcc")
    build.build(out)
    assert names(out) == sorted({*ALL_LIBRARIES} - {"libmsda_tensorrt.so"})
    (kernel,) = machine.calls(r"msda_cuda\.cu")
    for arch in build.ARCHITECTURES:
        assert f"sm_{arch}" in kernel
    assert re.findall(r",(compute_\d+)\]", kernel) == ["compute_80", "compute_120"], "PTX for older and for newer GPUs"
    assert len(machine.calls("-DMSDA_WITH_CUDA.*msda_onnxruntime.cpp")) == 1
    assert all("-cudart static" in line for line in machine.calls("^nvcc .*-shared"))
    assert "no TensorRT headers found" in capsys.readouterr().out


def test_an_older_nvcc_makes_what_it_knows(machine: Machine, out: Path) -> None:
    machine.put("g++")
    machine.put("nvcc", codes=("sm_70", "sm_80", "sm_86", "sm_89", "sm_90"))
    build.build(out)
    (kernel,) = machine.calls(r"msda_cuda\.cu")
    assert "120" not in kernel
    assert re.findall(r",(compute_\d+)\]", kernel) == ["compute_80", "compute_90"]


def test_headers_make_the_plugin_too(machine: Machine, out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    machine.put("g++")
    machine.put("nvcc")
    include = machine.put_headers()
    assert build.tensorrt_includes() == [include, Path("/toolkit/include")]
    build.build(out)
    assert names(out) == sorted(ALL_LIBRARIES)
    (call,) = machine.calls(r"msda_tensorrt\.cpp")
    assert f"-isystem{include} -isystem/toolkit/include" in call
    assert not machine.calls("msda_(cpu|onnxruntime).cpp.*isystem|isystem.*msda_(cpu|onnxruntime).cpp")
    printed = capsys.readouterr().out
    assert all(f"built {name}" in printed for name in ALL_LIBRARIES)


def test_headers_without_nvcc_are_of_no_use(machine: Machine, out: Path) -> None:
    machine.put("g++")
    machine.put_headers()
    assert build.tensorrt_includes() is None
    build.build(out)
    assert names(out) == CPU_LIBRARIES


def test_a_failing_compiler_leaves_nothing_behind(machine: Machine, out: Path) -> None:
    machine.put("g++", fails="-std=c++17")
    with pytest.raises(subprocess.CalledProcessError):
        build.build(out)
    assert not names(out)


def test_a_failing_nvcc_leaves_what_the_cpu_needs(
    machine: Machine, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    machine.put("g++")
    machine.put("nvcc", fails="msda_cuda.cu")
    with pytest.raises(subprocess.CalledProcessError, match="nvcc"):
        build.build(out)
    assert names(out) == CPU_LIBRARIES
    assert not machine.calls("MSDA_WITH_CUDA")
    assert "msda_cuda.cu was not compiled" in capsys.readouterr().out


def test_one_library_that_fails_does_not_stop_the_others(machine: Machine, out: Path) -> None:
    machine.put("g++", fails="msda_tensorrt.cpp")
    machine.put("nvcc")
    machine.put_headers()
    with pytest.raises(subprocess.CalledProcessError, match="msda_tensorrt"):
        build.build(out)
    assert names(out) == sorted({*ALL_LIBRARIES} - {"libmsda_tensorrt.so"})


def test_an_nvcc_that_is_not_there_leaves_what_the_cpu_needs(
    machine: Machine, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    machine.put("g++")
    machine.put_headers()
    machine.monkeypatch.setenv("NVCC", "/nowhere/nvcc")
    build.build(out)
    assert names(out) == CPU_LIBRARIES
    assert "$NVCC, /nowhere/nvcc, is no program here: nothing is built for GPUs" in capsys.readouterr().out


def test_an_nvcc_that_is_another_program_leaves_what_the_cpu_needs(
    machine: Machine, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    machine.put("g++")
    machine.put("abacus", codes=())
    machine.monkeypatch.setenv("NVCC", "abacus")
    with pytest.raises(OSError, match="abacus"):
        build.build(out)
    assert names(out) == CPU_LIBRARIES
    assert re.search("abacus compiles for no GPU of sm_80, .* is it CUDA 11's, or newer", capsys.readouterr().out)


@pytest.fixture
def kernel(machine: Machine, tmp_path: Path) -> Path:
    """An object, just made."""
    machine.put("nvcc")
    return build.compile_kernel(str(machine.folder / "bin" / "nvcc"), tmp_path / "msda_cuda.o")


def times_compiled(machine: Machine, kernel: Path) -> int:
    """After one more build."""
    build.compile_kernel(str(machine.folder / "bin" / "nvcc"), kernel)
    return len(machine.calls(r"msda_cuda\.cu"))


def test_the_kernel_is_compiled_once(machine: Machine, kernel: Path) -> None:
    assert times_compiled(machine, kernel) == 1
    assert names(kernel.parent) == ["machine", "msda_cuda.o", "msda_cuda.o.made_by"]


def test_the_kernel_is_compiled_again_when_its_source_has_changed(machine: Machine, kernel: Path) -> None:
    os.utime(kernel, (0, 0))
    assert times_compiled(machine, kernel) == 2


def test_the_kernel_is_compiled_again_by_another_cuda(machine: Machine, kernel: Path) -> None:
    machine.put("nvcc", version="13.1")
    assert [times_compiled(machine, kernel) for _ in range(2)] == [2, 2]


def test_the_kernel_is_compiled_again_for_other_gpus(
    machine: Machine, kernel: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "ARCHITECTURES", ("80",))
    assert [times_compiled(machine, kernel) for _ in range(2)] == [2, 2]


def test_a_kernel_of_which_nothing_says_what_made_it_is_compiled_again(machine: Machine, kernel: Path) -> None:
    kernel.with_name("msda_cuda.o.made_by").unlink()
    assert times_compiled(machine, kernel) == 2


def test_what_needs_no_kernel_waits_for_none(machine: Machine, out: Path) -> None:
    machine.put("g++")
    machine.put("nvcc")
    build.build(out, only=["libresize.so"])
    assert names(out) == ["libresize.so"]
    assert not machine.calls(r"msda_cuda\.cu")


def test_libraries_are_found_where_they_are_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    finders = {
        "libmsda_onnxruntime.so": plugins.onnxruntime_library,
        "libmsda_tensorrt.so": plugins.tensorrt_library,
        "libmsda_cuda.so": plugins.cuda_library,
        "libresize.so": plugins.resize_library,
    }
    assert finders.keys() <= set(ALL_LIBRARIES)
    monkeypatch.setattr(plugins, "_BUILT", tmp_path)
    for name, find in finders.items():
        assert find() is None
        (tmp_path / name).touch()
        assert find() == tmp_path / name


@pytest.mark.skipif(plugins.cuda_library() is None, reason="the CUDA kernel is not built: no nvcc")
def test_the_cuda_library_loads_without_a_driver_and_says_what_is_wrong() -> None:
    kernel = ctypes.CDLL(str(plugins.cuda_library()))
    kernel.msda_cuda_error.restype = ctypes.c_char_p
    refused = kernel.msda_forward_cuda(ctypes.byref(Params(levels=0)), None, None)
    assert kernel.msda_cuda_error(refused) == b"cudaErrorInvalidValue: invalid argument"


def test_some_libraries_alone(machine: Machine, out: Path) -> None:
    machine.put("g++")
    machine.put("nvcc")
    machine.put_headers()
    assert [path.name for path in build.build(out, only=["libmsda_tensorrt.so"])] == ["libmsda_tensorrt.so"]
    assert names(out) == ["libmsda_tensorrt.so"]
    assert not machine.calls(r"msda_cpu\.cpp"), "nothing else is compiled"
