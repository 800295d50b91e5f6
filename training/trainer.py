"""The loop: epochs of steps, an evaluation after each, and a state on disk from which a run goes on exactly."""

import csv
import math
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader
from tqdm import tqdm

from models import CheckpointError, DeformableDetr, save_checkpoint
from models.pickled import read_pickled
from training.average_precision import AveragePrecision
from training.coco import CocoSplit
from training.criterion import Criterion, Denoising, weighted_sum
from training.dataset import Batch, CocoDataset, EpochSampler, collate
from training.denoising import DenoisingQueries
from training.evaluate import evaluate
from training.matcher import Target
from training.recipe import Recipe

OFFSET_PROJECTIONS = ("reference_points", "sampling_offsets")


@dataclass(frozen=True)
class Processes:
    """This process among those of the run; `device` is where it computes."""

    device: torch.device
    rank: int = 0
    world_size: int = 1


class _Learner(nn.Module):
    """The detector and what only training needs, as one module, so that processes agree on every gradient."""

    def __init__(self, detector: DeformableDetr, recipe: Recipe) -> None:
        super().__init__()
        self.detector = detector
        groups = recipe.denoising_groups
        self.denoising = DenoisingQueries(detector.config, groups) if groups else None

    def forward(self, batch: Batch) -> tuple[dict[str, Any], Denoising | None]:
        extra, denoising = (None, None) if self.denoising is None else self.denoising(batch.targets)
        return self.detector(batch.pixel_values, batch.pixel_mask, extra), denoising


class Trainer:
    """Owns the network, the optimiser and the output folder: last.pt, last.safetensors, best.safetensors, log.csv."""

    def __init__(
        self,
        detector: DeformableDetr,
        dataset: CocoDataset,
        validation: CocoSplit,
        recipe: Recipe,
        output: Path,
        processes: Processes,
        workers: int = 0,
    ) -> None:
        if len(dataset) < processes.world_size:
            raise ValueError(f"{len(dataset)} pictures cannot be shared by {processes.world_size} processes")
        self.recipe, self.output, self.processes, self.validation = recipe, output, processes, validation
        torch.manual_seed(recipe.seed)
        if recipe.freeze_stem:
            for frozen in (detector.backbone.conv1, detector.backbone.bn1, detector.backbone.layer1):
                frozen.requires_grad_(False)
        self.learner = _Learner(detector.to(processes.device), recipe).to(processes.device)
        self.stepper: nn.Module = self.learner
        if processes.world_size > 1:
            devices = [processes.device.index] if processes.device.type == "cuda" else None
            self.stepper = DistributedDataParallel(self.learner, device_ids=devices)
        self.average = (
            AveragedModel(detector, multi_avg_fn=partial(_move_average, decay=recipe.ema_decay), use_buffers=True)
            if recipe.ema_decay
            else None
        )
        self.criterion = Criterion(detector.config, quality_targets=recipe.quality_targets)
        self.sampler = EpochSampler(len(dataset), recipe.seed, processes.rank, processes.world_size)
        self.loader = DataLoader(
            dataset,
            batch_size=recipe.batch_size,
            sampler=self.sampler,
            drop_last=len(self.sampler) >= recipe.batch_size,
            num_workers=workers,
            collate_fn=partial(collate, config=detector.config),
            multiprocessing_context="fork" if workers else None,
            persistent_workers=bool(workers),
        )
        self.optimizer = AdamW(parameter_groups(self.learner, recipe), lr=recipe.lr, weight_decay=recipe.weight_decay)
        self.schedule = LambdaLR(self.optimizer, partial(rate_at, recipe=recipe, steps_per_epoch=len(self.loader)))
        self.scaler = torch.amp.GradScaler(processes.device.type, enabled=recipe.precision == "fp16")
        self.epoch = 0
        self.best_ap = -1.0

    @property
    def detector(self) -> DeformableDetr:
        """The network to evaluate and keep: the average where one is kept."""
        model = self.learner.detector if self.average is None else self.average.module
        assert isinstance(model, DeformableDetr)
        return model

    def run(self) -> AveragePrecision | None:
        """Train the epochs that are left; returns the last evaluation."""
        result = None
        first = self.processes.rank == 0
        total = self.recipe.epochs * len(self.loader)
        with tqdm(total=total, initial=self.epoch * len(self.loader), disable=not first, mininterval=2) as progress:
            while self.epoch < self.recipe.epochs:
                progress.set_description(f"epoch {self.epoch + 1}/{self.recipe.epochs}")
                started = time.perf_counter()
                losses = self._train_epoch(progress)
                self.epoch += 1
                last = self.epoch == self.recipe.epochs
                measured = None
                if last or self.epoch % self.recipe.evaluate_every == 0:
                    self._share_statistics()
                    measured = result = evaluate(self.detector, self.validation, self.processes.device)
                if first:
                    self._keep(losses, measured, time.perf_counter() - started)
                    if measured is not None:
                        progress.write(f"epoch {self.epoch}: AP {measured.ap:.3f}  AP50 {measured.ap50:.3f}")
                if self.processes.world_size > 1:
                    dist.barrier()
        return result

    def _train_epoch(self, progress: "tqdm[Any]") -> dict[str, float]:
        """One pass over the data; the mean of each loss over steps and processes."""
        torch.manual_seed(hash((self.recipe.seed, self.epoch, self.processes.rank)))  # dropout and noise, repeatable
        self.sampler.epoch = self.epoch
        self.stepper.train()
        sums: dict[str, float] = {}
        for batch in self._batches():
            losses = self._step(batch)
            values = torch.stack(list(losses.values())).tolist()
            for name, value in zip(losses, values, strict=True):
                sums[name] = sums.get(name, 0.0) + value
            progress.set_postfix(loss=f"{values[0]:.2f}", refresh=False)
            progress.update()
        means = torch.tensor(list(sums.values()), dtype=torch.float64, device=self.processes.device) / len(self.loader)
        if self.processes.world_size > 1:
            dist.all_reduce(means)
            means /= self.processes.world_size
        return dict(zip(sums, means.tolist(), strict=True))

    def _batches(self) -> Iterator[Batch]:
        device = self.processes.device
        for batch in self.loader:
            targets: list[Target] = [{k: v.to(device) for k, v in t.items()} for t in batch.targets]
            yield Batch(batch.pixel_values.to(device), batch.pixel_mask.to(device), targets)

    def _step(self, batch: Batch) -> dict[str, Tensor]:
        """Forward, backward, clip, update; returns the weighted sum as `loss`, then each loss, detached."""
        with self._autocast():
            outputs, denoising = self.stepper(batch)
        losses = self.criterion(outputs, batch.targets, denoising)
        loss = weighted_sum(losses)
        if not math.isfinite(loss.item()):
            raise FloatingPointError(f"the loss is {loss.item()} in epoch {self.epoch + 1}: lower the learning rate")
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimizer)
        nn.utils.clip_grad_norm_(self.stepper.parameters(), self.recipe.clip_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.schedule.step()
        if self.average is not None:
            self.average.update_parameters(self.learner.detector)
        return {"loss": loss.detach()} | {name: value.detach() for name, value in losses.items()}

    def _share_statistics(self) -> None:
        """The first process' batch-norm statistics for all, so that they evaluate one network."""
        if self.processes.world_size > 1:
            for buffer in self.detector.buffers():
                dist.broadcast(buffer, 0)

    def _autocast(self) -> AbstractContextManager[Any]:
        if self.recipe.precision == "fp32":
            return nullcontext()
        dtype = torch.bfloat16 if self.recipe.precision == "bf16" else torch.float16
        return torch.autocast(self.processes.device.type, dtype=dtype)

    def _keep(self, losses: dict[str, float], measured: AveragePrecision | None, seconds: float) -> None:
        """Write the log's row, the best network, and the state to go on from."""
        row: dict[str, Any] = {"epoch": self.epoch, "seconds": round(seconds, 1), "lr": self.schedule.get_last_lr()[0]}
        row |= {"AP": "", "AP50": "", "AP75": ""}
        if measured is not None:
            row |= {"AP": measured.ap, "AP50": measured.ap50, "AP75": measured.ap75}
            if measured.ap > self.best_ap:
                self.best_ap = measured.ap
                save_checkpoint(self.detector, self.output / "best.safetensors")
        save_checkpoint(self.detector, self.output / "last.safetensors")
        log = self.output / "log.csv"
        fresh = not log.exists()
        with log.open("a", newline="") as file:
            writer = csv.DictWriter(file, [*row, *losses])
            if fresh:
                writer.writeheader()
            writer.writerow(row | losses)
        self.save_state()

    def save_state(self) -> None:
        """Write last.pt whole or not at all."""
        state = {
            "epoch": self.epoch,
            "best_ap": self.best_ap,
            "recipe": asdict(self.recipe),
            "config": self.learner.detector.config.to_dict(),
            "learner": self.learner.state_dict(),
            "average": None if self.average is None else self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "scaler": self.scaler.state_dict(),
        }
        fresh = self.output / "last.pt.part"
        torch.save(state, fresh)
        fresh.replace(self.output / "last.pt")

    def resume(self) -> None:
        """Go on from last.pt; ValueError when it belongs to another recipe or network."""
        path = self.output / "last.pt"
        state = read_state(path)
        for name, mine in (("recipe", asdict(self.recipe)), ("config", self.learner.detector.config.to_dict())):
            theirs = state[name]
            if changed := [k for k in mine if _plain(mine[k]) != _plain(theirs.get(k))]:
                found = ", ".join(f"{k} {_plain(theirs.get(k))} -> {_plain(mine[k])}" for k in changed)
                raise ValueError(f"{path} was made with another {name}: {found}")
        self.learner.load_state_dict(state["learner"])
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.scaler.load_state_dict(state["scaler"])
        self.epoch, self.best_ap = state["epoch"], state["best_ap"]
        if self.processes.rank == 0:
            self._cut_log()

    def _cut_log(self) -> None:
        """Forget the rows of epochs that the state does not know, whose end was interrupted."""
        log = self.output / "log.csv"
        if log.exists():
            header, *rows = log.read_bytes().splitlines(keepends=True)
            log.write_bytes(b"".join([header, *(row for row in rows if int(row.split(b",")[0]) <= self.epoch)]))


def read_state(path: Path) -> dict[str, Any]:
    """A dictionary that torch.save wrote, on the CPU; a missing or damaged file is an error that names it."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist")
    try:
        state = read_pickled(path)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    if not isinstance(state, dict):
        raise CheckpointError(f"{path} holds a {type(state).__name__}, not a dictionary")
    return state


def _move_average(averages: list[Tensor], current: list[Tensor], steps: Tensor, *, decay: float) -> None:
    """averages = decay * averages + (1 - decay) * current, in place, with less decay in the first steps."""
    count = int(steps)
    if averages[0].is_floating_point():
        torch._foreach_lerp_(averages, current, 1 - min(decay, (1 + count) / (10 + count)))
    else:  # how many batches a batch norm has seen
        torch._foreach_copy_(averages, current)


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def parameter_groups(learner: nn.Module, recipe: Recipe) -> list[dict[str, Any]]:
    """The paper's three rates: the backbone's, a tenth for the projections of locations, `lr` for the rest."""
    groups: dict[float, list[nn.Parameter]] = {}
    for name, parameter in learner.named_parameters():
        if not parameter.requires_grad:
            continue
        if "backbone." in name:
            rate = recipe.lr_backbone
        elif any(word in name for word in OFFSET_PROJECTIONS):
            rate = recipe.lr * recipe.lr_projections
        else:
            rate = recipe.lr
        groups.setdefault(rate, []).append(parameter)
    return [{"params": parameters, "lr": rate} for rate, parameters in groups.items()]


def rate_at(step: int, recipe: Recipe, steps_per_epoch: int) -> float:
    """What every group's rate is multiplied by at a step."""
    warmup = min(1.0, (step + 1) / recipe.warmup_steps) if recipe.warmup_steps else 1.0
    drop = round(recipe.drop_at * recipe.epochs) * steps_per_epoch
    if step < drop:
        return warmup
    if recipe.schedule == "step":
        return 0.1
    share = (step - drop) / max(recipe.epochs * steps_per_epoch - drop, 1)
    return 0.5 * (1 + math.cos(math.pi * min(share, 1.0)))
