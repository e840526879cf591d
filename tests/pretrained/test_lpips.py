"""LPIPS: parity with a PyTorch implementation, for both layouts of weight files."""

import jax
import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from torch.nn import functional as F

from condiff_jax.pretrained import lpips

# Width and kernel of the convolutions, their layer indices in torchvision's networks, and the
# convolutions that end a stage.
NETWORKS = {
    "alexnet": (
        ((64, 11), (192, 5), (384, 3), (256, 3), (256, 3)),
        (0, 3, 6, 8, 10),
        (0, 1, 2, 3, 4),
    ),
    "vgg16": (
        tuple((n, 3) for n in (64, 64, 128, 128, 256, 256, 256, *(512,) * 6)),
        (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28),
        (1, 3, 6, 9, 12),
    ),
}
FLAX_NAMES = {"alexnet": "AlexNet_0", "vgg16": "VGG16_0"}


def weights(network="alexnet", seed=0):
    """Random weights in PyTorch's layout: [(weight (O, I, k, k), bias (O,)), ...], [head (O,)]."""
    rng = np.random.default_rng(seed)
    convolutions = []
    channels = 3
    sizes, _, stages = NETWORKS[network]
    for width, k in sizes:
        weight = rng.normal(0, (2 / (channels * k * k)) ** 0.5, (width, channels, k, k))
        convolutions.append((weight.astype(np.float32), rng.normal(0, 0.1, width).astype("f4")))
        channels = width
    heads = [rng.uniform(0, 1, sizes[last][0]).astype(np.float32) for last in stages]
    return convolutions, heads


def pytorch_names(network="alexnet"):
    convolutions, heads = weights(network)
    out = {}
    stage = 0
    _, numbers, stages = NETWORKS[network]
    for i, (number, (weight, bias)) in enumerate(zip(numbers, convolutions, strict=True)):
        out[f"net.slice{stage + 1}.{number}.weight"] = weight
        out[f"net.slice{stage + 1}.{number}.bias"] = bias
        stage += i in stages
    return out | {f"lin{i}.model.1.weight": h[None, :, None, None] for i, h in enumerate(heads)}


def flax_names(network="alexnet"):
    convolutions, heads = weights(network)
    module = FLAX_NAMES[network]
    out = {}
    for i, (weight, bias) in enumerate(convolutions):
        out[f"{module}/Conv_{i}/kernel"] = np.ascontiguousarray(weight.transpose(2, 3, 1, 0))
        out[f"{module}/Conv_{i}/bias"] = bias
    return out | {
        f"NetLinLayer_{i}/Conv_0/kernel": h[None, None, :, None] for i, h in enumerate(heads)
    }


def original(network, images1, images2):
    """Compute LPIPS (N,) f64 of uint8 images (N, H, W, 3) in PyTorch."""
    convolutions, heads = weights(network)
    stages = NETWORKS[network][2]

    def features(images):
        x = torch.tensor(images, dtype=torch.float64).permute(0, 3, 1, 2) / 127.5 - 1
        size = [max(64, n) for n in x.shape[2:]]
        x = F.interpolate(x, size, mode="bilinear", align_corners=False)
        shift = torch.tensor([-0.030, -0.088, -0.188], dtype=x.dtype)[:, None, None]
        scale = torch.tensor([0.458, 0.448, 0.450], dtype=x.dtype)[:, None, None]
        x = (x - shift) / scale
        out = []
        for i, (weight, bias) in enumerate(convolutions):
            if network == "alexnet":
                x = F.max_pool2d(x, 3, 2) if i in (1, 2) else x
                step, padding = ((4, 2), (1, 2), (1, 1), (1, 1), (1, 1))[i]
            else:
                x = F.max_pool2d(x, 2) if i - 1 in stages else x
                step = padding = 1
            weight, bias = torch.tensor(weight).double(), torch.tensor(bias).double()
            x = F.relu(F.conv2d(x, weight, bias, step, padding))
            if i in stages:
                out.append(x / (x.square().sum(1, keepdim=True).sqrt() + 1e-10))
        return out

    parts = [
        F.conv2d((a - b).square(), torch.tensor(head).double()[None, :, None, None]).mean((1, 2, 3))
        for a, b, head in zip(features(images1), features(images2), heads, strict=True)
    ]
    return sum(parts).numpy()


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("lpips") / "alexnet.safetensors"
    save_file(pytorch_names(), path)
    return path


def random_images(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (*shape, 3)).astype(np.uint8)


@pytest.mark.parametrize(
    "network, shape",
    [
        ("alexnet", (3, 72, 80)),
        ("alexnet", (3, 32, 70)),
        ("alexnet", (3, 16, 16)),
        ("vgg16", (1, 40, 71)),
    ],
)
def test_equals_pytorch(tmp_path, network, shape):
    first = random_images(*shape)
    second = np.clip(first + np.random.default_rng(1).normal(0, 40, first.shape), 0, 255)
    second = second.astype(np.uint8)
    expected = original(network, first, second)
    save_file(pytorch_names(network), tmp_path / "weights.safetensors")
    distances = lpips.create(str(tmp_path / "weights.safetensors"))(first, second)
    np.testing.assert_allclose(distances, expected, rtol=1e-4)


def test_zero_to_itself_symmetric_and_independent_of_batches(path, monkeypatch):
    distance = lpips.create(str(path))
    first, second = random_images(3, 16, 16), random_images(3, 16, 16, seed=1)
    assert distance(first, first).max() < 1e-12
    np.testing.assert_allclose(distance(first, second), distance(second, first), rtol=1e-6)
    whole = distance(first, second)
    assert whole.shape == (3,) and whole.min() > 0
    monkeypatch.setattr(lpips, "BATCH", 2)
    np.testing.assert_allclose(distance(first, second), whole, rtol=1e-5)


def test_distances_use_the_highest_matmul_precision(path, monkeypatch):
    precisions = []

    def distance(params, images1, images2):
        precisions.append(jax.config.jax_default_matmul_precision)
        return np.zeros(len(images1))

    monkeypatch.setattr(lpips, "distance", distance)
    lpips.create(str(path))(random_images(1, 16, 16), random_images(1, 16, 16))
    assert precisions == ["highest"]


@pytest.mark.parametrize("network", NETWORKS)
def test_both_layouts_and_formats_are_the_same(tmp_path, network):
    save_file(pytorch_names(network), tmp_path / "weights.safetensors")
    np.savez(tmp_path / "weights.npz", **flax_names(network))
    names = ("weights.safetensors", "weights.npz")
    pytorch, flax = (lpips.load_weights(str(tmp_path / name)) for name in names)
    assert set(pytorch) == {network, "heads"}
    jax.tree.map(np.testing.assert_array_equal, pytorch, flax)


def test_bad_weights(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        lpips.load_weights(str(tmp_path / "none.npz"))
    pickled = tmp_path / "alexnet.ckpt"
    pickled.write_bytes(b"\x80\x03}q\x00.")
    with pytest.raises(ValueError, match=r"\.safetensors or \.npz"):
        lpips.load_weights(str(pickled))
    broken = tmp_path / "broken.npz"
    broken.write_bytes(b"nothing")
    with pytest.raises(ValueError, match="cannot be read"):
        lpips.load_weights(str(broken))
    np.savez(broken, inside=np.array([{}], object))  # a pickle inside
    with pytest.raises(ValueError, match="cannot be read"):
        lpips.load_weights(str(broken))

    def saved(change):
        arrays = flax_names()
        change(arrays)
        np.savez(broken, **arrays)
        return str(broken)

    with pytest.raises(ValueError, match="lacks NetLinLayer_4/Conv_0/kernel"):
        lpips.load_weights(saved(lambda a: a.pop("NetLinLayer_4/Conv_0/kernel")))
    with pytest.raises(ValueError, match="convolution 1 has shapes"):
        lpips.load_weights(saved(lambda a: a.update({"AlexNet_0/Conv_1/bias": np.zeros(3)})))
    with pytest.raises(ValueError, match="head 2 has negative"):
        key = "NetLinLayer_2/Conv_0/kernel"
        lpips.load_weights(saved(lambda a: a.update({key: a[key] - 1})))
    for name, changed in {"head 2": key, "convolution 3": "AlexNet_0/Conv_3/bias"}.items():
        with pytest.raises(ValueError, match=f"{name} holds NaN"):
            lpips.load_weights(saved(lambda a, k=changed: a.update({k: a[k] * np.nan})))
