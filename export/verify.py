"""The ONNX model against PyTorch, on the same pictures: published only when they agree.

Each query of the network is compared, not only the detections: two queries whose scores differ in the last bit may
change places in the top K, so queries are paired by what they say, and the top K is held against the model's own
queries. Nothing that exceeds the limits passes, with one exception: a two-stage model whose last accepted and first
rejected proposal are tied to within `CUT_MARGIN` has no single right answer, and its picture is drawn anew.

The op is compared in each form in which a server runs it on a CPU: the function that the file carries, and the native
kernel, where it is built.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
from numpy.typing import NDArray
from torch import Tensor

import plugins
from bundle import Canvas, ParityRecord
from export.trace import OUTPUTS, RAW_OUTPUTS
from models import DeformableDetr, DeformableDetrConfig

MAX_BOX_ERROR = 1e-3  # of the image's side
MAX_SCORE_ERROR = 1e-3
OWN_TOLERANCE = 1e-5  # the top K against the same model's raw outputs: a sigmoid and two additions
CUT_MARGIN = 1e-4  # logits; some ten times the difference between the two at the encoder's end
BATCH_SIZES = (1, 3)
MAX_REDRAWS = 3
FILLS = ((1.0, 1.0), (0.74, 0.97), (0.88, 0.52))  # of the canvas's height and width, a slot each
FILL_ALONE = (0.93, 0.81)
FUNCTION, KERNEL = "onnxruntime", "onnxruntime+msda"
"""What a record's `engine` says of ONNX Runtime: with the file's own function, or with the native kernel."""

Array = NDArray[np.float32]


class ParityError(Exception):
    """The ONNX model and PyTorch disagree; the message names the figure, the canvas and the slot."""


@dataclass(frozen=True)
class Pictures:
    """A batch: images uint8 [N, H, W, 3], zero outside; sizes int64 [N, 2] (h, w) of the filled parts."""

    images: NDArray[np.uint8]
    sizes: NDArray[np.int64]


@dataclass(frozen=True)
class Answers:
    """Raw outputs of one batch, as probabilities and corners: scores [N, Q, classes], boxes [N, Q, 4] in 0..1."""

    scores: Array
    boxes: Array


@dataclass(frozen=True)
class Case:
    """A batch of pictures and what PyTorch says to it; a margin and a place, for messages, for each slot."""

    canvas: Canvas
    pictures: Pictures
    want: Answers
    margins: list[float]
    where: list[str]


class _Tied(Exception):
    """A slot that disagrees and whose proposals are tied."""


def verify(
    model: DeformableDetr,
    proto: onnx.ModelProto,
    canvases: Sequence[Canvas],
    report: Callable[[ParityRecord], None] = lambda _: None,
    seed: int = 0,
) -> tuple[ParityRecord, ...]:
    """Compare on each canvas, alone and in a batch of three unevenly filled images; `report` gets each figure at once.

    Raises ParityError at the first figure beyond MAX_BOX_ERROR (of the image's side) or MAX_SCORE_ERROR.
    """
    sessions = {FUNCTION: probing_session(proto)}
    if (library := plugins.onnxruntime_library()) is not None:
        sessions[KERNEL] = probing_session(proto, library)
    records = []
    for canvas in canvases:
        for batch_size in BATCH_SIZES:
            for record in _compare(model, sessions, canvas, batch_size, seed):
                report(record)
                records.append(record)
    return tuple(records)


def probing_session(proto: onnx.ModelProto, library: Path | None = None) -> onnxruntime.InferenceSession:
    """The model in ONNX Runtime on the CPU, its raw outputs beside its own; `proto` itself is not changed."""
    probe = onnx.ModelProto()
    probe.CopyFrom(proto)
    for name in RAW_OUTPUTS:
        probe.graph.output.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None))
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    options.enable_mem_pattern = False  # a run of each shape: a plan of its memory would not be used again
    if library is not None:
        options.register_custom_ops_library(str(library))
    return onnxruntime.InferenceSession(probe.SerializeToString(), options, providers=["CPUExecutionProvider"])


def _compare(
    model: DeformableDetr,
    sessions: Mapping[str, onnxruntime.InferenceSession],
    canvas: Canvas,
    batch_size: int,
    seed: int,
) -> list[ParityRecord]:
    """Each session's record of one batch, which PyTorch answers once; drawn anew for all of them where one is tied."""
    fills = FILLS[:batch_size] if batch_size > 1 else (FILL_ALONE,)
    where = [f"canvas {canvas}, batch of {batch_size}, slot {slot}" for slot in range(batch_size)]
    redraws_left = MAX_REDRAWS
    while True:
        pictures = draw_pictures(canvas, fills, seed + 1000 * redraws_left)
        case = Case(canvas, pictures, *pytorch_answers(model, pictures), where)
        try:
            return [_record(case, name, session, model.config, redraws_left) for name, session in sessions.items()]
        except _Tied:
            redraws_left -= 1


def _record(
    case: Case, engine: str, session: onnxruntime.InferenceSession, config: DeformableDetrConfig, redraws_left: int
) -> ParityRecord:
    """Raises ParityError, or _Tied where a slot disagrees that may be drawn anew."""
    pictures = case.pictures
    boxes, scores, labels, *raw = session.run(
        [*OUTPUTS, *RAW_OUTPUTS], {"images": pictures.images, "sizes": pictures.sizes}
    )
    got = _answers(torch.from_numpy(raw[0]), torch.from_numpy(raw[1]))
    errors = [query_errors(case.want, got, slot) for slot in range(len(case.where))]
    tied = False
    for slot, (place, margin, error) in enumerate(zip(case.where, case.margins, errors, strict=True)):
        place = f"{place}, {engine}"
        check_top(boxes[slot], scores[slot], labels[slot], got, slot, config, place)
        agree = error[0] <= MAX_BOX_ERROR and error[1] <= MAX_SCORE_ERROR
        if not agree and margin < CUT_MARGIN and redraws_left:
            tied = True
            continue
        _check(error[0], MAX_BOX_ERROR, "box error", place)
        _check(error[1], MAX_SCORE_ERROR, "score error", place)
    if tied:
        raise _Tied
    return ParityRecord(
        canvas=case.canvas,
        batch_size=len(case.where),
        max_box_error=max(box for box, _ in errors),
        max_score_error=max(score for _, score in errors),
        engine=engine,
        detections_compared=int(scores.size),
    )


def draw_pictures(canvas: Canvas, fills: Sequence[tuple[float, float]], seed: int) -> Pictures:
    """Random smooth fields with some noise on them: images with edges, areas and detail, from a seed."""
    random = np.random.default_rng(seed)
    images = np.zeros((len(fills), canvas.height, canvas.width, 3), dtype=np.uint8)
    sizes = np.zeros((len(fills), 2), dtype=np.int64)
    for slot, (share_h, share_w) in enumerate(fills):
        height, width = max(1, round(canvas.height * share_h)), max(1, round(canvas.width * share_w))
        picture = np.zeros((height, width, 3))
        for cells, strength in ((4, 1.0), (11, 0.6), (29, 0.4)):
            picture += strength * _field(random, height, width, cells)
        picture = np.tanh(1.5 * picture) * 110 + 128 + random.normal(0, 6, picture.shape)
        images[slot, :height, :width] = np.clip(picture, 0, 255).astype(np.uint8)
        sizes[slot] = height, width
    return Pictures(images, sizes)


def _field(random: np.random.Generator, height: int, width: int, cells: int) -> NDArray[np.float64]:
    """Gaussian values on a grid of `cells` a side, interpolated linearly: [height, width, 3]."""
    grid = random.normal(size=(cells + 1, cells + 1, 3))
    y, x = np.linspace(0, cells, height), np.linspace(0, cells, width)
    row, column = np.minimum(y.astype(int), cells - 1), np.minimum(x.astype(int), cells - 1)
    v, u = (y - row)[:, None, None], (x - column)[None, :, None]
    upper = grid[row][:, column] * (1 - u) + grid[row][:, column + 1] * u
    lower = grid[row + 1][:, column] * (1 - u) + grid[row + 1][:, column + 1] * u
    field: NDArray[np.float64] = upper * (1 - v) + lower * v
    return field


def pytorch_answers(model: DeformableDetr, pictures: Pictures) -> tuple[Answers, list[float]]:
    """What PyTorch says, with the official pipeline's own arithmetic before it; and each slot's proposal margin.

    The margin is how far (in logits) the last accepted proposal lies above the first rejected one; infinite for models
    whose queries are learned.
    """
    config = model.config
    count, height, width, _ = pictures.images.shape
    values = torch.zeros((count, 3, height, width))
    mask = torch.zeros((count, height, width), dtype=torch.bool)
    mean, std = np.asarray(config.pixel_mean), np.asarray(config.pixel_std)
    for slot, (h, w) in enumerate(pictures.sizes.tolist()):
        normalised = (pictures.images[slot, :h, :w] / 255 - mean) / std
        values[slot, :, :h, :w] = torch.from_numpy(normalised.astype(np.float32)).permute(2, 0, 1)
        mask[slot, :h, :w] = True

    ranked: list[Tensor] = []  # the proposal scores, when there are any: the first the last class head is asked for
    hook = model.class_embed[-1].register_forward_hook(lambda _module, _inputs, output: ranked.append(output))
    try:
        with torch.inference_mode():
            outputs = model(values, mask)
    finally:
        hook.remove()
    logits, boxes = outputs["pred_logits"], outputs["pred_boxes"]
    if not isinstance(logits, Tensor) or not isinstance(boxes, Tensor):
        raise TypeError("the network's pred_logits and pred_boxes should be tensors")
    margins = [float("inf")] * count
    if config.two_stage and ranked[0].shape[1] > config.num_queries:
        best = ranked[0][..., 0].topk(config.num_queries + 1, dim=1).values
        margins = (best[:, -2] - best[:, -1]).tolist()
    return _answers(logits, boxes), margins


def _answers(logits: Tensor, boxes: Tensor) -> Answers:
    centre, half = boxes[..., :2], boxes[..., 2:] / 2
    corners = torch.cat([centre - half, centre + half], dim=-1)
    return Answers(scores=logits.sigmoid().numpy(), boxes=corners.numpy())


def query_errors(want: Answers, got: Answers, slot: int) -> tuple[float, float]:
    """Largest box and score error of a slot over all its queries, each query of PyTorch paired with one of ONNX's.

    Queries keep their place unless that exceeds the limits; the rest are paired nearest first, one to one, and a pair
    within the limits has only been moved by a swap of near-equal proposals. Where it is not, the errors in place stand.
    """
    box = np.abs(want.boxes[slot] - got.boxes[slot]).max(-1)
    score = np.abs(want.scores[slot] - got.scores[slot]).max(-1)
    moved = np.flatnonzero(~((box <= MAX_BOX_ERROR) & (score <= MAX_SCORE_ERROR)))
    for i, j in _nearest_pairs(want, got, slot, moved):
        pair_box = np.abs(want.boxes[slot, i] - got.boxes[slot, j]).max()
        pair_score = np.abs(want.scores[slot, i] - got.scores[slot, j]).max()
        if pair_box <= MAX_BOX_ERROR and pair_score <= MAX_SCORE_ERROR:
            box[i], score[i] = pair_box, pair_score
    return float(box.max()), float(score.max())


def _nearest_pairs(want: Answers, got: Answers, slot: int, among: NDArray[np.int64]) -> Iterator[tuple[int, int]]:
    """One-to-one pairs among the queries of these indices, the nearest taken first."""
    if not among.size:
        return
    said = [np.concatenate([side.boxes[slot, among], side.scores[slot, among]], axis=-1) for side in (want, got)]
    distance = np.abs(said[0][:, None] - said[1][None]).max(-1)
    distance[np.isnan(distance)] = np.inf
    for _ in among:
        i, j = np.unravel_index(np.argmin(distance), distance.shape)
        yield int(among[i]), int(among[j])
        distance[i, :] = distance[:, j] = np.nan
        distance = np.where(np.isnan(distance), np.inf, distance)


def check_top(
    boxes: Array,
    scores: Array,
    labels: NDArray[np.int64],
    raw: Answers,
    slot: int,
    config: DeformableDetrConfig,
    where: str,
) -> None:
    """Hold the K detections of a slot against the raw outputs of the same run: the K best, each a query's own."""
    flat = raw.scores[slot].ravel()
    best = np.sort(flat)[::-1][: scores.size]
    _check(float(np.abs(best - scores).max()), OWN_TOLERANCE, "order of the top scores: error", where)
    ids = np.asarray(config.category_ids or range(config.num_classes))
    used: set[tuple[int, int]] = set()
    for k in range(scores.size):
        classes = np.flatnonzero(ids == labels[k])
        if classes.size != 1:
            raise ParityError(f"detection {k} has category {labels[k]}, which is none of the model's ({where})")
        c = int(classes[0])
        apart = np.maximum(np.abs(raw.scores[slot, :, c] - scores[k]), np.abs(raw.boxes[slot] - boxes[k]).max(-1))
        free = np.array([(query, c) not in used for query in range(len(apart))])
        apart = np.where(free, apart, np.inf)
        query = int(apart.argmin())
        used.add((query, c))
        _check(float(apart[query]), OWN_TOLERANCE, f"detection {k} is no query's own: error", where)


def _check(found: float, limit: float, what: str, where: str) -> None:
    if not found <= limit:  # NaN fails, too
        raise ParityError(f"{what} {found:.3g} exceeds {limit:g} ({where})")
