"""A served graph as a pass over ONNX's own operators wants it: whatever other ops it is published with, written out."""

import onnx
import onnx_ir as ir
from onnx.inliner import inline_local_functions, inline_selected_functions
from onnx_ir.passes import common as passes
from onnxscript import optimizer

from export import op

_FOLD_LIMIT = 1 << 28  # elements: a weight that an op keeps in an order of its own is brought back into Conv's


class PlainError(ValueError):
    """The graph has an op that cannot be written out; the message names it."""


def plain_graph(proto: onnx.ModelProto) -> onnx.ModelProto:
    """`proto` of ONNX's operators and MSDeformAttn alone, every node named, with the shapes that can be known.

    Every other function that the file carries is put in the place of its calls, and what that leaves is tidied: weights
    that are computed from constants, and transpositions that undo each other.
    """
    plain = inline_selected_functions(proto, [(op.DOMAIN, op.NAME)], exclude=True)
    foreign = {f"{node.domain}::{node.op_type}" for node in plain.graph.node if node.domain and node.op_type != op.NAME}
    if foreign:
        raise PlainError(f"the graph has {', '.join(sorted(foreign))}, whose functions the file does not carry")
    if len(plain.functions) < len(proto.functions):
        model = ir.from_proto(_with_shapes(plain))
        passes.IdentityEliminationPass()(model)
        optimizer.fold_constants(model, input_size_limit=_FOLD_LIMIT, output_size_limit=_FOLD_LIMIT)
        _cancel_transpositions(model.graph)
        passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
        passes.RemoveUnusedNodesPass()(model)
        passes.TopologicalSortPass()(model)
        plain = ir.to_proto(model)
    maker = {name: node for node in plain.graph.node for name in node.output}
    for number, node in enumerate(plain.graph.node):
        node.name = node.name or f"{node.op_type}_{number}"
        before = maker.get(node.input[0]) if node.op_type == "LayerNormalization" else None
        if before is not None and before.op_type == "Add":
            before.op_type = "Sum"  # as `export.trace` spells it, and why
    return _with_shapes(plain)


def _with_shapes(proto: onnx.ModelProto) -> onnx.ModelProto:
    """`proto` with the shapes of its tensors, those behind the op too, which are known from its function alone.

    Without them ONNX Runtime, which knows nothing of what the native kernel gives, does not turn the convolutions
    behind it to the layout that its integer kernels want.
    """
    shapes = onnx.shape_inference.infer_shapes(inline_local_functions(proto)).graph.value_info
    made = {name for node in proto.graph.node for name in node.output}
    del proto.graph.value_info[:]
    proto.graph.value_info.extend(value for value in shapes if value.name in made)
    return proto


def _cancel_transpositions(graph: ir.Graph) -> None:
    for node in list(graph):
        if node.op_type != "Transpose" or (x := node.inputs[0]) is None:
            continue
        before = x.producer()
        if before is None or before.op_type != "Transpose" or (origin := before.inputs[0]) is None:
            continue
        first, second = before.attributes.get_ints("perm", []), node.attributes.get_ints("perm", [])
        if [first[axis] for axis in second] == sorted(first):
            node.outputs[0].replace_all_uses_with(origin)
