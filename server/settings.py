"""Settings: environment variables DDETR_*, and flags of the same names of `ddetr serve`."""

import os
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, SecretStr, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from bundle import embedded_bundle
from server.cores import available_cores

# Above this Pillow warns of decompression bombs, and above twice this refuses them; both stay in force.
_PILLOW_LIMIT_PIXELS = 89_478_485

LONGEST_TRIAL_S = 24 * 3600.0


def _engine_cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ddetr" / "engines"


class Settings(BaseSettings):
    """Everything that can be set, with its default. The defaults serve the embedded model on this machine's CPU."""

    model_config = SettingsConfigDict(env_prefix="DDETR_", extra="forbid", frozen=True)

    bundle: Path = Field(default_factory=embedded_bundle, description="folder of the bundle to serve")
    engine: Literal["auto", "onnxruntime", "tensorrt"] = Field(
        "auto", description="what runs the network; tensorrt: nothing else, but until build_engine has built one"
    )
    device: str = Field(
        "auto",
        pattern=r"^(auto|cpu|all|cuda|cuda:\d+(,cuda:\d+)*)$",
        description="auto, cpu, cuda, cuda:N, several as cuda:0,cuda:1, or all GPUs",
    )
    precision: Literal["auto", "fp32", "fp16", "int8"] = Field(
        "auto", description="of the network; auto: half where the bundle has such an engine, else float32"
    )
    build_engine: Literal["never", "background"] = Field(
        "never",
        description="background: for a bundle without a TensorRT engine for this GPU build one while ONNX Runtime "
        "serves, and swap to it",
    )
    engine_cache: Path = Field(
        default_factory=_engine_cache, description="folder of engines built so, and of what RTX compiles"
    )
    engine_instances: int = Field(1, ge=1, le=64, description="engines that work side by side, on each device")
    engine_threads: int = Field(0, ge=0, description="CPU threads of an engine; 0: the cores shared among instances")
    engine_niceness: int = Field(
        10,
        ge=0,
        le=19,
        description="of an engine's own threads on the CPU (Linux): they give way to those that feed it; 0 where other "
        "programs that are always busy share its control group",
    )

    gate: bool = Field(True, description="compare an engine's answers with its bundle's proof before it is served")
    gate_seconds: float = Field(
        2.0, ge=0, description="at the start, time for comparing more than one picture a canvas"
    )
    on_parity_failure: Literal["refuse", "fallback"] = Field(
        "fallback", description="with an engine whose answers are wrong: do not start, or use the next kind of engine"
    )

    admin_keys: Annotated[tuple[SecretStr, ...], NoDecode] = Field(
        (), description="comma-separated; /admin needs one of them; none: /admin is closed"
    )
    bundle_root: Path | None = Field(None, description="folder that bundles posted to /admin/bundle must lie in")
    watch_bundle: bool = Field(False, description="swap to what `bundle` leads to whenever that changes")
    swap_timeout_seconds: float = Field(600.0, gt=0, description="longest that a new bundle may take to be opened")
    shadow_percent: float = Field(
        0.0,
        ge=0,
        le=100,
        description="of live pictures, shown in a swap to the new bundle before the switch, and to the old one for "
        "rollback_seconds after it; a post to /admin/bundle may ask otherwise",
    )
    shadow_seconds: float = Field(60.0, gt=0, le=LONGEST_TRIAL_S, description="for how long, before the switch")
    min_agreement: float = Field(
        0.8, ge=0, le=1, description="of the boxes in those pictures; if both bundles find less, the old one serves"
    )
    rollback_seconds: float = Field(30.0, ge=0, description="after a swap, how long the old bundle is kept ready")
    rollback_error_percent: float = Field(
        5.0, ge=0, le=100, description="of a new bundle's images; if its engine fails on more, the old one is back"
    )

    host: str = Field("127.0.0.1", description="address to listen on; 0.0.0.0 for all")
    port: int = Field(8000, ge=0, le=65535, description="port to listen on; 0 for any free one")
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="least level that is logged")
    log_format: Literal["auto", "json", "text"] = Field("auto", description="auto: text on a terminal, else json")
    metrics_host: str = Field("127.0.0.1", description="address of metrics_port")
    metrics_port: int = Field(0, ge=0, le=65535, description="port for /metrics alone; 0: it is on `port`")

    max_batch_size: int = Field(4, ge=1, le=1024, description="most images in a batch")
    max_delay_ms: float = Field(5.0, ge=0, description="after this wait an image's batch goes before fuller ones")
    queue_limit: int = Field(128, ge=1, description="most images admitted and not yet with an engine")
    default_timeout_ms: float = Field(30_000, gt=0, description="deadline of a request without X-Timeout-Ms")
    shutdown_delay_ms: float = Field(
        0,
        ge=0,
        description="after SIGTERM, time in which requests are still taken, each on a connection that ends with its "
        "answer, while /readyz is 503; behind a balancer as long as it needs to look elsewhere",
    )
    drain_timeout_ms: float = Field(30_000, ge=0, description="then the longest wait for requests under way")
    stall_timeout_ms: float = Field(
        1500, gt=0, description="least time without progress that fails /livez and replaces an engine"
    )

    max_body_bytes: int = Field(24 * 1024 * 1024, ge=1, description="most bytes of a request's body")
    max_queued_bytes: int = Field(
        0, ge=0, description="most bytes of bodies and uploads inside at once; 0: four times max-body-bytes"
    )
    body_timeout_ms: float = Field(20_000, gt=0, description="longest that a request's body may take to come in")
    max_image_pixels: int = Field(
        50_000_000, ge=1, le=_PILLOW_LIMIT_PIXELS, description="most pixels of an image, by its header"
    )
    max_decode_bytes: int = Field(
        1 << 30, ge=1, description="memory that large pictures being decoded share; one alone may take more"
    )
    max_images_per_request: int = Field(32, ge=1, description="most images in one request")
    decode_threads: int = Field(default_factory=available_cores, ge=1, le=256, description="threads that decode")

    # NoDecode: a comma-separated list, not JSON.
    api_keys: Annotated[tuple[SecretStr, ...], NoDecode] = Field(
        (), description="comma-separated; a request needs one of them; none: open to all"
    )
    api_keys_file: Path | None = Field(None, description="file of more keys, one a line; read again when it changes")
    open_pages: bool = Field(False, description="the pages / and /docs need no key, they ask for it themselves")

    @field_validator("api_keys", "admin_keys", mode="before")
    @classmethod
    def _split_keys(cls, value: object) -> object:
        if isinstance(value, str):
            keys = tuple(key for part in value.split(",") if (key := part.strip()))
            if not keys:  # `--api-keys "$KEYS"` with nothing in it must not open the server to all
                raise ValueError("no key in it; to serve without keys leave it out")
            return keys
        return value

    @model_validator(mode="after")
    def _ports_differ(self) -> "Settings":
        if self.metrics_port and self.metrics_port == self.port:
            raise ValueError(f"metrics_port {self.metrics_port} is port, too: 0 leaves /metrics there")
        return self

    @model_validator(mode="after")
    def _queue_holds_a_body(self) -> "Settings":
        if 0 < self.max_queued_bytes < self.max_body_bytes:
            raise ValueError(
                f"max_queued_bytes {self.max_queued_bytes} is less than max_body_bytes {self.max_body_bytes}: "
                "such a body could never be admitted"
            )
        return self

    @model_validator(mode="after")
    def _queue_holds_a_request(self) -> "Settings":
        # By default the queue bounds the request; to ask for more than it can hold is a mistake.
        if self.max_images_per_request > self.queue_limit and "max_images_per_request" in self.model_fields_set:
            raise ValueError(
                f"max_images_per_request {self.max_images_per_request} exceeds queue_limit {self.queue_limit}: "
                "such a request could never be admitted"
            )
        return self
