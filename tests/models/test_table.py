"""The paper's table: parameters to the digit printed, multiply-adds within 4%."""

from __future__ import annotations

import pytest
import torch

from models import VARIANTS, build_model
from models.table import PUBLISHED, cost, main, table
from tests.models.test_checkpoint import TINY

GFLOPS_TOLERANCE = 0.04  # measured 0.013


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_row_is_the_papers(variant: str) -> None:
    parameters, operations = PUBLISHED[variant]
    counted = cost(VARIANTS[variant])
    assert round(counted.parameters / 1e6) == parameters
    assert counted.multiply_adds / 1e9 == pytest.approx(operations, rel=GFLOPS_TOLERANCE)


def test_all_matrix_products_and_samples_are_counted() -> None:
    """Against a count by hand, from what the layers of a tiny network were really given."""
    model = build_model(TINY).eval()
    total = 0

    def count(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        nonlocal total
        weight = module.weight
        positions = output.numel() // weight.shape[0]
        total += weight.numel() * positions

    def sample(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        nonlocal total
        points = module.num_levels * module.num_points
        total += 5 * output.numel() * points  # each of the C outputs is a sum over its head's points

    for module in model.modules():
        if isinstance(module, torch.nn.Linear | torch.nn.Conv2d):
            module.register_forward_hook(count)
        elif type(module).__name__ == "MSDeformAttn":
            module.register_forward_hook(sample)
        elif type(module).__name__ == "SelfAttention":
            n, c = TINY.num_queries, TINY.hidden_dim
            total += 3 * n * c * c + 2 * n * n * c
    with torch.no_grad():
        model(torch.zeros(1, 3, 64, 96))
    assert cost(TINY, (64, 96)).multiply_adds == total


def test_the_command_prints_it(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--size", "800", "1100"])
    printed = capsys.readouterr().out
    assert printed.rstrip("\n") == table()
    for name in VARIANTS:
        assert name in printed
