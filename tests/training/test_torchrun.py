"""Two processes through torchrun, on the CPU: they hold one network, and it is the one a single process would train."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bundle import ResizeRule
from models import load_checkpoint, save_checkpoint
from tests.training.tiny import ALL_ON, TINY, tiny_model, write_data
from training.augment import PaperAugment
from training.coco import read_split
from training.dataset import CocoDataset
from training.evaluate import predict
from training.train import main as train

ROOT = Path(__file__).resolve().parents[2]
SIDE = 64  # shortest and longest: pictures of 64x128 become 32x64, unless they were cropped
SEED = 311  # no picture of the first two epochs is cropped, so that a padded batch has the same pixels in both runs
EPOCHS = 2
RTOL_LOSS = 1e-5
RTOL_MOMENT = 1e-4  # of a tensor's largest; the sums of a gradient run in another order


pytestmark = pytest.mark.timeout(300)  # four processes that import torch, on a machine that may be busy


def torchrun(*words: str) -> subprocess.CompletedProcess[str]:
    """Run a module in two processes of one thread each."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", *words]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done


def rows(output: Path) -> list[dict[str, str]]:
    with (output / "log.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_two_processes_train_what_one_does_with_the_doubled_batch(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Compared are the losses of both epochs, AdamW's moments (the clipped gradients, summed) and the weights."""
    data = write_data(tmp_path / "data", train=4, val=3, width=128)
    start = tmp_path / "start.safetensors"
    save_checkpoint(tiny_model(replace(TINY, hidden_dim=64)), start)
    dataset = CocoDataset(read_split(data, "train"), PaperAugment(ResizeRule(shortest=SIDE, longest=SIDE)), SEED)
    assert {dataset[epoch, i].pixels.shape for epoch in range(EPOCHS) for i in range(4)} == {(32, 64, 3)}
    options = {
        "data": data, "checkpoint": start, "shortest": SIDE, "longest": SIDE, "seed": SEED, "epochs": EPOCHS,
        "device": "cpu", "workers": 0,
    }  # fmt: skip
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    one, two = tmp_path / "one", tmp_path / "two"

    assert train([*words, "--output", str(one), "--batch-size", "4"]) == 0
    printed = capsys.readouterr().out
    done = torchrun("training.train", *words, "--output", str(two), "--batch-size", "2")

    assert done.stdout.count("AP50") == printed.count("AP50") > 0  # the first process speaks for both
    alone, together = rows(one), rows(two)
    assert [row["epoch"] for row in together] == ["1", "2"]
    assert alone[0].keys() == together[0].keys()
    for mine, theirs in zip(alone, together, strict=True):
        for name in mine.keys() - {"seconds"}:
            rtol, atol = (RTOL_LOSS, 0.0) if not name.startswith("AP") else (0.0, 1e-3)
            assert float(theirs[name]) == pytest.approx(float(mine[name]), rel=rtol, abs=atol), name
    states = [torch.load(folder / "last.pt", weights_only=True) for folder in (one, two)]
    moments: list[dict[int, dict[str, Any]]] = [state["optimizer"]["state"] for state in states]
    assert moments[0].keys() == moments[1].keys()
    largest = max(float(moment["exp_avg"].abs().max()) for moment in moments[0].values())
    for index, moment in moments[0].items():
        torch.testing.assert_close(
            moments[1][index]["exp_avg"], moment["exp_avg"], rtol=0, atol=RTOL_MOMENT * largest, msg=str(index)
        )
    before = load_checkpoint(start).state_dict()
    weights = [load_checkpoint(folder / "last.safetensors").state_dict() for folder in (one, two)]
    moved = torch.cat([(weights[0][n] - before[n]).flatten() for n in before if "class_embed" not in n])
    apart = torch.cat([(weights[0][n] - weights[1][n]).flatten() for n in before if "class_embed" not in n])
    # AdamW's first steps go by the gradient's sign, so where it is zero but for rounding the weights differ.
    assert float((apart.abs() > 1e-6).float().mean()) < 0.01
    assert float(apart.norm()) < 0.02 * float(moved.norm())


def test_two_processes_hold_one_network_and_share_an_evaluation(data: Path, tmp_path: Path) -> None:
    """With EMA, denoising, dropout and batch norm, and other weights in each process to begin with."""
    torchrun("tests.training.one_of_two", str(data), str(tmp_path))

    first, second = (torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in range(2))
    statistics = ("running_mean", "running_var", "num_batches_tracked")
    for part in ("learner", "average", "evaluated"):
        assert first[part].keys() == second[part].keys()
        for name, value in first[part].items():
            if part == "evaluated" or not name.endswith(statistics):
                assert torch.equal(value, second[part][name]), f"{part} {name}"
    moments = [held["optimizer"]["state"] for held in (first, second)]
    assert all(torch.equal(moments[0][i]["exp_avg"], moments[1][i]["exp_avg"]) for i in moments[0])
    assert [row["epoch"] for row in rows(tmp_path)] == ["1", "2"]

    # Each process answered for one of two pictures, and both scored all the answers.
    wanted = predict(tiny_model(ALL_ON, seed=7).eval(), list(read_split(data, "val").pictures), torch.device("cpu"))
    assert first["detections"] == second["detections"]
    assert first["ap"] == second["ap"]
    assert len(first["detections"]) == len(wanted)
    for got, expected in zip(first["detections"], wanted, strict=True):
        assert got["image_id"] == expected["image_id"]
        assert got["score"] == pytest.approx(expected["score"], abs=1e-5)
