"""One bundle at work: its engines behind their queue, what is known of their speed, and the requests that use it."""

import asyncio
import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from bundle import Manifest, read_bundle
from server.batch_queue import BatchQueue, Inferred, Priority
from server.batcher import Batcher
from server.engine import Engine, OpenEngine, placements
from server.errors import EngineFailed
from server.estimate import Estimate
from server.gate import Verdict, open_proven
from server.metrics import Metrics
from server.preprocess import PreparedImage
from server.settings import Settings

logger = logging.getLogger("ddetr.served")

LEAST_FAILURES = 3  # one picture that no engine takes, and its sender's two further tries, condemn no bundle
CLOSE_S = 10.0  # longest wait for engines to give their memory back


@dataclass(eq=False)
class Opened:
    """Engines of one bundle, open and not yet at work."""

    engines: Sequence[Engine]
    reopen: Sequence[OpenEngine] = ()  # what opens one in the place of each, or nothing
    path: Path | None = None  # of the bundle, links followed; None: the engines were handed over
    verdicts: tuple[Verdict, ...] = ()  # of each engine, as it was opened last

    def close(self) -> None:
        """Let them go unused."""
        for engine in self.engines:
            try:
                engine.close()
            except Exception:  # the others hold memory, too
                logger.exception("%s could not be closed", engine.name)


def open_bundle(
    settings: Settings,
    path: Path,
    metrics: Metrics,
    gate_seconds: float,
    given_up: Callable[[], bool] = lambda: False,
) -> Opened:
    """The settings' engines for the bundle in folder `path`, proven. Raises BundleError or StartupError.

    The first engine of a file on a kind of device has `gate_seconds` to be compared in; for others of that kind, and
    for one that takes a lost one's place, one picture a canvas is enough. One that takes such a place and is of a kind
    that is new here has the settings' `gate_seconds`. `given_up`: see `open_proven`.
    """
    path = path.resolve()  # what a link leads to later is another bundle
    bundle = read_bundle(path)
    places = placements(settings)
    compared: set[tuple[str, str]] = set()
    telling = threading.Lock()  # engines may be lost at once, and each is opened in a thread of its own

    def reopen(number: int) -> Engine:
        proven = open_proven(places[number], read_bundle(path), metrics, settings.gate_seconds, compared)
        with telling:
            opened.verdicts = (*opened.verdicts[:number], proven.verdict, *opened.verdicts[number + 1 :])
        return proven.engine

    opened = Opened([], [partial(reopen, number) for number in range(len(places))], path)
    try:
        for place in places:
            proven = open_proven(place, bundle, metrics, gate_seconds, compared, given_up)
            opened.engines = [*opened.engines, proven.engine]
            opened.verdicts = (*opened.verdicts, proven.verdict)
    except BaseException:
        opened.close()
        raise
    return opened


class Served:
    """Answers pictures by one bundle. A request uses the same one from its first byte to its answer."""

    def __init__(self, opened: Opened, settings: Settings, metrics: Metrics, clock: Callable[[], float]) -> None:
        self.opened = opened
        self.manifest: Manifest = opened.engines[0].manifest
        self.estimate = Estimate(len(opened.engines))
        self.batcher = Batcher(
            opened.engines,
            BatchQueue(settings.max_batch_size, settings.max_delay_ms / 1e3),
            self.estimate,
            metrics,
            clock,
            reopen=opened.reopen,
            stall_timeout_s=settings.stall_timeout_ms / 1e3,
        )
        self.answered = self.failed = 0
        """Images that an engine answered since it was opened, and images that it failed on."""
        self._error_share = settings.rollback_error_percent / 100
        self._requests = 0
        self._unused = asyncio.Event()
        self._unused.set()

    @property
    def engine_name(self) -> str:
        """What runs, and on what."""
        return self.batcher.engine_name

    @property
    def verdicts(self) -> tuple[Verdict, ...]:
        """How each engine was found right."""
        return self.opened.verdicts or tuple(Verdict(engine.name, "not asked") for engine in self.opened.engines)

    @contextmanager
    def used(self) -> Iterator[None]:
        """While a request is answered by it."""
        self._requests += 1
        self._unused.clear()
        try:
            yield
        finally:
            self._requests -= 1
            if not self._requests:
                self._unused.set()

    async def unused(self) -> None:
        """Wait until no request uses it. There will be no other once new ones go elsewhere."""
        await self._unused.wait()

    async def infer(
        self, image: PreparedImage, deadline_s: float, on_dispatch: Callable[[], None], priority: Priority
    ) -> Inferred:
        """See `Batcher.infer`."""
        try:
            inferred = await self.batcher.infer(image, deadline_s, on_dispatch, priority)
        except EngineFailed:
            self.failed += 1
            raise
        self.answered += 1
        return inferred

    def suspicion(self) -> str | None:
        """Why it should not stay in service, if something else could take its place; None if all is well."""
        if self.batcher.losses:
            return "its engine died or hung"
        images = self.answered + self.failed
        if self.failed >= LEAST_FAILURES and self.failed > self._error_share * images:
            return f"its engine failed on {self.failed} of {images} images"
        return None

    async def warm(self) -> None:
        """Run every engine on every canvas, so that no request pays for a first time. Errors are raised."""
        await self.batcher.warm()

    async def close(self, patience_s: float = CLOSE_S) -> list[Future[None]]:
        """Fail what is left, and wait, not for ever, until the engines have given their memory back; see `Batcher`."""
        return await self.batcher.close(patience_s)
