"""A checkpoint into a bundle with a TensorRT engine, in steps that are kept: what `ddetr build` does.

The output is written beside its place and renamed, in the last step. The engine's own answers are held against the
bundle's proof where this machine has a GPU that it runs on; elsewhere the server that loads it does so.
"""

import copy
import importlib.metadata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import onnx

import plugins
from bundle import Bundle, Canvas, EngineProfile, EngineRecord, ParityRecord, read_bundle, write_bundle
from bundle.reader import CHECKPOINT_FILE, MANIFEST_FILE, ONNX_FILE, PROOF_FILE, sha256_of
from bundle.writer import check_place
from export import op
from export.build import Parsed, Profile, build, parse
from export.build_errors import OtherModel, check_room
from export.engine_gate import CannotRun, gate_engine, gpu_for, parity_records
from export.flavour import FLAVOURS
from export.half_parity import verify_half
from export.layers import LayersWrong, check_layers, described, from_json, to_json
from export.onnx_export import ExportError, export, variant_of
from export.onnx_export import Request as ExportRequest
from export.precision import to_half
from export.proof import make_proof
from export.steps import Say, Steps, alone_in, replace_file
from export.trace import trace
from export.verify import verify
from models import DeformableDetr, load_checkpoint, save_checkpoint
from parity.proof import proof_bytes, proof_from

STEPS = ("load", "bundle", "trace", "verify", "build", "check", "gate", "publish")
WEIGHTS_FILE, BUNDLE_FOLDER = "weights.safetensors", "bundle"
_PROGRAMS = ("torch", "onnx", "onnxscript", "onnxruntime")
_CODE = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Request:
    """What to build of what, for which GPUs. `output` None: the bundle that `checkpoint` is."""

    checkpoint: Path
    output: Path | None = None
    variant: str | None = None
    precision: str = "fp16"
    flavour: str = "tensorrt"
    targets: tuple[str, ...] = ()
    hardware_compatible: bool = False
    canvases: tuple[Canvas, ...] = ()
    typical_batch_size: int = 4
    max_batch_size: int = 8
    workspace_mib: int | None = None
    tf32: bool = False
    embed_plugin: bool = False
    name: str | None = None
    model_version: str = "1"
    with_checkpoint: bool = False
    replace: bool = False
    work: Path | None = None


def build_engine(request: Request, say: Say = lambda _: None) -> Bundle:
    """Run the steps and return the published bundle. Until the last step the output is left as it is.

    Raises what the steps raise: FileNotFoundError, CheckpointError, ExportError, TraceError, ParityError, BundleError,
    BuildError, Occupied, OSError.
    """
    if not request.checkpoint.exists():
        raise FileNotFoundError(f"no checkpoint at {request.checkpoint}")
    source = read_bundle(request.checkpoint) if _is_bundle(request.checkpoint) else None
    if source is None and request.output is None:
        raise ExportError("--output is needed: --checkpoint is no bundle to add an engine to")
    if source is not None and source.checkpoint_path is None:
        raise ExportError(
            f"{source.path} carries no {CHECKPOINT_FILE}: give its checkpoint as --checkpoint and {source.path} "
            "as --output, or export it --with-checkpoint"
        )
    if not 1 <= request.typical_batch_size <= request.max_batch_size:
        raise ExportError(f"typical batch size {request.typical_batch_size} is not in 1..{request.max_batch_size}")
    if request.workspace_mib is not None and request.workspace_mib < 1:
        raise ExportError(f"--workspace-mib is {request.workspace_mib}; it must be at least 1")
    output = (request.output or request.checkpoint).resolve()
    check_place(output)
    version, targets = _prepared(request)  # what cannot be built is known before the long steps
    work = request.work or output.parent / f".{output.name}.build"
    with alone_in(work):
        return _Build(request, source, output, version, targets, Steps(work, STEPS, say)).run()


def _prepared(request: Request) -> tuple[str, tuple[str, ...]]:
    """The version of TensorRT and the GPUs its engine will run on. Raises NotInstalled, PluginMissing, TargetError."""
    flavour = FLAVOURS[request.flavour]
    flavour.load()
    targets = flavour.targets(request.targets)
    empty = Parsed(flavour)
    if request.hardware_compatible:
        targets = flavour.widened(targets)
    return str(empty.trt.__version__), targets


@dataclass
class _Build:
    request: Request
    source: Bundle | None
    output: Path
    version: str
    targets: tuple[str, ...]
    step: Steps

    @property
    def arch(self) -> str:
        return "-".join(self.targets)

    @property
    def engine_file(self) -> str:
        return f"{self.request.flavour}-{self.arch}-{self.request.precision}.engine"

    @property
    def graph_path(self) -> Path:
        return self.step.folder / f"graph-{self.request.precision}.onnx"

    @cached_property
    def model(self) -> DeformableDetr:
        """Read only for the steps that are not kept."""
        return load_checkpoint(self.step.folder / WEIGHTS_FILE)

    @cached_property
    def code(self) -> str:
        """What wrote the graphs: the sources and the libraries below them."""
        sources = sorted(path for package in ("export", "models") for path in (_CODE / package).glob("*.py"))
        return " ".join([*map(sha256_of, sources), *(f"{name} {_version(name)}" for name in _PROGRAMS)])

    def run(self) -> Bundle:
        """Every step in its turn."""
        loaded = self.load()
        base = self.base(loaded)
        canvases = base.manifest.canvases
        if self.request.canvases and set(self.request.canvases) != set(canvases):
            raise ExportError(
                f"the bundle serves the canvases {', '.join(map(str, canvases))}, asked for were "
                f"{', '.join(map(str, self.request.canvases))}: an engine has those of its bundle (or --replace it)"
            )
        proof = self.proof(base, loaded)
        graph = self.trace(loaded)
        parity = self.verify(loaded, graph, canvases)
        built = self.build(graph, canvases)
        self.check(graph, built)
        record = self.gate(self.record(base, graph, parity, built), proof)
        return self.publish(base, loaded, record)

    def load(self) -> dict[str, Any]:
        """The checkpoint, whatever its form, as one file of weights."""
        path = self.request.checkpoint if self.source is None else self.source.checkpoint_path
        assert path is not None  # build_engine has asked

        def work() -> dict[str, Any]:
            model = load_checkpoint(path, self.request.variant)
            weights = self.step.folder / WEIGHTS_FILE
            save_checkpoint(model, weights)
            parameters = sum(parameter.numel() for parameter in model.parameters())
            variant = variant_of(model.config)
            line = f"{variant}, {parameters / 1e6:.1f} M parameters, {model.config.num_classes} classes"
            file = sha256_of(path) if path.is_file() else ""
            return {"weights": sha256_of(weights), "file": file, "variant": variant, "line": line}

        inputs = {"checkpoint": _fingerprint(path), "variant": self.request.variant, "code": self.code}
        return self.step("load", inputs, work, [WEIGHTS_FILE])

    def base(self, loaded: dict[str, Any]) -> Bundle:
        """The bundle that gets the engine: there already, or exported now with all that an export verifies."""
        there = read_bundle(self.output) if _is_bundle(self.output) and not self.request.replace else None
        base = there or self.source
        if base is None:
            return self._exported(loaded)
        manifest = base.manifest
        if manifest.hashes.get("checkpoint") not in (loaded["weights"], loaded["file"]):
            raise OtherModel(
                f"{base.path} holds {manifest.model.name} {manifest.model.version}, {manifest.variant}, made of "
                f"another checkpoint than this {loaded['variant']}: give another --output, or --replace it"
            )
        line = f"{manifest.model.name} {manifest.model.version}, {len(manifest.engines)} engines, hashes as stated"
        self.step("bundle", {"manifest": manifest.model_dump_json()}, lambda: {"line": line}, of="there")
        return base

    def _exported(self, loaded: dict[str, Any]) -> Bundle:
        request, folder = self.request, self.step.folder / BUNDLE_FOLDER
        asked = ExportRequest(
            self.step.folder / WEIGHTS_FILE,
            folder,
            name=request.name,
            model_version=request.model_version,
            canvases=request.canvases,
            with_checkpoint=request.with_checkpoint,
        )

        def work() -> dict[str, Any]:
            made = export(asked, self.step.detail)
            return {"line": f"{ONNX_FILE} agrees with PyTorch on {len(made.manifest.parity)} batches"}

        inputs = {"weights": loaded["weights"], "code": self.code, "canvases": repr(request.canvases)}
        inputs["asked"] = repr((request.name, request.model_version, request.with_checkpoint))
        self.step("bundle", inputs, work, [f"{BUNDLE_FOLDER}/{name}" for name in (MANIFEST_FILE, ONNX_FILE)])
        return read_bundle(folder)

    def proof(self, base: Bundle, loaded: dict[str, Any]) -> Path:
        """The base bundle's proof, made now for one that was exported without."""
        if "proof" in base.manifest.hashes:
            return base.path / PROOF_FILE
        canvases, detections = base.manifest.canvases, base.manifest.max_detections

        def work() -> dict[str, Any]:
            proof = make_proof(self.model, canvases, detections, self.step.detail)
            replace_file(self.step.folder / PROOF_FILE, proof_bytes(proof))
            return {"line": f"{PROOF_FILE}, which it had not"}

        inputs = {"weights": loaded["weights"], "canvases": repr(canvases), "detections": detections, "code": self.code}
        self.step("bundle", inputs, work, [PROOF_FILE], of="proof")
        return self.step.folder / PROOF_FILE

    def trace(self, loaded: dict[str, Any]) -> dict[str, Any]:
        """The engine's graph, in the precision asked for; its order of operations is the GPU's, not the CPU's."""

        def work() -> dict[str, Any]:
            model = self.model
            if self.request.precision == "fp16":
                model = copy.deepcopy(model)
                to_half(model)
            proto = trace(model)
            content = proto.SerializeToString(deterministic=True)
            replace_file(self.graph_path, content)
            nodes = sum(node.domain == op.DOMAIN for node in proto.graph.node)
            line = f"{self.request.precision}, {len(proto.graph.node)} nodes, {nodes} of them {op.NAME}"
            line += f"; {len(content) / 2**20:.1f} MiB"
            return {"graph": sha256_of(self.graph_path), "attentions": nodes, "line": line}

        inputs = {"weights": loaded["weights"], "precision": self.request.precision, "code": self.code}
        return self.step("trace", inputs, work, [self.graph_path.name], of=self.request.precision)

    def verify(self, loaded: dict[str, Any], graph: dict[str, Any], canvases: Sequence[Canvas]) -> list[ParityRecord]:
        """The engine's graph in ONNX Runtime against float32 PyTorch, on the smallest canvas and the largest."""
        by_size = sorted(canvases, key=lambda canvas: (canvas.height * canvas.width, canvas.height))
        some = tuple(dict.fromkeys((by_size[0], by_size[-1])))

        def detail(record: ParityRecord, unpaired: int = 0) -> None:
            self.step.detail(
                f"{record.canvas} batch {record.batch_size}: box error {record.max_box_error:.1e}, score error "
                f"{record.max_score_error:.1e}, {unpaired} queries unpaired, {record.engine}"
            )

        def work() -> dict[str, Any]:
            proto = onnx.load(self.graph_path)
            compare: Callable[..., tuple[ParityRecord, ...]]
            compare = verify_half if self.request.precision == "fp16" else verify
            records = compare(self.model, proto, some, detail)
            worst = max(record.max_box_error for record in records), max(record.max_score_error for record in records)
            line = f"{len(records)} batches agree with PyTorch: box error {worst[0]:.1e}, score error {worst[1]:.1e}"
            return {"parity": [record.model_dump(mode="json") for record in records], "line": line}

        inputs = {"weights": loaded["weights"], "graph": graph["graph"], "canvases": list(map(str, some))}
        inputs["code"] = self.code
        result = self.step("verify", inputs, work, of=self.request.precision)
        return [ParityRecord.model_validate(record) for record in result["parity"]]

    def build(self, graph: dict[str, Any], canvases: Sequence[Canvas]) -> dict[str, Any]:
        """The engine, once its layers are seen to be right: a wrong network is not built for minutes."""
        request = self.request
        library = plugins.tensorrt_library()
        assert library is not None  # _prepared has loaded it
        profiles = [Profile(canvas, request.max_batch_size, request.typical_batch_size) for canvas in canvases]

        def work() -> dict[str, Any]:
            check_room(self.step.folder, self.graph_path.stat().st_size * (len(self.targets) + 2))
            parsed = parse(onnx.load(self.graph_path), FLAVOURS[request.flavour])
            check_layers(parsed.report(), graph["attentions"], request.precision)
            engine = build(
                parsed,
                profiles,
                () if request.hardware_compatible else self.targets,
                tf32=request.tf32,
                embed_plugin=request.embed_plugin,
                hardware_compatible=request.hardware_compatible,
                workspace_mib=request.workspace_mib,
                timing_cache=self.step.folder / f"timing-{request.flavour}-{self.version}-{self.arch}.cache",
                progress=self.step.detail,
            )
            replace_file(self.step.folder / self.engine_file, engine.content)
            line = f"{self.engine_file}, {len(engine.content) / 2**20:.1f} MiB, {request.flavour} {self.version}, "
            line += f"{len(profiles)} profiles of batches 1/{request.typical_batch_size}/{request.max_batch_size}"
            return {"report": to_json(engine.report), "plugin": sha256_of(library), "line": line}

        inputs = {
            "graph": graph["graph"],
            "plugin": sha256_of(library),
            "version": self.version,
            "targets": self.targets,
            "profiles": repr(profiles),
            "options": [request.tf32, request.embed_plugin, request.workspace_mib],
            "code": self.code,
        }
        return self.step("build", inputs, work, [self.engine_file], of=self.engine_file)

    def check(self, graph: dict[str, Any], built: dict[str, Any]) -> None:
        """The report of the network that the engine was built of, and the plugin's name in the engine's bytes.

        TensorRT's own inspector of a finished engine needs the engine's GPU: it is asked beside the gate.
        """
        path = self.step.folder / self.engine_file

        def work() -> dict[str, Any]:
            report = from_json(built["report"])
            check_layers(report, graph["attentions"], self.request.precision)
            found = path.read_bytes().count(op.NAME.encode())
            least = graph["attentions"] * len(self.targets) if self.request.flavour == "rtx" else 1
            if found < least:
                raise LayersWrong(f"{self.engine_file} names {op.NAME} {found} times; its layers need {least}")
            first, *rest = described(report)
            for line in rest:
                self.step.detail(line)
            return {"line": first}

        inputs = {"engine": sha256_of(path), "attentions": graph["attentions"], "precision": self.request.precision}
        self.step("check", {**inputs, "code": self.code}, work, of=self.engine_file)

    def record(
        self, base: Bundle, graph: dict[str, Any], parity: Sequence[ParityRecord], built: dict[str, Any]
    ) -> EngineRecord:
        """What the manifest is to say of the engine."""
        request, path = self.request, self.step.folder / self.engine_file
        profiles = tuple(
            EngineProfile(
                canvas=canvas, typical_batch_size=request.typical_batch_size, max_batch_size=request.max_batch_size
            )
            for canvas in base.manifest.canvases
        )
        return EngineRecord(
            file=self.engine_file,
            flavour="rtx" if request.flavour == "rtx" else "tensorrt",
            arch=self.arch,
            precision=request.precision,
            tf32=request.tf32,
            sha256=sha256_of(path),
            built_with={request.flavour: self.version, **{name: _version(name) for name in _PROGRAMS}},
            targets=self.targets,
            profiles=profiles,
            hashes={"graph": graph["graph"], "plugin": built["plugin"]},
            graph_parity=tuple(parity),
        )

    def gate(self, record: EngineRecord, proof: Path) -> EngineRecord:
        """The record with what the gate measured, or as it was where the engine cannot be run here."""
        path = self.step.folder / self.engine_file
        try:
            gpu = gpu_for(record)
            where, unable = f"{gpu.name}, {gpu.arch}", ""
        except CannotRun as error:
            gpu, where, unable = None, "", str(error)

        def work() -> dict[str, Any]:
            found: list[ParityRecord] = []
            why = unable
            if gpu is not None:
                try:
                    report = gate_engine(path, record, proof_from(proof.read_bytes()), gpu.index, self.step.detail)
                except CannotRun as error:
                    why = str(error)
                else:
                    found = list(parity_records(report, record.file))
                    line = f"answers as PyTorch does on {len(report.rows)} pictures in {report.seconds:.1f} s, {where}"
                    return {"parity": [one.model_dump(mode="json") for one in found], "line": line}
            return {"parity": [], "line": f"NOT RUN HERE: {why}; a server holds it against the proof before serving it"}

        inputs = {"engine": record.sha256, "proof": sha256_of(proof), "where": where, "unable": unable}
        result = self.step("gate", {**inputs, "code": self.code}, work, of=self.engine_file)
        return record.model_copy(update={"parity": tuple(ParityRecord.model_validate(one) for one in result["parity"])})

    def publish(self, base: Bundle, loaded: dict[str, Any], record: EngineRecord) -> Bundle:
        """The base bundle's files and the engine in the output, unless it is there already."""
        request, path = self.request, self.step.folder / self.engine_file
        carried = not request.with_checkpoint or base.checkpoint_path is not None
        line = f"{self.output}: {base.manifest.model.name} {base.manifest.model.version}, "
        proven = "proof" in base.manifest.hashes
        if base.path.resolve() == self.output and record in base.manifest.engines and carried and proven:
            self.step("publish", {"record": record.model_dump_json()}, lambda: {"line": f"{line}there already"})
            return base
        others = tuple(engine for engine in base.manifest.engines if engine.file != record.file)
        manifest = base.manifest.model_copy(update={"engines": (*others, record)})
        files: dict[str, Path | bytes] = {
            file.name: file for file in base.path.iterdir() if file.is_file() and file.name != MANIFEST_FILE
        }
        files[record.file] = path
        if not proven:
            files[PROOF_FILE] = self.step.folder / PROOF_FILE
        if not carried:
            files[CHECKPOINT_FILE] = self.step.folder / WEIGHTS_FILE

        def work() -> dict[str, Any]:
            check_room(self.output.parent, sum(f.stat().st_size for f in files.values() if isinstance(f, Path)))
            write_bundle(self.output, manifest, files)
            return {"line": f"{line}{len(manifest.engines)} engines, the newest {record.file}"}

        # Whether it is done is seen from the output alone.
        self.step("publish", {"record": record.model_dump_json(), "loaded": loaded["weights"]}, work, always=True)
        return read_bundle(self.output)


def _is_bundle(path: Path) -> bool:
    return (path / MANIFEST_FILE).is_file() and (path / ONNX_FILE).is_file()


def _fingerprint(path: Path) -> str:
    """Hashes of a checkpoint's file, or of all files in its folder."""
    files = sorted(file for file in path.iterdir() if file.is_file()) if path.is_dir() else [path]
    return " ".join(f"{file.name} {sha256_of(file)}" for file in files)


def _version(program: str) -> str:
    try:
        return importlib.metadata.version(program)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"
