"""The embedded model's card: `python -m training.card --run runs/blood-cells --data DIR` writes RUN/card/.

README.md says what the model is, what it was trained on, how, how well it does and what it is not for; curve.png is AP
over the epochs.
"""

import argparse
import csv
import tempfile
from dataclasses import asdict
from pathlib import Path

import matplotlib
import torch

from models import load_checkpoint
from samples.coco import write_smears
from training.augment import FixedAugment
from training.average_precision import AveragePrecision
from training.coco import DataError, read_split
from training.embedded import AUGMENT, CALM, CALM_EPOCHS, DRAWN_SHARE
from training.evaluate import evaluate

SMEARS, SMEARS_SEED = 40, 800_000_000

TEMPLATE = Path(__file__).with_name("card_template.md")


def write_card(run: Path, data: Path) -> Path:
    """Evaluate RUN/best.safetensors on the validation part and on drawn smears; write RUN/card and return it."""
    model = load_checkpoint(run / "best.safetensors")
    state = torch.load(run / "last.pt", map_location="cpu", weights_only=True)
    device = torch.device("cpu")
    measured = evaluate(model, read_split(data, "val"), device, progress=True)
    with tempfile.TemporaryDirectory() as folder:
        write_smears(Path(folder), SMEARS, seed=SMEARS_SEED)
        (Path(folder) / "instances.json").rename(Path(folder) / "instances_val.json")
        drawn = evaluate(model, read_split(Path(folder), "val"), device, progress=True)
    with (run / "log.csv").open() as file:
        log = [row for row in csv.DictReader(file) if row["AP"]]

    config, recipe = model.config, state["recipe"]
    card = run / "card"
    card.mkdir(exist_ok=True)
    _plot(log, card / "curve.png")
    text = TEMPLATE.read_text().format(
        parameters=sum(p.numel() for p in model.parameters()) / 1e6,
        widths="/".join(map(str, config.backbone_widths)),
        levels=config.num_feature_levels,
        hidden=config.hidden_dim,
        heads=config.num_heads,
        encoder=config.num_encoder_layers,
        decoder=config.num_decoder_layers,
        queries=config.num_queries,
        shortest=config.resize_shortest,
        longest=config.resize_longest,
        classes=", ".join(f"{name} ({i})" for i, name in zip(config.category_ids, config.category_names, strict=True)),
        epochs=state["epoch"],
        planned=recipe["epochs"],
        best=max(log, key=lambda row: float(row["AP"]))["epoch"],
        drawn=DRAWN_SHARE,
        rows=_rows(measured, drawn),
        ap75=measured.ap75,
        smears=SMEARS,
        seed=recipe["seed"],
        threads=f"{sum(float(row['seconds']) for row in _all_rows(run)) / 60:.0f} minutes of two CPU cores here",
        recipe="\n".join(f"| {key} | {value} |" for key, value in recipe.items() if key != "seed"),
        augment=_values(AUGMENT),
        calm=_values(CALM),
        calm_epochs=CALM_EPOCHS,
    )
    (card / "README.md").write_text(text)
    return card


def _values(augment: FixedAugment) -> str:
    return ", ".join(f"{key} {value}" for key, value in asdict(augment).items())


def _all_rows(run: Path) -> list[dict[str, str]]:
    with (run / "log.csv").open() as file:
        return list(csv.DictReader(file))


def _rows(measured: AveragePrecision, drawn: AveragePrecision) -> str:
    names = [("all", (measured.ap, measured.ap50), (drawn.ap, drawn.ap50))]
    names += [(name, pair, drawn.by_class[name]) for name, pair in measured.by_class.items()]
    return "\n".join(f"| {n} | {a[0]:.3f} | {a[1]:.3f} | {b[0]:.3f} | {b[1]:.3f} |" for n, a, b in names)


def _plot(log: list[dict[str, str]], path: Path) -> None:
    matplotlib.use("Agg")
    from matplotlib import pyplot

    epochs = [int(row["epoch"]) for row in log]
    figure, axes = pyplot.subplots(figsize=(6.4, 3.2), layout="constrained")
    for name in ("AP50", "AP75", "AP"):
        axes.plot(epochs, [float(row[name]) for row in log], label=name)
    axes.set(xlabel="epoch", ylabel="validation", ylim=(0, 1))
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    figure.savefig(path, dpi=100)
    pyplot.close(figure)


def main(argv: list[str] | None = None) -> int:
    """Write the card."""
    parser = argparse.ArgumentParser(prog="python -m training.card", description=__doc__)
    parser.add_argument("--run", type=Path, required=True, help="the output folder of training.embedded")
    parser.add_argument("--data", type=Path, required=True)
    args = parser.parse_args(argv)
    try:
        print(write_card(args.run, args.data))
    except (DataError, OSError, ValueError) as error:
        parser.exit(1, f"python -m training.card: {error}\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
