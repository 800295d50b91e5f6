"""A served graph as a pass over ONNX's own operators wants it: whatever other ops it is published with, written out."""

import onnx
import onnx_ir as ir
from onnx.inliner import inline_selected_functions
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
        model = ir.from_proto(onnx.shape_inference.infer_shapes(plain))
        passes.IdentityEliminationPass()(model)
        optimizer.fold_constants(model, input_size_limit=_FOLD_LIMIT, output_size_limit=_FOLD_LIMIT)
        _cancel_transpositions(model.graph)
        passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
        passes.RemoveUnusedNodesPass()(model)
        passes.TopologicalSortPass()(model)
        plain = ir.to_proto(model)
    for number, node in enumerate(plain.graph.node):
        node.name = node.name or f"{node.op_type}_{number}"
    # Through the op's function: ONNX Runtime knows nothing of what the native kernel gives, and where it does not know
    # a tensor's rank it does not turn the convolution behind it to the layout that its integer kernels want.
    return onnx.shape_inference.infer_shapes(plain)


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
