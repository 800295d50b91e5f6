"""The loop: a resumed run equals an unbroken one, the best network is kept, the log tells all."""

from __future__ import annotations

import csv
import math
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch

from models import DeformableDetrConfig, load_checkpoint
from models.deformable_detr import DeformableDetr
from tests.training.tiny import ALL_ON, FAST, TINY, TWO_STAGE, tiny_model
from training import trainer as trainer_module
from training.augment import FixedAugment
from training.average_precision import AveragePrecision
from training.coco import read_split
from training.dataset import Batch, CocoDataset, collate
from training.recipe import Recipe
from training.trainer import Processes, Trainer

CPU = Processes(torch.device("cpu"))
EVERYTHING = replace(FAST, ema_decay=0.9, quality_targets=True, denoising_groups=2, schedule="cosine", drop_at=0.5)
AUGMENT = FixedAugment(height=48, width=64)


def make_trainer(
    data: Path,
    output: Path,
    recipe: Recipe = FAST,
    config: DeformableDetrConfig = TINY,
    processes: Processes = CPU,
    workers: int = 0,
) -> Trainer:
    output.mkdir(exist_ok=True)
    train, val = read_split(data, "train"), read_split(data, "val")
    dataset = CocoDataset(train, AUGMENT, recipe.seed, cache=True)
    return Trainer(tiny_model(config), dataset, val, recipe, output, processes, workers)


def log_of(output: Path) -> list[dict[str, str]]:
    with (output / "log.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def timeless(row: dict[str, str]) -> dict[str, str]:
    return {key: value for key, value in row.items() if key != "seconds"}


def stop_after(trainer: Trainer, epochs: int) -> None:
    """Run as if the process were killed after so many epochs."""

    class Killed(Exception):
        pass

    save = trainer.save_state

    def save_and_die() -> None:
        save()
        if trainer.epoch == epochs:
            raise Killed

    trainer.save_state = save_and_die  # type: ignore[method-assign]
    with pytest.raises(Killed):
        trainer.run()


def equal_weights(a: Path, b: Path) -> bool:
    ours, theirs = load_checkpoint(a).state_dict(), load_checkpoint(b).state_dict()
    assert ours.keys() == theirs.keys()
    return all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_resumed_run_equals_an_unbroken_one_to_the_bit(data: Path, tmp_path: Path) -> None:
    """With all that keeps a state or draws numbers: EMA, batch norm, dropout, denoising, a schedule, mosaics."""
    recipe = replace(EVERYTHING, epochs=3)
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    make_trainer(data, straight, recipe, ALL_ON).run()

    stop_after(make_trainer(data, broken, recipe, ALL_ON), 1)
    torch.manual_seed(999)  # another process, another state of chance
    again = make_trainer(data, broken, recipe, ALL_ON)
    again.resume()
    assert again.epoch == 1
    again.run()

    assert [timeless(row) for row in log_of(broken)] == [timeless(row) for row in log_of(straight)]
    assert [row["epoch"] for row in log_of(broken)] == ["1", "2", "3"]
    for name in ("last.safetensors", "best.safetensors"):
        assert equal_weights(broken / name, straight / name)
    states = [torch.load(folder / "last.pt", weights_only=True) for folder in (straight, broken)]
    for part in ("learner", "average"):
        assert all(torch.equal(states[0][part][key], states[1][part][key]) for key in states[0][part])
    moments = [state["optimizer"]["state"] for state in states]
    assert all(torch.equal(moments[0][i]["exp_avg_sq"], moments[1][i]["exp_avg_sq"]) for i in moments[0])


def test_an_epoch_whose_end_was_interrupted_is_not_in_the_log_twice(data: Path, tmp_path: Path) -> None:
    stop_after(make_trainer(data, tmp_path), 1)
    log = tmp_path / "log.csv"
    first = log.read_bytes()
    log.write_bytes(first + first.splitlines(keepends=True)[1].replace(b"1,", b"2,", 1))  # logged, its state not saved
    again = make_trainer(data, tmp_path)
    again.resume()
    assert log.read_bytes() == first
    again.run()
    assert [row["epoch"] for row in log_of(tmp_path)] == ["1", "2"]


def test_resuming_with_another_recipe_or_network_names_the_change(data: Path, tmp_path: Path) -> None:
    stop_after(make_trainer(data, tmp_path), 1)
    with pytest.raises(ValueError, match=r"last\.pt was made with another recipe: lr 0\.001 -> 0\.5$"):
        make_trainer(data, tmp_path, replace(FAST, lr=0.5)).resume()
    with pytest.raises(ValueError, match=r"another recipe: epochs 2 -> 7, seed 0 -> 3"):
        make_trainer(data, tmp_path, replace(FAST, epochs=7, seed=3)).resume()
    with pytest.raises(ValueError, match=r"another config: dropout 0\.0 -> 0\.1"):
        make_trainer(data, tmp_path, config=replace(TINY, dropout=0.1)).resume()


def test_a_run_leaves_checkpoints_a_state_and_a_log(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = make_trainer(data, tmp_path, replace(FAST, epochs=3, evaluate_every=2), TWO_STAGE).run()

    assert result is not None
    assert {path.name for path in tmp_path.iterdir()} == {"last.pt", "last.safetensors", "best.safetensors", "log.csv"}
    rows = log_of(tmp_path)
    kinds = [f"{kind}{end}" for end in ("", "_0", "_enc") for kind in ("loss_ce", "loss_bbox", "loss_giou")]
    assert list(rows[0]) == ["epoch", "seconds", "lr", "AP", "AP50", "AP75", "loss", *kinds]
    assert [row["AP"] == "" for row in rows] == [True, False, False]  # every second epoch, and the last
    assert float(rows[2]["AP"]) == result.ap
    assert all(math.isfinite(float(row[name])) for row in rows for name in ["loss", *kinds])
    weights = {"loss_ce": 2, "loss_bbox": 5, "loss_giou": 2}
    total = sum(weights["_".join(name.split("_")[:2])] * float(rows[0][name]) for name in kinds)
    assert float(rows[0]["loss"]) == pytest.approx(total, rel=1e-5)
    shown = capsys.readouterr().err
    assert "epoch 3/3" in shown
    assert "6/6" in shown  # steps of the whole run
    assert "<" in shown  # tqdm's [elapsed<left
    assert load_checkpoint(tmp_path / "best.safetensors").config == TWO_STAGE


def test_the_best_by_ap_is_kept(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scores = iter([0.2, 0.5, 0.3])
    seen = []

    def scripted(model: DeformableDetr, *_: Any) -> AveragePrecision:
        seen.append({name: value.clone() for name, value in model.state_dict().items()})
        return AveragePrecision(next(scores), 0.9, 0.1, -1, -1, -1, {})

    monkeypatch.setattr(trainer_module, "evaluate", scripted)
    trainer = make_trainer(data, tmp_path, replace(FAST, epochs=3))
    trainer.run()
    assert trainer.best_ap == 0.5
    best, last = (load_checkpoint(tmp_path / f"{name}.safetensors").state_dict() for name in ("best", "last"))
    assert all(torch.equal(best[name], seen[1][name]) for name in best)
    assert all(torch.equal(last[name], seen[2][name]) for name in last)
    assert not all(torch.equal(best[name], last[name]) for name in best)


def test_the_average_is_what_is_evaluated_and_kept(data: Path, tmp_path: Path) -> None:
    trainer = make_trainer(data, tmp_path, replace(EVERYTHING, epochs=1), TWO_STAGE)
    trainer.run()
    kept = load_checkpoint(tmp_path / "last.safetensors").state_dict()
    learned = trainer.learner.detector.state_dict()
    assert trainer.average is not None
    assert all(torch.equal(kept[name], value) for name, value in trainer.average.module.state_dict().items())
    assert any(not torch.equal(kept[name], learned[name]) for name in kept)


def test_the_average_forgets_the_start_sooner_than_its_decay_says(data: Path, tmp_path: Path) -> None:
    trainer = make_trainer(data, tmp_path, replace(EVERYTHING, epochs=6, ema_decay=0.9999), TWO_STAGE)
    start = {name: value.clone() for name, value in trainer.detector.state_dict().items()}
    trainer.run()
    learned, average = trainer.learner.detector.state_dict(), trainer.detector.state_dict()
    name = "class_embed.0.weight"
    moved = (average[name] - start[name]).norm() / (learned[name] - start[name]).norm()
    assert 0.1 < moved < 1.0  # 1 - 0.9999 ** steps would be 0.002 at most
    assert all(torch.equal(learned[name], value) for name, value in average.items() if "num_batches" in name)


def one_batch(data: Path) -> Batch:
    split = read_split(data, "train")
    dataset = CocoDataset(split, AUGMENT)
    return collate([dataset[0, 0], dataset[0, 1]], TINY)


def test_steps_lower_the_loss_of_a_batch(data: Path, tmp_path: Path) -> None:
    trainer, batch = make_trainer(data, tmp_path), one_batch(data)
    losses = [float(trainer._step(batch)["loss"]) for _ in range(25)]
    assert max(losses[-3:]) < 0.9 * losses[0]


def test_gradients_are_clipped_to_the_norm(data: Path, tmp_path: Path) -> None:
    trainer = make_trainer(data, tmp_path, replace(FAST, clip_norm=0.05))
    trainer._step(one_batch(data))
    gradients = [p.grad for p in trainer.learner.parameters() if p.grad is not None]
    assert float(torch.stack([g.norm() for g in gradients]).norm()) == pytest.approx(0.05, rel=1e-3)


def test_a_frozen_stem_stays_and_the_rest_learns(data: Path, tmp_path: Path) -> None:
    trainer = make_trainer(data, tmp_path, replace(FAST, freeze_stem=True))
    before = {name: value.clone() for name, value in trainer.learner.detector.state_dict().items()}
    for _ in range(2):
        trainer._step(one_batch(data))
    changed = {n for n, value in trainer.learner.detector.state_dict().items() if not torch.equal(value, before[n])}
    assert not any(name.startswith(("backbone.conv1", "backbone.bn1", "backbone.layer1")) for name in changed)
    assert any(name.startswith("backbone.layer2") for name in changed)


def test_a_loss_that_is_no_number_stops_the_run(data: Path, tmp_path: Path) -> None:
    trainer = make_trainer(data, tmp_path)
    with torch.no_grad():
        trainer.learner.detector.class_embed[0].bias.fill_(math.nan)  # type: ignore[operator]
    with pytest.raises(FloatingPointError, match="learning rate"):
        trainer.run()


def test_no_gradient_flows_from_a_layers_box_to_the_layer_before() -> None:
    """Each layer's box is relative to the one before, and the gradient is cut there, as in the paper."""
    model = tiny_model(TWO_STAGE).train()
    for head in model.bbox_embed:
        torch.nn.init.normal_(head.layers[2].weight, std=0.1)  # type: ignore[union-attr, index]
    outputs: dict[str, Any] = model(torch.randn(1, 3, 64, 96))
    heads = [list(head.parameters()) for head in model.bbox_embed]
    assert len(heads) == 3  # two layers' and the proposals'

    def reached(boxes: torch.Tensor) -> list[bool]:
        flat = [p for head in heads for p in head]
        found = torch.autograd.grad(boxes.sum(), flat, retain_graph=True, allow_unused=True)
        return [any(g is not None for g in found[i * 6 : (i + 1) * 6]) for i in range(3)]

    assert reached(outputs["pred_boxes"]) == [False, True, False]
    assert reached(outputs["aux_outputs"][0]["pred_boxes"]) == [True, False, False]
    assert reached(outputs["enc_outputs"]["pred_boxes"]) == [False, False, True]


def test_more_processes_than_pictures_are_refused(data: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="4 pictures cannot be shared by 5 processes"):
        make_trainer(data, tmp_path, processes=Processes(torch.device("cpu"), 0, 5))


def test_half_precision_steps_stay_near_full_precision_on_the_cpu(data: Path, tmp_path: Path) -> None:
    batch = one_batch(data)
    full = make_trainer(data, tmp_path, EVERYTHING, TWO_STAGE)
    half = make_trainer(data, tmp_path, replace(EVERYTHING, precision="bf16"), TWO_STAGE)
    wanted, got = ([float(t._step(batch)["loss"]) for _ in range(2)] for t in (full, half))
    assert got == pytest.approx(wanted, rel=0.05)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_run_in_half_precision_on_a_gpu(data: Path, tmp_path: Path, precision: Literal["bf16", "fp16"]) -> None:
    recipe = replace(EVERYTHING, precision=precision)
    trainer = make_trainer(data, tmp_path, recipe, TWO_STAGE, Processes(torch.device("cuda", 0)))
    assert trainer.scaler.is_enabled() == (precision == "fp16")
    trainer.run()
    assert all(math.isfinite(float(row["loss"])) for row in log_of(tmp_path))
    assert all(p.dtype == torch.float32 for p in trainer.learner.parameters())
