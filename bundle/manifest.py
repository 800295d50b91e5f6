"""manifest.json: everything a server must know of a model that is not in its graph."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from bundle.resize import Canvas, ResizeRule

FORMAT_VERSION = 1

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Rgb = tuple[float, float, float]


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ModelName(_Record):
    """What the model is called, and which of its versions this is."""

    name: str = Field(min_length=1)
    version: str = Field(min_length=1)


class ParityRecord(_Record):
    """How far an engine was from float32 PyTorch on the same inputs."""

    canvas: Canvas
    batch_size: int = Field(ge=1)
    max_box_error: float = Field(ge=0, description="of the image's side")
    max_score_error: float = Field(ge=0)
    engine: str = Field(
        default="onnxruntime",
        description="what was compared: onnxruntime (the op as the function that the file carries), onnxruntime+msda "
        "(the op as the native kernel), or an engine's file name",
    )
    detections_compared: int | None = Field(default=None, ge=0)


class EngineProfile(_Record):
    """The batches of one canvas that an engine takes: of 1 to `max_batch_size`, quickest at the typical one."""

    canvas: Canvas
    typical_batch_size: int = Field(ge=1)
    max_batch_size: int = Field(ge=1)


class EngineRecord(_Record):
    """An engine file, and what it was built of and for."""

    file: str
    flavour: Literal["tensorrt", "rtx"]
    arch: str = Field(description="sm80; sm86-sm89 for an engine of two; sm80+ for that and all after it")
    precision: str
    tf32: bool = Field(default=False, description="its float32 products round to 10 bits")
    sha256: Sha256
    built_with: dict[str, str] = Field(default_factory=dict)
    targets: tuple[str, ...] = Field(default=(), description="the GPUs it runs on; none: `arch` alone")
    profiles: tuple[EngineProfile, ...] = ()
    hashes: dict[str, str] = Field(
        default_factory=dict, description="SHA-256 of the 'graph' it was built of and the 'plugin' it needs"
    )
    graph_parity: tuple[ParityRecord, ...] = Field(
        default=(), description="the graph it was built of, in ONNX Runtime; not the engine's own answers"
    )
    parity: tuple[ParityRecord, ...] = Field(
        default=(), description="the engine's own answers, on the bundle's proof; none: not run where it was built"
    )

    _plain_name = field_validator("file")(lambda value: plain_file_name(value))

    @property
    def exactness(self) -> str:
        """The precision whose limits its answers are held to: "fp32", "tf32" or "fp16"."""
        return "tf32" if self.tf32 and self.precision == "fp32" else self.precision

    def runs_on(self, arch: str) -> bool:
        """Whether a GPU of this architecture ("sm86") can run it; which TensorRT does is another question."""
        return any(
            arch == target or (target.endswith("+") and _number(arch) >= _number(target))
            for target in self.targets or (self.arch,)
        )


class Agreement(_Record):
    """How far another form of the model finds what float32 finds on the same pictures."""

    detections: int = Field(ge=0, description="of float32, with a score of at least `threshold`")
    threshold: float = Field(ge=0, le=1)
    matched: float = Field(ge=0, le=1, description="share that has one of the same label with an IoU of at least 0.9")
    score_difference: float = Field(ge=0, description="mean over the matched, absolute")


class QuantisedRecord(_Record):
    """The graph in 8-bit integers for CPUs, and what was measured of it beside the float32 graph before it was kept."""

    file: str
    sha256: Sha256
    of: Sha256 = Field(description="SHA-256 of the model.onnx it was made from")
    pictures: int = Field(ge=1, description="that both were measured on")
    ap_fp32: float
    ap_int8: float
    ap50_fp32: float
    ap50_int8: float
    agreement: Agreement
    calibration_pictures: int = Field(ge=1, description="that its ranges are from; none of those measured on")
    float_groups: tuple[str, ...] = Field(default=(), description="groups of layers left in float32 for accuracy")
    noise: dict[str, float] = Field(
        default_factory=dict, description="how far integers move the gate's figures in this network, on its proof"
    )
    built_with: dict[str, str] = Field(default_factory=dict)

    _plain_name = field_validator("file")(lambda value: plain_file_name(value))


class Manifest(_Record):
    """The manifest of a bundle, format version 1."""

    format_version: int = FORMAT_VERSION
    model: ModelName
    variant: str
    categories: dict[int, str] = Field(min_length=1, description="category id to name")
    resize: ResizeRule
    canvases: tuple[Canvas, ...] = Field(min_length=1)
    mean: Rgb = Field(description="of RGB in 0..1; applied inside the graph")
    std: Rgb
    precision: str = "fp32"
    max_detections: int = Field(default=100, ge=1, description="K, the graph's detections an image")
    hashes: dict[str, str] = Field(
        default_factory=dict,
        description="SHA-256 of 'onnx' (model.onnx), 'checkpoint' (model.safetensors), 'proof' (proof.npz) and others",
    )
    built_with: dict[str, str] = Field(default_factory=dict, description="program to version")
    parity: tuple[ParityRecord, ...] = ()
    engines: tuple[EngineRecord, ...] = ()
    int8: QuantisedRecord | None = None


def _number(arch: str) -> int:
    digits = "".join(filter(str.isdecimal, arch))
    return int(digits) if digits else -1


def plain_file_name(name: str) -> str:
    """`name`, if it is a file name without a folder; else ValueError."""
    if not name or name in {".", ".."} or "/" in name or "\\" in name or "\0" in name:
        raise ValueError(f"{name!r} is not a plain file name")
    return name
