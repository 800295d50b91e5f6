"""Compile the native libraries into the folder `built`: `python -m plugins.build`, or some: `... libmsda_tensorrt.so`.

What the compilers and headers of this machine allow is built, and a line says what is missing and where it would be
looked for; without a C++ compiler nothing is, and what would use the libraries runs without them, slower. Exits 1 only
where a compiler was there and failed.
"""

import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent
SOURCE, BUILT = ROOT / "msda", ROOT / "built"
KERNEL = "msda_cuda.cu"


@dataclass(frozen=True)
class Library:
    """The kernels are compiled into each library: they load nothing of ours, and of CUDA the driver alone."""

    name: str
    sources: tuple[str, ...]  # C++, in the folder of this file
    exact: bool = False  # no sum is put in another order
    cuda: bool = False  # holds the CUDA kernel
    without_cuda: bool = True  # is built, less MSDA_WITH_CUDA, where there is no nvcc
    tensorrt: bool = False  # needs its headers; nothing of it is linked


LIBRARIES = (
    Library("libresize.so", ("resize/resize.cpp",), exact=True),
    Library("libmsda_cpu.so", ("msda/msda_cpu.cpp",)),
    Library("libmsda_cuda.so", (), cuda=True, without_cuda=False),
    Library("libmsda_tensorrt.so", ("msda/msda_tensorrt.cpp",), cuda=True, without_cuda=False, tensorrt=True),
    Library(
        "libmsda_onnxruntime.so",
        ("msda/msda_onnxruntime.cpp", "msda/msda_cpu.cpp", "conv/conv_onnxruntime.cpp", "conv/conv_cpu.cpp"),
        cuda=True,
    ),
)

FLAGS = ["-std=c++17", "-O3", "-fPIC", "-Wall", "-Wextra", "-Wno-psabi", "-Wno-maybe-uninitialized"]
FAST_FLAGS = ["-fno-math-errno", "-fno-trapping-math", "-fassociative-math", "-fno-signed-zeros"]
EXACT_FLAGS = ["-ffp-contract=off"]
# Compiled as they are for whatever library: the sums of a row in one order, wherever in a batch it stands.
OWN_FLAGS = {"msda/msda_cpu.cpp": FAST_FLAGS, "conv/conv_cpu.cpp": ["-fno-math-errno", "-fno-trapping-math"]}
LINKED = "-Bsymbolic,--exclude-libs,ALL"  # calls to our own functions stay inside, and CUDA's runtime is not seen
CUDA_FLAGS = ["-std=c++17", "-O3", "-Xcompiler", "-fPIC,-Wall,-Wextra", "--threads", "0"]
# Machine code for these, where nvcc knows them. For other GPUs the driver compiles PTX: the oldest's (sm_87, sm_110) or
# the newest's (what comes after).
ARCHITECTURES = ("80", "86", "89", "90", "100", "120")


def compiler() -> list[str] | None:
    """The C++ compiler's command: $CXX, else the first one found; None where there is none."""
    if os.environ.get("CXX"):
        return shlex.split(os.environ["CXX"])
    found = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
    return [found] if found else None


def nvcc() -> str | None:
    """CUDA's compiler: $NVCC, else the one on the path, else the toolkit's usual place; None where there is none."""
    if os.environ.get("NVCC"):
        return shutil.which(os.environ["NVCC"])
    return shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")


def tensorrt_includes() -> list[Path] | None:
    """Where TensorRT's headers are, and CUDA's, which they need; None where either is missing.

    They are looked for in $TENSORRT_ROOT/include, in the system's folders, and in the package kernel-lens.
    """
    command = nvcc()
    if command is None:
        return None
    folders = [Path("/usr/include/x86_64-linux-gnu"), Path("/usr/include/aarch64-linux-gnu"), Path("/usr/include")]
    if os.environ.get("TENSORRT_ROOT"):
        folders.insert(0, Path(os.environ["TENSORRT_ROOT"]) / "include")
    wheel = importlib.util.find_spec("kernel_lens")
    folders += [Path(place) / "include" / "tensorrt" for place in (wheel and wheel.submodule_search_locations) or ()]
    found = next((folder for folder in folders if (folder / "NvInferRuntime.h").is_file()), None)
    told = subprocess.run([command, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True, check=False)
    cuda = [
        Path(word.removeprefix("-I"))
        for line in told.stderr.splitlines()
        if line.startswith("#$ INCLUDES=")
        for word in shlex.split(line.removeprefix("#$ INCLUDES="))
    ]
    return [found, *cuda] if found and cuda else None


def _run(command: list[str]) -> None:
    subprocess.run(command, check=True)


def _say(text: str) -> None:
    print(f"native kernel: {text}", flush=True)


def _cuda_compiler(command: str) -> list[str]:
    """nvcc with $CXX, where that is one word, as the compiler of its host code."""
    host = shlex.split(os.environ.get("CXX", ""))
    return [command, *(["-ccbin", host[0]] if len(host) == 1 else [])]


def compile_kernel(command: str, to: Path) -> Path:
    """Compile the CUDA kernel to an object, unless that is newer than its sources and made by this compiler, like this.

    A file beside the object says what made it. Raises subprocess.CalledProcessError where nvcc fails, OSError where it
    is another program.
    """

    def told(question: str) -> str:
        return subprocess.run([command, question], capture_output=True, text=True, check=True).stdout

    listing = told("--list-gpu-code").split()
    known = [arch for arch in ARCHITECTURES if f"sm_{arch}" in listing]
    if not known:
        raise OSError(f"{command} compiles for no GPU of sm_{', sm_'.join(ARCHITECTURES)}: is it CUDA 11's, or newer?")
    targets = []
    for arch in known:
        ptx = f",compute_{arch}" if arch in (known[0], known[-1]) else ""
        targets += ["-gencode", f"arch=compute_{arch},code=[sm_{arch}{ptx}]"]
    compile_it = [*_cuda_compiler(command), *CUDA_FLAGS, *targets, "-c", str(SOURCE / KERNEL)]
    made_by, maker = to.with_name(f"{to.name}.made_by"), f"{told('--version')}{shlex.join(compile_it)}\n"
    newest = max(source.stat().st_mtime for source in (SOURCE / KERNEL, SOURCE / "msda.h"))
    made_alike = made_by.exists() and made_by.read_text(encoding="utf-8") == maker
    if made_alike and to.exists() and to.stat().st_mtime > newest:
        return to
    fresh = to.with_name(f"{os.getpid()}.{to.name}")
    try:
        _run([*compile_it, "-o", str(fresh)])
        made_by.unlink(missing_ok=True)  # of the object before
        fresh.replace(to)
        made_by.write_text(maker, encoding="utf-8")
        return to
    finally:
        fresh.unlink(missing_ok=True)


def link(library: Library, folder: Path, objects: list[Path], with_cuda: bool) -> Path:
    """Make the library of its objects. One that is in use is replaced, not overwritten."""
    cpp, cuda = compiler(), nvcc()
    assert cpp is not None  # or there would be no objects
    assert cuda is not None or not with_cuda
    command = [*cpp, f"-Wl,{LINKED}"]
    if cuda is not None and with_cuda:
        command = [*_cuda_compiler(cuda), "-cudart", "static", "-Xlinker", LINKED]
    fresh = folder / f"{library.name}.{os.getpid()}.new"
    try:
        _run([*command, "-shared", *map(str, objects), "-o", str(fresh)])
        return fresh.replace(folder / library.name)
    finally:
        fresh.unlink(missing_ok=True)


def build(folder: Path = BUILT, only: Collection[str] = ()) -> list[Path]:
    """Compile what can be into `folder` and return the libraries' paths; a line is printed for each, built or missing.

    With `only`, no libraries but those named.

    Raises what a compiler that failed did, subprocess.CalledProcessError, or OSError where it is another program,
    after all others are built.
    """
    cpp, cuda, kernel, includes = compiler(), nvcc(), None, None
    if cpp is None:
        _say("no C++ compiler found (apt install g++); training and serving will be slower")
        return []
    wanted = [library for library in LIBRARIES if not only or library.name in only]
    with_kernel = any(library.cuda for library in wanted)
    if with_kernel and cuda is None:
        given = os.environ.get("NVCC")
        lacking = f"$NVCC, {given}, is no program here" if given else "no nvcc found ($NVCC, the path, /usr/local/cuda)"
        _say(f"{lacking}: nothing is built for GPUs")
    folder.mkdir(parents=True, exist_ok=True)
    built: list[Path] = []
    failures: list[Exception] = []
    with tempfile.TemporaryDirectory() as temporary:
        objects: dict[tuple[str, ...], Path] = {}  # by their flags and source: what libraries share is compiled once

        def compiled(source: str, flags: list[str]) -> Path:
            key = (*flags, source)
            if key not in objects:
                path = Path(temporary) / f"{len(objects)}.o"
                _run([*cpp, *FLAGS, *flags, "-c", str(ROOT / source), "-o", str(path)])
                objects[key] = path
            return objects[key]

        if with_kernel and cuda is not None:
            try:  # it takes the longest, and is kept
                kernel = compile_kernel(cuda, (BUILT if folder == BUILT else Path(temporary)) / "msda_cuda.o")
                includes = tensorrt_includes()
                if includes is None:
                    where = "$TENSORRT_ROOT/include, /usr/include"
                    _say(f"no TensorRT headers found ({where}): its plugin is not built (make setup brings them)")
            except (OSError, subprocess.CalledProcessError) as error:
                _say(f"{KERNEL} was not compiled, nothing is built for GPUs: {error}")
                failures.append(error)
        for library in wanted:
            if (not library.without_cuda and kernel is None) or (library.tensorrt and includes is None):
                continue
            try:
                with_cuda = library.cuda and kernel is not None
                common = EXACT_FLAGS if library.exact else FAST_FLAGS
                flags = [*common, "-DMSDA_WITH_CUDA"] if with_cuda else common
                if library.tensorrt:  # what its headers define inline stays inside, too
                    flags = [*flags, "-fvisibility=hidden", *(f"-isystem{path}" for path in includes or ())]
                parts = [compiled(each, OWN_FLAGS.get(each, flags)) for each in library.sources]
                parts += [kernel] if kernel is not None and library.cuda else []
                built.append(link(library, folder, parts, with_cuda))
                _say(f"built {library.name}{', with CUDA' if with_cuda else ''}")
            except subprocess.CalledProcessError as error:
                _say(f"{library.name} was not built: {error}")
                failures.append(error)
    if failures:
        raise failures[0]
    return built


if __name__ == "__main__":
    if unknown := set(sys.argv[1:]) - {library.name for library in LIBRARIES}:
        there = ", ".join(library.name for library in LIBRARIES)
        sys.exit(f"{', '.join(sorted(unknown))}: there is no such library, only {there}")
    try:
        build(only=sys.argv[1:])
    except (OSError, subprocess.CalledProcessError) as error:
        _say(f"not built, what would use it runs slower or not at all: {error}")
        sys.exit(1)
