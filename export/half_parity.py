"""A graph in half precision against float32 PyTorch, in ONNX Runtime on the CPU.

Ten bits move every answer a little, and in a two-stage network they may let in another proposal where two are about
equally good. Queries are therefore paired by what they say. A picture passes when no more of them are without a partner
than there are proposals within `CUT_MARGIN` of the last accepted one, and a few in a hundred beside.
"""

from collections.abc import Callable, Sequence

import numpy as np
import onnx
import torch
from torch import Tensor

import plugins
from bundle import Canvas, ParityRecord
from export.trace import OUTPUTS, RAW_OUTPUTS
from export.verify import (
    BATCH_SIZES,
    FILL_ALONE,
    FILLS,
    FUNCTION,
    KERNEL,
    Answers,
    ParityError,
    Pictures,
    check_top,
    draw_pictures,
    probing_session,
    pytorch_answers,
)
from models import DeformableDetr

MAX_BOX_ERROR = 1e-2  # of the image's side; measured 1.4e-3 on a small network
MAX_SCORE_ERROR = 2e-2
CUT_MARGIN = 0.05  # logits: some ten times what half precision moves them by
STRAYS = 0.03  # of the queries


def verify_half(
    model: DeformableDetr,
    proto: onnx.ModelProto,
    canvases: Sequence[Canvas],
    report: Callable[[ParityRecord, int], None] = lambda _record, _unpaired: None,
    seed: int = 0,
) -> tuple[ParityRecord, ...]:
    """Compare on each canvas, alone and in a batch of three; `report` gets each figure and the queries unpaired.

    `model` is the float32 network. A record's errors are those of the queries paired. Raises ParityError.
    """
    library = plugins.onnxruntime_library()
    session = probing_session(proto, library)
    engine = FUNCTION if library is None else KERNEL
    records = []
    for canvas in canvases:
        for batch_size in BATCH_SIZES:
            pictures = draw_pictures(canvas, FILLS[:batch_size] if batch_size > 1 else (FILL_ALONE,), seed)
            want, near_cut = _answers_and_ties(model, pictures)
            feeds = {"images": pictures.images, "sizes": pictures.sizes}
            boxes, scores, labels, logits, raw_boxes = session.run([*OUTPUTS, *RAW_OUTPUTS], feeds)
            got = _as_answers(logits, raw_boxes)
            errors, unpaired = [(0.0, 0.0)], 0
            for slot in range(batch_size):
                where = f"canvas {canvas}, batch of {batch_size}, slot {slot}, {engine}"
                check_top(boxes[slot], scores[slot], labels[slot], got, slot, model.config, where)
                pairs = paired(want, got, slot)
                alone = model.config.num_queries - len(pairs)
                allowed = near_cut[slot] + max(1, round(STRAYS * model.config.num_queries))
                if alone > allowed:
                    raise ParityError(
                        f"{alone} of {model.config.num_queries} queries are beyond {MAX_BOX_ERROR:g} of the side or "
                        f"{MAX_SCORE_ERROR:g} of the score; {allowed} may be ({where})"
                    )
                unpaired += alone
                errors += pairs
            record = ParityRecord(
                canvas=canvas,
                batch_size=batch_size,
                max_box_error=max(box for box, _ in errors),
                max_score_error=max(score for _, score in errors),
                engine=engine,
                detections_compared=int(scores.size),
            )
            report(record, unpaired)
            records.append(record)
    return tuple(records)


def paired(want: Answers, got: Answers, slot: int) -> list[tuple[float, float]]:
    """Box and score error of each pair of queries within the limits, one to one, the nearest first."""
    box = np.abs(want.boxes[slot][:, None] - got.boxes[slot][None]).max(-1)
    score = np.abs(want.scores[slot][:, None] - got.scores[slot][None]).max(-1)
    apart = np.maximum(box / MAX_BOX_ERROR, score / MAX_SCORE_ERROR)
    rows, columns = np.nonzero(apart <= 1)  # NaN is beyond
    pairs, used_rows, used_columns = [], set(), set()
    for index in np.argsort(apart[rows, columns], kind="stable"):
        i, j = int(rows[index]), int(columns[index])
        if i not in used_rows and j not in used_columns:
            used_rows.add(i)
            used_columns.add(j)
            pairs.append((float(box[i, j]), float(score[i, j])))
    return pairs


def _answers_and_ties(model: DeformableDetr, pictures: Pictures) -> tuple[Answers, list[int]]:
    """PyTorch's answers; for each slot how many accepted proposals lie within CUT_MARGIN of the last one."""
    ranked: list[Tensor] = []
    hook = model.class_embed[-1].register_forward_hook(lambda _module, _inputs, output: ranked.append(output))
    try:
        want, margins = pytorch_answers(model, pictures)
    finally:
        hook.remove()
    config = model.config
    if not config.two_stage or ranked[0].shape[1] <= config.num_queries:
        return want, [0] * len(margins)
    best = ranked[0][..., 0].topk(config.num_queries, dim=1).values
    return want, (best < best[:, -1:] + CUT_MARGIN).sum(dim=1).tolist()


def _as_answers(logits: np.ndarray, boxes: np.ndarray) -> Answers:
    centre, half = boxes[..., :2], boxes[..., 2:] / 2
    scores = torch.from_numpy(logits).sigmoid().numpy()
    return Answers(scores=scores, boxes=np.concatenate([centre - half, centre + half], axis=-1))
