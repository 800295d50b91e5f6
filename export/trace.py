"""The served network as an ONNX model: traced once, dynamic in batch, height and width."""

import copy
import logging
import warnings
from collections import Counter

import onnx
import onnx_ir as ir
import torch
from onnx_ir.passes import common as passes
from onnxscript import optimizer
from torch import Tensor

from export import native_layers, op
from export.fold import fold_batch_norms
from export.late_values import project_values_late
from export.proposal_scores import score_one_class
from export.pyramid import usual_pixels
from export.served_graph import MAX_DETECTIONS, ServedGraph
from models import DeformableDetr
from models.geometry import rectangle_geometry

INPUTS = ("images", "sizes")
OUTPUTS = ("boxes", "scores", "labels")
RAW_OUTPUTS = ("pred_logits", "pred_boxes")
"""Names of the network's own outputs inside the graph; not outputs of the published model."""

_EXAMPLE_SIDE_PX = 256  # any with enough pixels for the queries; the width differs, or both become one symbol
_FOLD_LIMIT = 1 << 28  # elements: fold every constant expression, weights as well


class TraceError(RuntimeError):
    """The traced graph is not the graph that a bundle needs."""


def trace(model: DeformableDetr, max_detections: int = MAX_DETECTIONS, *, for_cpu: bool = False) -> onnx.ModelProto:
    """The ONNX model of `model` (in eval mode), the op's function attached; the model itself is left as it was.

    `for_cpu` puts parts of it in an order that is quicker on a CPU; what the graph computes is the same.
    """
    served = ServedGraph(copy.deepcopy(model), max_detections).eval().requires_grad_(False)
    served.model.geometry = rectangle_geometry  # what its mask always is
    fold_batch_norms(served)
    score_one_class(served.model)
    if for_cpu:
        project_values_late(served.model, usual_pixels(model.config))
    graph = _exported(served)
    _name_outputs(graph)
    optimizer.fold_constants(graph, input_size_limit=_FOLD_LIMIT, output_size_limit=_FOLD_LIMIT)
    _tidy(graph)
    if for_cpu:
        native_layers.use_native_layers(graph)
    proto = ir.to_proto(graph)
    del proto.graph.value_info[:]  # every runtime infers them itself
    used = {node.op_type for node in proto.graph.node if node.domain == op.DOMAIN}
    proto.functions.extend([op.function(), *native_layers.functions(used & set(native_layers.NAMES))])
    proto.producer_name, proto.producer_version = "ddetr", ""
    config = model.config
    _check(proto, nodes=config.num_encoder_layers + config.num_decoder_layers)
    return proto


def _exported(served: ServedGraph) -> ir.Model:
    op.register_schema()
    images, sizes = _example(served)
    dynamic = torch.export.Dim.DYNAMIC
    log = logging.getLogger("torch.onnx")
    level = log.level
    log.setLevel(logging.ERROR)  # it warns of torchvision's operators, which are not used here
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's own deprecations inside the exporter
            program = torch.onnx.export(
                served,
                (images, sizes),
                dynamo=True,
                opset_version=op.OPSET,
                input_names=INPUTS,
                output_names=(*OUTPUTS, *RAW_OUTPUTS),
                dynamic_shapes=({0: dynamic, 1: dynamic, 2: dynamic}, {0: dynamic}),
                custom_translation_table=op.translations(),
                verbose=False,
            )
    finally:
        log.setLevel(level)
    if program is None:
        raise TraceError("torch.onnx.export returned no program")
    return program.model


def _example(served: ServedGraph) -> tuple[Tensor, Tensor]:
    """A batch to trace with; its values and sizes leave no mark in the graph."""
    config = served.model.config
    side = _EXAMPLE_SIDE_PX
    while (side // 32) ** 2 < config.num_queries and config.two_stage:
        side *= 2
    images = torch.zeros((2, side, side + 64, 3), dtype=torch.uint8)
    return images, torch.tensor([[side, side + 64], [side - 32, side]])


def _name_outputs(model: ir.Model) -> None:
    """Take the raw outputs off the graph's list (their names stay), and name the dynamic axes."""
    del model.graph.outputs[len(OUTPUTS) :]
    axes = {"images": ("N", "H", "W", 3), "sizes": ("N", 2)}
    for value in model.graph.inputs:
        value.shape = ir.Shape(axes[str(value.name)])
    for value in model.graph.outputs:
        if value.shape is None:
            raise TraceError(f"output {value.name} has no shape")
        value.shape = ir.Shape(["N", *list(value.shape)[1:]])


def _tidy(model: ir.Model) -> None:
    """Fold, share and strip until the graph holds what it computes with and nothing of the machine it was made on."""
    passes.CommonSubexpressionEliminationPass()(model)
    passes.IdentityEliminationPass()(model)
    passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    passes.DeduplicateInitializersPass(size_limit=_FOLD_LIMIT)(model)
    passes.RemoveUnusedNodesPass()(model)
    passes.RemoveUnusedFunctionsPass()(model)  # type: ignore[no-untyped-call]
    passes.TopologicalSortPass()(model)
    _sums_before_norms(model.graph)
    _forget_origin(model)


def _sums_before_norms(graph: ir.Graph) -> None:
    """Spell the residual addition before a layer norm `Sum`.

    ONNX Runtime 1.32 fuses Add and LayerNormalization into a slower kernel; Sum it leaves alone. Measured on a network
    of 3+3 layers of 128 channels at 288x384: 112 ms of one core instead of 124.
    """
    for node in graph:
        if node.op_type == "LayerNormalization" and (x := node.inputs[0]) is not None:
            producer = x.producer()
            if producer is not None and producer.op_type == "Add":
                producer.op_type = "Sum"


def _forget_origin(model: ir.Model) -> None:
    """Drop stack traces and module paths: they name the machine that traced."""
    passes.ClearMetadataAndDocStringPass()(model)
    model.metadata_props.clear()
    graph = model.graph
    values = [*graph.inputs, *graph.initializers.values(), *(out for node in graph for out in node.outputs)]
    for value in values:
        value.metadata_props.clear()


def _check(proto: onnx.ModelProto, nodes: int) -> None:
    """Raise TraceError unless the graph is valid, float32 throughout, and has `nodes` nodes of the op."""
    onnx.checker.check_model(proto)
    found = Counter(node.op_type for node in proto.graph.node if node.domain == op.DOMAIN)[op.NAME]
    if found != nodes:
        raise TraceError(f"{nodes} layers need {nodes} {op.NAME} nodes, the graph has {found}")
    outputs = tuple(value.name for value in proto.graph.output)
    if outputs != OUTPUTS:
        raise TraceError(f"the graph's outputs should be {OUTPUTS}, are {outputs}")
    doubles = [tensor.name for tensor in proto.graph.initializer if tensor.data_type == onnx.TensorProto.DOUBLE]
    doubles += [
        node.output[0]
        for node in proto.graph.node
        for attribute in node.attribute
        if node.op_type == "Cast" and attribute.name == "to" and attribute.i == onnx.TensorProto.DOUBLE
    ]
    if doubles:
        raise TraceError(f"float64 in a float32 graph: {', '.join(doubles)}")
    produced = {name for node in proto.graph.node for name in node.output}
    if missing := [name for name in RAW_OUTPUTS if name not in produced]:
        raise TraceError(f"the graph does not name {', '.join(missing)}")
