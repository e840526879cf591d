"""FID's Inception-v3 in plain PyTorch, the reference of the tests.

Written from the architecture, because torch-fidelity, which has this network, cannot be imported
without torchvision, and PyPI's builds of that do not load beside a CPU build of PyTorch.
fidelity.py, in this folder, compares with torch-fidelity itself.
"""

import numpy as np
import torch
from torch.nn import functional as F


def resize(images: np.ndarray, side: int = 299) -> np.ndarray:
    """(N, H, W, 3) -> f64 (N, side, side, 3): pixel i of an axis is at i * n / side."""

    def matrix(n):
        out = np.zeros((side, n))
        for i in range(side):
            low = i * n // side
            share = i * n / side - low
            out[i, low] += 1 - share
            out[i, min(low + 1, n - 1)] += share
        return out

    height, width = images.shape[1:3]
    return np.einsum("ih,nhwc,jw->nijc", matrix(height), images, matrix(width), optimize=True)


class Network:
    """Inception-v3 on a state dict; images f64 (N, 299, 299, 3) in 0..255."""

    def __init__(self, state: dict[str, np.ndarray]):
        self.state = {name: torch.tensor(a) for name, a in state.items()}

    def unit(self, x, name, stride=1, padding=0):
        x = F.conv2d(x, self.state[f"{name}.conv.weight"], None, stride, padding)
        names = ("running_mean", "running_var", "weight", "bias")
        return F.relu(F.batch_norm(x, *(self.state[f"{name}.bn.{n}"] for n in names), eps=1e-3))

    def units(self, x, block, *steps):
        """Units in turn, each (name, stride, padding) or a name for a 1 x 1 convolution."""
        for step in steps:
            name, *settings = (step,) if isinstance(step, str) else step
            x = self.unit(x, f"{block}.{name}", *settings)
        return x

    def pooled(self, x, block, largest=False):
        if largest:
            x = F.max_pool2d(x, 3, 1, 1)
        else:
            x = F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)
        return self.unit(x, f"{block}.branch_pool")

    def a(self, x, block):
        return torch.cat(
            [
                self.units(x, block, "branch1x1"),
                self.units(x, block, "branch5x5_1", ("branch5x5_2", 1, 2)),
                self.units(
                    x, block, "branch3x3dbl_1", ("branch3x3dbl_2", 1, 1), ("branch3x3dbl_3", 1, 1)
                ),
                self.pooled(x, block),
            ],
            1,
        )

    def b(self, x, block):
        double = ("branch3x3dbl_1", ("branch3x3dbl_2", 1, 1), ("branch3x3dbl_3", 2, 0))
        single = self.units(x, block, ("branch3x3", 2, 0))
        return torch.cat([single, self.units(x, block, *double), F.max_pool2d(x, 3, 2)], 1)

    def c(self, x, block):
        row, column = (0, 3), (3, 0)
        single = ("branch7x7_1", ("branch7x7_2", 1, row), ("branch7x7_3", 1, column))
        double = ("branch7x7dbl_1", ("branch7x7dbl_2", 1, column), ("branch7x7dbl_3", 1, row))
        double += (("branch7x7dbl_4", 1, column), ("branch7x7dbl_5", 1, row))
        branches = ("branch1x1",), single, double
        out = [self.units(x, block, *steps) for steps in branches]
        return torch.cat([*out, self.pooled(x, block)], 1)

    def d(self, x, block):
        first = ("branch3x3_1", ("branch3x3_2", 2, 0))
        second = ("branch7x7x3_1", ("branch7x7x3_2", 1, (0, 3)), ("branch7x7x3_3", 1, (3, 0)))
        second += (("branch7x7x3_4", 2, 0),)
        out = [self.units(x, block, *steps) for steps in (first, second)]
        return torch.cat([*out, F.max_pool2d(x, 3, 2)], 1)

    def e(self, x, block, largest):
        single = self.units(x, block, "branch3x3_1")
        double = self.units(x, block, "branch3x3dbl_1", ("branch3x3dbl_2", 1, 1))
        return torch.cat(
            [
                self.units(x, block, "branch1x1"),
                self.units(single, block, ("branch3x3_2a", 1, (0, 1))),
                self.units(single, block, ("branch3x3_2b", 1, (1, 0))),
                self.units(double, block, ("branch3x3dbl_3a", 1, (0, 1))),
                self.units(double, block, ("branch3x3dbl_3b", 1, (1, 0))),
                self.pooled(x, block, largest),
            ],
            1,
        )

    @torch.no_grad()
    def __call__(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Features (N, 2048) and logits (N, 1008)."""
        x = torch.tensor(images.transpose(0, 3, 1, 2), dtype=torch.float32) / 128 - 1
        x = self.unit(x, "Conv2d_1a_3x3", 2)
        x = self.unit(x, "Conv2d_2a_3x3")
        x = F.max_pool2d(self.unit(x, "Conv2d_2b_3x3", 1, 1), 3, 2)
        x = self.unit(x, "Conv2d_3b_1x1")
        x = F.max_pool2d(self.unit(x, "Conv2d_4a_3x3"), 3, 2)
        for block in ("Mixed_5b", "Mixed_5c", "Mixed_5d"):
            x = self.a(x, block)
        x = self.b(x, "Mixed_6a")
        for block in ("Mixed_6b", "Mixed_6c", "Mixed_6d", "Mixed_6e"):
            x = self.c(x, block)
        x = self.d(x, "Mixed_7a")
        x = self.e(x, "Mixed_7b", largest=False)
        x = self.e(x, "Mixed_7c", largest=True)
        features = x.mean((2, 3))
        logits = F.linear(features, self.state["fc.weight"], self.state["fc.bias"])
        return features.numpy(), logits.numpy()


def random_state(shapes: dict[str, tuple[int, ...]], seed: int = 0) -> dict[str, np.ndarray]:
    """Random weights f32 by name, with scales that preserve the variance of activations."""
    rng, out = np.random.default_rng(seed), {}
    for name, shape in shapes.items():
        if len(shape) > 1:
            values = rng.standard_normal(shape, np.float32) * (2 / np.prod(shape[1:])) ** 0.5
        elif name.endswith("running_var"):
            values = rng.uniform(0.3, 1.5, shape)
        elif name.endswith("bn.weight"):
            values = rng.uniform(0.5, 1.5, shape)
        else:
            values = rng.normal(0, 0.2, shape)
        out[name] = values.astype(np.float32)
    return out
