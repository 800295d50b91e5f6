"""A proof by a word of honour: what an engine that is known to be right says to a proof's pictures."""

from parity.pictures import draw_pictures
from parity.proof import CanvasProof, Expected, Proof, pictures_hash
from server.engine import Engine, run_engine

PICTURES = 4


def proof_by(engine: Engine) -> Proof:
    """Of all its canvases."""
    parts = []
    detections = 0
    for canvas in engine.manifest.canvases:
        pictures = draw_pictures(canvas, tuple(range(PICTURES)))
        expected = []
        for image, (height, width) in zip(pictures.images, pictures.sizes.tolist(), strict=True):
            raw = run_engine(engine, [image[:height, :width]], canvas)
            expected.append(Expected(raw.boxes[0], raw.scores[0], raw.labels[0]))
            detections = raw.scores.shape[1]
        parts.append(CanvasProof(canvas, tuple(range(PICTURES)), pictures_hash(pictures), tuple(expected)))
    return Proof(tuple(parts), detections, ())
