"""One of two processes under torchrun: trains, then writes down what it holds and what it sees of an evaluation.

torchrun --nproc-per-node 2 -m tests.training.one_of_two DATA OUTPUT
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist

from tests.training.tiny import ALL_ON, FAST, tiny_model
from training import evaluate as evaluation
from training.augment import FixedAugment
from training.average_precision import AveragePrecision, Detection, average_precision
from training.coco import read_split
from training.dataset import CocoDataset
from training.train import join_processes
from training.trainer import Trainer

RECIPE = replace(FAST, ema_decay=0.9, denoising_groups=2, quality_targets=True)


def main(data: Path, output: Path) -> None:
    torch.set_num_threads(1)
    processes = join_processes("cpu")
    train, val = read_split(data, "train"), read_split(data, "val")
    dataset = CocoDataset(train, FixedAugment(height=64, width=96), RECIPE.seed)
    model = tiny_model(ALL_ON, seed=processes.rank)  # other weights in each process, until they agree
    trainer = Trainer(model, dataset, val, RECIPE, output, processes)
    trainer.run()

    seen: list[Detection] = []

    def watched(annotations: Path, detections: list[Detection]) -> AveragePrecision:
        seen.extend(detections)
        return average_precision(annotations, detections)

    evaluation.average_precision = watched  # type: ignore[attr-defined]
    fixed = tiny_model(ALL_ON, seed=7).eval()
    result = evaluation.evaluate(fixed, val, processes.device)
    assert trainer.average is not None
    held = {
        "learner": trainer.learner.state_dict(),
        "average": trainer.average.state_dict(),
        "evaluated": trainer.detector.state_dict(),
        "optimizer": trainer.optimizer.state_dict(),
        "detections": seen,
        "ap": result.ap,
    }
    torch.save(held, output / f"rank{processes.rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
