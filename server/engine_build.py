"""Where a bundle has no TensorRT engine for this GPU: builds one in a process of its own, then swaps to it.

Meanwhile the bundle is served as it can be, by ONNX Runtime. What is built is kept, see `engine_cache`.
"""

import asyncio
import importlib.util
import logging
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from bundle import Bundle, BundleError, read_bundle
from runtime import Gpu, RuntimeUnavailable
from server.engine import Candidate, placements
from server.engine_cache import EngineCache, NoRecipe, Recipe, recipe_for
from server.errors import ServiceError, StartupError, SwapInProgress
from server.service import Service
from server.settings import Settings
from server.swap import Swap, Swaps
from server.tensorrt_engine import find_gpu, tensorrt_ways

logger = logging.getLogger("ddetr.engine_build")

_LOOK_S = 1.0  # between two looks at what is served, or whether another server has finished
_TERMINATE_S = 5.0
_LONGEST_LINE = 4096  # that is kept of what a build says

BUILD_NEEDS = ("torch", "onnx", "onnxscript", "safetensors")
"""Packages that a server has no need of, and the process that builds has."""

Command = Callable[[Recipe, Bundle, Gpu, Path], Sequence[str]]


def build_command(recipe: Recipe, bundle: Bundle, gpu: Gpu, work: Path) -> Sequence[str]:
    """What builds the recipe's engine into a copy of the bundle, `work`/bundle; at low priority, as others wait."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    name = visible[gpu.index].strip() if gpu.index < len(visible) and visible[0] else str(gpu.index)
    return [
        *("env", f"CUDA_VISIBLE_DEVICES={name}", "nice", "-n", "10"),
        *(sys.executable, "-m", "export.trt_build"),
        *("--checkpoint", str(bundle.path), "--output", str(work / "bundle"), "--work", str(work / "steps")),
        *("--precision", recipe.precision, "--flavour", recipe.flavour, "--targets", recipe.arch),
        *("--typical-batch-size", str(recipe.max_batch_size), "--max-batch-size", str(recipe.max_batch_size)),
    ]


class BuildFailed(Exception):
    """The process that built it failed; the message is the last line it said."""


class EngineBuilder:
    """Looks after every bundle that comes into service; one build at a time."""

    def __init__(self, settings: Settings, service: Service, swaps: Swaps, command: Command = build_command) -> None:
        self._settings = settings
        self._service = service
        self._swaps = swaps
        self._command = command
        self._cache = EngineCache(settings.engine_cache)
        self._watching: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to look, if the settings say so."""
        if self._settings.build_engine == "background":
            self._watching = asyncio.get_running_loop().create_task(self._watch())

    async def stop(self) -> None:
        """End a build that is under way; it goes on from its last finished step another time."""
        if self._watching is not None:
            self._watching.cancel()
            await asyncio.wait([self._watching])

    async def _watch(self) -> None:
        seen: object = None
        while True:
            served = self._service.served
            if served is not seen:
                seen = served
                try:
                    if served.opened.path is not None:
                        await self._look_after(served.opened.path)
                except Exception:  # the service needs none of this
                    logger.exception("no engine could be built for %s", served.opened.path)
            await asyncio.sleep(_LOOK_S)

    async def _look_after(self, path: Path) -> None:
        try:
            bundle = await asyncio.to_thread(read_bundle, path)
            missing = await asyncio.to_thread(_missing, self._settings, bundle)
            if missing and self._settings.gate and "proof" not in bundle.manifest.hashes:
                raise NoRecipe("it carries no proof, without which none is served: export it anew, or set --no-gate")
            if missing and (absent := [name for name in BUILD_NEEDS if importlib.util.find_spec(name) is None]):
                raise NoRecipe(f"that takes {', '.join(absent)}: pip install 'ddetr[export]'")
        except (BundleError, RuntimeUnavailable, NoRecipe, StartupError) as error:
            logger.warning("no engine is built for %s: %s", path, error)
            return
        built = [recipe for recipe, gpu in missing.items() if await self._get(recipe, bundle, gpu)]
        swap = await self._swap(path) if built else None
        if swap is None or self._service.stopping:
            return
        wrong = "; ".join(each for verdict in swap.gate for each in verdict.passed_over)
        if swap.wrong_answers or wrong:
            why = swap.reason or wrong
            for recipe in built:
                marker = self._cache.give_up(recipe, f"not served: {why}")
                logger.error("the engine that was built is not used: %s; to try again remove %s", why, marker)
        elif swap.state != "promoted":
            logger.warning("the engine that was built is kept, but not in service: %s", swap.reason)

    async def _get(self, recipe: Recipe, bundle: Bundle, gpu: Gpu) -> bool:
        """Whether the cache has it now, built by this server or another one."""
        waiting = False
        while True:
            with self._cache.alone(recipe) as alone:
                if await asyncio.to_thread(self._cache.find, recipe) is not None:
                    return True
                if (why := self._cache.failure(recipe)) is not None:
                    logger.warning("no engine is built for %s: it failed before: %s", bundle.path, why)
                    return False
                if alone:
                    return await self._build(recipe, bundle, gpu)
            if not waiting:
                logger.info("another process builds the engine for %s", bundle.path)
            waiting = True
            await asyncio.sleep(_LOOK_S)

    async def _build(self, recipe: Recipe, bundle: Bundle, gpu: Gpu) -> bool:
        work = self._cache.work(recipe)
        work.mkdir(exist_ok=True)
        began_s = time.monotonic()
        command = self._command(recipe, bundle, gpu, work)
        logger.info("building a TensorRT engine for %s meanwhile: %s", bundle.path, " ".join(command))
        builds = self._service.metrics.engine_builds
        try:
            await _run(command)
            record, _ = await asyncio.to_thread(lambda: self._cache.keep(recipe, read_bundle(work / "bundle")))
        except (BuildFailed, BundleError, LookupError, OSError) as error:
            builds.labels("failed").inc()
            marker = self._cache.give_up(recipe, str(error))
            logger.error("no engine was built for %s: %s; to try again remove %s", bundle.path, error, marker)
            return False
        builds.labels("built").inc()
        await asyncio.to_thread(shutil.rmtree, work, ignore_errors=True)
        logger.info("%s is built, in %.0f s", record.file, time.monotonic() - began_s)
        return True

    async def _swap(self, path: Path) -> Swap | None:
        """To the same bundle, opened again; what became of that, or None where there is no reason to any more."""
        swap: Swap | None = None
        while swap is None:
            if self._service.served.opened.path != path:  # another bundle came into service
                return None
            try:
                swap = self._swaps.begin(path, "build")
            except SwapInProgress:
                await asyncio.sleep(_LOOK_S)
            except ServiceError:  # the server is stopping
                return None
        await swap.over.wait()
        return swap


def _missing(settings: Settings, bundle: Bundle) -> dict[Recipe, Gpu]:
    """What the GPUs of the settings lack. Raises RuntimeUnavailable, NoRecipe or StartupError."""
    missing: dict[Recipe, Gpu] = {}
    for place in placements(settings):
        if place.engine == "onnxruntime" or place.device == "cpu":
            continue
        if not any(isinstance(way, Candidate) for way in tensorrt_ways(place, bundle)):
            gpu = find_gpu(place.device)
            missing[recipe_for(place, bundle, gpu)] = gpu
    return missing


async def _run(command: Sequence[str]) -> None:
    """Run it to its end, or end it with everything it began. Raises BuildFailed."""
    try:
        process = await asyncio.create_subprocess_exec(
            *command,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            start_new_session=True,
        )
    except OSError as error:
        raise BuildFailed(f"{command[0]}: {error}") from error
    try:
        last = await _heard(process)
        status = await process.wait()
    except BaseException:
        await _end(process)
        raise
    if status:
        raise BuildFailed(last or f"it ended with status {status}")


async def _heard(process: asyncio.subprocess.Process) -> str:
    """The last line that it says before it says nothing more; of a long one the end."""
    assert process.stdout is not None
    last, rest = "", b""
    while True:
        content = await process.stdout.read(1 << 16)
        *lines, rest = (rest + (content or b"\n")).split(b"\n")
        for line in lines:
            if said := line.decode(errors="replace").strip():
                last = said[-_LONGEST_LINE:]
                logger.debug("build: %s", last)
        if not content:
            return last
        rest = rest[-4 * _LONGEST_LINE :]  # UTF-8 takes up to 4 bytes a character


async def _end(process: asyncio.subprocess.Process) -> None:
    for signal_number in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal_number)
        with suppress(TimeoutError):
            await asyncio.wait_for(process.communicate(), _TERMINATE_S)
            return
