"""Opening an engine's file: what goes wrong, in one line; and our names against the real TensorRT-RTX."""

from __future__ import annotations

import enum
import inspect
import re
from pathlib import Path
from typing import Any

import pytest

import plugins
from runtime import EngineRefused, Gpu, NoGpu, NotInstalled, PluginRefused, open_tensorrt
from runtime.flavour import load_flavour, log_of
from runtime.tensorrt import open_on
from tests.conftest import has_gpu
from tests.runtime import double
from tests.runtime.conftest import GPU
from tests.runtime.double import FakeCuda, FakeTrt, Plan


@pytest.fixture(scope="module")
def rtx() -> Any:
    try:
        return load_flavour("rtx")
    except NotInstalled as error:
        pytest.skip(str(error))


def test_an_engine_of_another_version_says_both(cuda: FakeCuda, tmp_path: Path) -> None:
    path = Plan(version="10.14").write(tmp_path / "tensorrt-sm80-fp16.engine")
    with pytest.raises(EngineRefused) as refused:
        open_on(GPU, path, "tensorrt", FakeTrt(cuda, "11.1"), cuda, tmp_path / "p.so", "tensorrt 10.14 for sm80")
    assert str(refused.value) == (
        f"{path}, built with tensorrt 10.14 for sm80, cannot be loaded by tensorrt 11.1 on Double (sm80): expecting "
        "library version 10.14; build it here: ddetr build --checkpoint ... --flavour tensorrt"
    )


def test_a_file_that_cannot_be_read(cuda: FakeCuda, tmp_path: Path) -> None:
    path = tmp_path / "folder.engine"
    path.mkdir()
    with pytest.raises(EngineRefused, match=r"folder\.engine cannot be read: Is a directory"):
        open_on(GPU, path, "tensorrt", FakeTrt(cuda), cuda, tmp_path / "p.so")


def test_a_plugin_that_was_not_built(cuda: FakeCuda, tmp_path: Path) -> None:
    path = Plan().write(tmp_path / "model.engine")
    with pytest.raises(PluginRefused, match=r"was not built: it needs nvcc .* \(python -m plugins.build\)"):
        open_on(GPU, path, "tensorrt", FakeTrt(cuda), cuda, None)


def test_a_plugin_of_another_tensorrt(cuda: FakeCuda, tmp_path: Path) -> None:
    path, library = Plan().write(tmp_path / "model.engine"), tmp_path / "plugin.so"
    with pytest.raises(
        PluginRefused, match=r"plugin.so brings tensorrt 10.14 no plugin MSDeformAttn of version 1: unde"
    ):
        open_on(GPU, path, "tensorrt", FakeTrt(cuda, plugins=False), cuda, library)


def test_a_gpu_that_is_not_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("runtime.tensorrt.gpus", lambda: [Gpu(0, "One", "sm80")])
    monkeypatch.setattr("runtime.tensorrt.load_flavour", lambda _: None)
    with pytest.raises(NoGpu, match="there is no cuda:3: this machine's GPUs are cuda:0 to cuda:0"):
        open_tensorrt(tmp_path / "model.engine", "tensorrt", 3, None)


@pytest.mark.parametrize(
    ("flavour", "modules", "command"),
    [
        ("tensorrt", ["tensorrt"], "pip install tensorrt"),
        ("rtx", ["tensorrt_rtx", "tensorrt_rtx_bindings"], r"pip install 'ddetr\[rtx\]'"),
    ],
)
def test_a_flavour_that_is_not_installed(
    flavour: str, modules: list[str], command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def absent(name: str) -> Any:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr("runtime.flavour.importlib.import_module", absent)
    with pytest.raises(NotInstalled, match=f"is not installed: {command}$"):
        load_flavour(flavour)


# --- the real module --------------------------------------------------------------------------------------------------

DOUBLES = {
    "Runtime": double.Runtime,
    "IPluginRegistry": double.IPluginRegistry,
    "ICudaEngine": double.ICudaEngine,
    "IExecutionContext": double.RtxExecutionContext,
    "EngineInspector": double.EngineInspector,
    "IRuntimeConfig": double.IRuntimeConfig,
    "IRuntimeCache": double.IRuntimeCache,
}
ENUMS = [
    double.TensorIOMode,
    double.DataType,
    double.TensorLocation,
    double.LayerInformationFormat,
    double.ExecutionContextAllocationStrategy,
    double.DynamicShapesKernelSpecializationStrategy,
]


@pytest.mark.parametrize("name", DOUBLES)
def test_what_a_double_has_the_real_class_has_with_the_same_arguments(rtx: Any, name: str) -> None:
    """So that whatever our code calls is there: it is only ever tested with the double."""
    real = getattr(rtx, name)
    for member, mine in inspect.getmembers(DOUBLES[name]):
        if member.startswith("_") or member == "loaded":
            continue
        assert hasattr(real, member), f"{name} has no {member}"
        if not inspect.isfunction(mine):
            continue
        wanted = [each for each in inspect.signature(mine).parameters if each != "self"]
        forms = re.findall(rf"{member}\(self: [\w.]+(?:, )?(.*?)\) ->", str(getattr(real, member).__doc__))
        taken = [[part.split(":")[0].strip() for part in _arguments(form)] for form in forms]
        assert any(wanted == form for form in taken), f"{name}.{member} takes {taken}, the double {wanted}"


def _arguments(form: str) -> list[str]:
    """The arguments of a signature, commas in brackets left alone."""
    return [part for part in re.split(r", (?=\w+:)", form) if part]


@pytest.mark.parametrize("kind", ENUMS, ids=lambda kind: str(kind.__name__))
def test_what_an_enumeration_has_the_real_one_has(rtx: Any, kind: type[enum.Enum]) -> None:
    real = getattr(rtx, kind.__name__).__members__
    assert [name for name in kind.__members__ if name not in real] == []


def test_what_our_code_reads_of_the_real_module_is_there(rtx: Any) -> None:
    assert hasattr(rtx.ICudaEngine, "device_memory_size_v2")
    assert hasattr(rtx.IRuntimeConfig, "dynamic_shapes_kernel_specialization_strategy")
    assert rtx.ILogger.Severity.ERROR < rtx.ILogger.Severity.WARNING


def test_one_logger_for_a_process(rtx: Any) -> None:
    assert log_of(rtx) is log_of(rtx)


@pytest.mark.skipif(has_gpu(), reason="there is a GPU")
@pytest.mark.skipif(plugins.tensorrt_library() is None, reason="the TensorRT plugin was not built")
def test_the_real_runtime_takes_our_plugin_and_refuses_an_engine_without_a_gpu(rtx: Any, tmp_path: Path) -> None:
    cuda = FakeCuda()
    path = tmp_path / "model.engine"
    path.write_bytes(bytes(4096))
    for _ in range(2):  # a second runtime has its own registry
        with pytest.raises(
            EngineRefused, match=r"model.engine cannot be loaded by rtx .* on Double \(sm80\): .+; build"
        ):
            open_on(GPU, path, "rtx", rtx, cuda, plugins.tensorrt_library())
    with pytest.raises(PluginRefused, match="brings rtx .* no plugin MSDeformAttn"):
        open_on(GPU, path, "rtx", rtx, cuda, tmp_path / "absent.so")


def test_of_several_errors_the_first_line_is_told_and_an_empty_one_is_none(cuda: FakeCuda) -> None:
    log = log_of(FakeTrt(cuda))
    error = log.ERROR if hasattr(log, "ERROR") else double.ILogger.Severity.ERROR
    log.log(error, "")
    assert log.reason() == "no reason given"
    log.log(error, "the first")
    log.log(error, "its consequence\nand more")
    assert log.reason() == "the first"
