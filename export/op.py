"""The op `msda::MSDeformAttn` in ONNX: its schema, its translation from PyTorch, and its body for every runtime.

Axes: N batch, S = sum of h_l*w_l, M heads, D channels of a head, Lq queries, L levels, P points of a level.
"""

from collections.abc import Callable

import onnx
import torch
from onnx import defs, parser
from onnxscript import ir, values

import models.msda  # noqa: F401 - registers the op with PyTorch

DOMAIN = "msda"
NAME = "MSDeformAttn"
VERSION = 1
OPSET = 20

INPUTS = ("value", "spatial_shapes", "reference_points", "sampling_offsets", "attention_logits")

# One body for any L, P, M, D and for R = 2 and 4: a point with R = 2 is a box of 2P/w x 2P/h.
# The levels are laid below one another on one zeroed plane, two rows apart, so that one GridSample reads them all;
# a location further out than half a pixel beyond its level is drawn back to there, where the samples are zero already.
_BODY = """
{name} (value, spatial_shapes, reference_points, sampling_offsets, attention_logits) => (output)
{{
  zero = Constant <value_int = 0> ()
  one = Constant <value_int = 1> ()
  axis_0 = Constant <value_ints = [0]> ()
  axis_1 = Constant <value_ints = [1]> ()
  axis_2 = Constant <value_ints = [2]> ()
  four = Constant <value_ints = [4]> ()
  rest = Constant <value_ints = [-1]> ()
  gap = Constant <value_ints = [2]> ()
  half_f = Constant <value_float = 0.5> ()
  one_f = Constant <value_float = 1.0> ()
  n = Shape <start = 0, end = 1> (value)
  heads = Shape <start = 2, end = 3> (value)
  channels = Shape <start = 3, end = 4> (value)
  queries = Shape <start = 1, end = 2> (sampling_offsets)
  levels = Shape <start = 3, end = 4> (sampling_offsets)
  points = Shape <start = 4, end = 5> (sampling_offsets)
  level_points = Mul (levels, points)
  numbers = Mul (level_points, axis_2)
  planes = Mul (n, heads)
  width = Mul (heads, channels)

  h = Slice (spatial_shapes, axis_0, axis_1, axis_1)
  w = Slice (spatial_shapes, axis_1, axis_2, axis_1)
  h_gap = Add (h, gap)
  top = CumSum <exclusive = 1> (h_gap, zero)
  plane_h = ReduceSum <keepdims = 0> (h_gap)
  plane_w = ReduceMax <keepdims = 0> (w)
  row = Range (zero, plane_h, one)
  column = Range (zero, plane_w, one)
  level_row = Sub (row, top)
  below_top = GreaterOrEqual (level_row, zero)
  above_end = Less (level_row, h)
  in_rows = And (below_top, above_end)
  in_columns = Less (column, w)
  in_rows_3 = Unsqueeze (in_rows, axis_2)
  in_columns_3 = Unsqueeze (in_columns, axis_1)
  inside = And (in_rows_3, in_columns_3)
  area = Mul (h, w)
  first = CumSum <exclusive = 1> (area, zero)
  first_1 = Add (first, one)
  row_offset = Mul (level_row, w)
  row_start = Add (row_offset, first_1)
  row_start_3 = Unsqueeze (row_start, axis_2)
  pixel = Add (row_start_3, column)
  pixel_or_zero = Where (inside, pixel, zero)
  pixel_map = ReduceSum <keepdims = 0> (pixel_or_zero, axis_0)
  pixels = Reshape (pixel_map, rest)

  value_shape = Concat <axis = 0> (n, rest, width)
  rows = Reshape (value, value_shape)
  zero_row_first = Constant <value_ints = [0, 1, 0, 0, 0, 0]> ()
  rows_and_zero = Pad (rows, zero_row_first)
  plane_rows = Gather <axis = 1> (rows_and_zero, pixels)
  plane_flat = Transpose <perm = [0, 2, 1]> (plane_rows)
  plane_h_1 = Unsqueeze (plane_h, axis_0)
  plane_w_1 = Unsqueeze (plane_w, axis_0)
  plane_shape = Concat <axis = 0> (planes, channels, plane_h_1, plane_w_1)
  plane = Reshape (plane_flat, plane_shape)

  w_h = Concat <axis = 1> (w, h)
  side = CastLike (w_h, reference_points)
  points_f = CastLike (points, reference_points)
  points_2 = Add (points_f, points_f)
  point_side = Div (points_2, side)
  point_side_shape = Concat <axis = 0> (n, queries, levels, axis_2)
  point_sides = Expand (point_side, point_side_shape)
  boxes = Concat <axis = -1> (reference_points, point_sides)
  x_y = Slice (boxes, axis_0, axis_2, rest)
  box_side = Slice (boxes, axis_2, four, rest)

  left = Sub (top, top)
  left_top = Concat <axis = 1> (left, top)
  corner = CastLike (left_top, reference_points)
  plane_side = Concat <axis = 0> (plane_w_1, plane_h_1)
  plane_side_f = CastLike (plane_side, reference_points)
  pixel_side = Div (one_f, plane_side_f)
  unit = Add (pixel_side, pixel_side)
  x_y_level = Mul (x_y, side)
  x_y_plane = Add (x_y_level, corner)
  x_y_scaled = Mul (x_y_plane, unit)
  centre = Sub (x_y_scaled, one_f)
  box_level = Mul (box_side, side)
  offset_level = Div (box_level, points_2)
  offset_unit = Mul (offset_level, unit)
  low_plane = Sub (corner, half_f)
  low_scaled = Mul (low_plane, unit)
  low = Sub (low_scaled, one_f)
  end = Add (corner, side)
  high_plane = Add (end, half_f)
  high_scaled = Mul (high_plane, unit)
  high = Sub (high_scaled, one_f)

  one_point = Concat <axis = 0> (n, axis_1, queries, levels, axis_1, axis_2)
  all_points = Concat <axis = 0> (n, axis_1, queries, levels, points, axis_2)
  flat_points = Concat <axis = 0> (n, axis_1, queries, numbers)
  centre_1 = Reshape (centre, one_point)
  centre_p = Expand (centre_1, all_points)
  centres = Reshape (centre_p, flat_points)
  offset_unit_1 = Reshape (offset_unit, one_point)
  offset_unit_p = Expand (offset_unit_1, all_points)
  offset_units = Reshape (offset_unit_p, flat_points)
  level_points_2 = Concat <axis = 0> (levels, points, axis_2)
  low_1 = Unsqueeze (low, axis_1)
  low_p = Expand (low_1, level_points_2)
  lows = Reshape (low_p, rest)
  high_1 = Unsqueeze (high, axis_1)
  high_p = Expand (high_1, level_points_2)
  highs = Reshape (high_p, rest)

  offsets_shape = Concat <axis = 0> (n, queries, heads, numbers)
  offsets_f = CastLike (sampling_offsets, reference_points)
  offsets_flat = Reshape (offsets_f, offsets_shape)
  offsets = Transpose <perm = [0, 2, 1, 3]> (offsets_flat)
  offsets_scaled = Mul (offsets, offset_units)
  free = Add (offsets_scaled, centres)
  from_low = Max (free, lows)
  bounded = Min (from_low, highs)
  grid_shape = Concat <axis = 0> (planes, queries, level_points, axis_2)
  grid = Reshape (bounded, grid_shape)
  plane_f = CastLike (plane, reference_points)
  samples = GridSample <mode = "linear", padding_mode = "zeros", align_corners = 0> (plane_f, grid)

  logits = CastLike (attention_logits, reference_points)
  attention = Softmax <axis = -1> (logits)
  attention_by_head = Transpose <perm = [0, 2, 1, 3]> (attention)
  weights_shape = Concat <axis = 0> (planes, axis_1, queries, level_points)
  weights = Reshape (attention_by_head, weights_shape)
  weighted = Mul (samples, weights)
  sums = ReduceSum <keepdims = 0> (weighted, rest)
  sums_shape = Concat <axis = 0> (n, width, queries)
  by_channel = Reshape (sums, sums_shape)
  by_query = Transpose <perm = [0, 2, 1]> (by_channel)
  output = CastLike (by_query, value)
}}
"""


def function(opset: int = OPSET) -> onnx.FunctionProto:
    """The op's model-local function, of ONNX's own operators."""
    header = f'<domain: "{DOMAIN}", opset_import: ["" : {opset}]>'
    body: onnx.FunctionProto = parser.parse_function(header + _BODY.format(name=NAME))
    return body


def register_schema() -> None:
    """Make the op known to onnx in this process: the exporter accepts a translation only into a known op."""
    if defs.has(NAME, DOMAIN):
        return
    inputs = [
        defs.OpSchema.FormalParameter("value", "T", "[N, S, M, D]"),
        defs.OpSchema.FormalParameter("spatial_shapes", "I", "[L, 2] (h, w)"),
        defs.OpSchema.FormalParameter("reference_points", "F", "[N, Lq, L, 2 or 4], valid ratios applied"),
        defs.OpSchema.FormalParameter("sampling_offsets", "T", "[N, Lq, M, L, P, 2]"),
        defs.OpSchema.FormalParameter("attention_logits", "T", "[N, Lq, M, L*P], before the softmax"),
    ]
    schema = defs.OpSchema(
        NAME,
        DOMAIN,
        VERSION,
        doc="Multi-scale deformable attention: softmax, bilinear samples of every level, weighted sum.",
        inputs=inputs,
        outputs=[defs.OpSchema.FormalParameter("output", "T", "[N, Lq, M*D]")],
        type_constraints=[
            ("T", ["tensor(float)", "tensor(float16)"], "values and the linear layers' outputs"),
            ("I", ["tensor(int64)"], "sides in pixels"),
            ("F", ["tensor(float)"], "locations are float32 in every precision"),
        ],
    )
    defs.register_schema(schema)


_OPSET = values.Opset(DOMAIN, VERSION)


def _translate(
    value: ir.Value,
    spatial_shapes: ir.Value,
    reference_points: ir.Value,
    sampling_offsets: ir.Value,
    attention_logits: ir.Value,
) -> ir.Value:
    """One node of the op for one call in PyTorch."""
    node: ir.Value = _OPSET.MSDeformAttn(value, spatial_shapes, reference_points, sampling_offsets, attention_logits)
    return node


def translations() -> dict[Callable[..., object], Callable[..., object]]:
    """For torch.onnx.export's custom_translation_table, once `register_schema` has run."""
    return {torch.ops.msda.ms_deform_attn.default: _translate}
