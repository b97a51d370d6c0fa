"""Shared by all tests: small real models, concept bases for them, and a machine-friendly set-up."""

from __future__ import annotations

import os

# Before any Hugging Face library is imported: no test may depend on a network.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

import pytest
import torch
from hypothesis import HealthCheck, settings
from torch import nn

settings.register_profile(
    "project",
    deadline=None,
    max_examples=int(os.environ.get("GRADPROJ_FUZZ_EXAMPLES", "25")),
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.load_profile("project")


@pytest.fixture(autouse=True)
def _reproducible() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)


class SmallNet(nn.Module):
    """A convolution, then three linear layers, two of which see the same input: pictures `(n, 3, 8, 8)` to `(n, 5)`."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.query = nn.Linear(8, 16)
        self.key = nn.Linear(8, 16)
        self.head = nn.Linear(16, 5)

    def forward(self, sample: torch.Tensor) -> torch.Tensor:
        features = torch.relu(self.conv(sample)).mean(dim=(2, 3))
        return self.head(torch.tanh(self.query(features) * self.key(features)))


@pytest.fixture
def small_net() -> SmallNet:
    return SmallNet()
