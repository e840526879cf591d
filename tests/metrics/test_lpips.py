"""LPIPS equals a PyTorch implementation on the same weights, in both layouts of weight files."""

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from torch.nn import functional as F

from condiff_jax.metrics import lpips

LAYERS = ((3, 64, 11), (64, 192, 5), (192, 384, 3), (384, 256, 3), (256, 256, 3))


def weights(seed=0):
    """PyTorch's layout: [(weight (O, I, k, k), bias (O,), head (O,)), ...]."""
    rng = np.random.default_rng(seed)
    return [
        (
            rng.normal(0, (2 / (before * k * k)) ** 0.5, (width, before, k, k)).astype(np.float32),
            rng.normal(0, 0.1, width).astype(np.float32),
            rng.uniform(0, 1, width).astype(np.float32),
        )
        for before, width, k in LAYERS
    ]


def pytorch_names(layers):
    out = {}
    for i, (number, (weight, bias, head)) in enumerate(zip((0, 3, 6, 8, 10), layers, strict=True)):
        out[f"net.slice{i + 1}.{number}.weight"] = weight
        out[f"net.slice{i + 1}.{number}.bias"] = bias
        out[f"lin{i}.model.1.weight"] = head[None, :, None, None]
    return out


def flax_names(layers):
    out = {}
    for i, (weight, bias, head) in enumerate(layers):
        out[f"AlexNet_0/Conv_{i}/kernel"] = np.ascontiguousarray(weight.transpose(2, 3, 1, 0))
        out[f"AlexNet_0/Conv_{i}/bias"] = bias
        out[f"NetLinLayer_{i}/Conv_0/kernel"] = head[None, None, :, None]
    return out


def original(layers, images1, images2):
    """LPIPS (N,) f64 by PyTorch, of pictures uint8 (N, H, W, 3)."""

    def stages(images):
        x = torch.tensor(images, dtype=torch.float64).permute(0, 3, 1, 2) / 127.5 - 1
        size = [max(64, n) for n in x.shape[2:]]
        x = F.interpolate(x, size, mode="bilinear", align_corners=False)
        shift = torch.tensor([-0.030, -0.088, -0.188], dtype=x.dtype)[:, None, None]
        scale = torch.tensor([0.458, 0.448, 0.450], dtype=x.dtype)[:, None, None]
        x, out = (x - shift) / scale, []
        for i, (weight, bias, _) in enumerate(layers):
            x = F.max_pool2d(x, 3, 2) if i in (1, 2) else x
            step, padding = ((4, 2), (1, 2), (1, 1), (1, 1), (1, 1))[i]
            weight, bias = torch.tensor(weight).double(), torch.tensor(bias).double()
            x = F.relu(F.conv2d(x, weight, bias, step, padding))
            out.append(x / (x.square().sum(1, keepdim=True).sqrt() + 1e-10))
        return out

    pairs = zip(stages(images1), stages(images2), layers, strict=True)
    parts = [
        F.conv2d((a - b).square(), torch.tensor(head).double()[None, :, None, None]).mean((1, 2, 3))
        for a, b, (_, _, head) in pairs
    ]
    return sum(parts).numpy()


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("lpips") / "alexnet.safetensors"
    save_file(pytorch_names(weights()), path)
    return path


def pictures(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (*shape, 3)).astype(np.uint8)


@pytest.mark.parametrize("shape", [(3, 72, 80), (3, 32, 70), (3, 16, 16)])
def test_equals_pytorch(path, shape):
    first = pictures(*shape)
    second = np.clip(first + np.random.default_rng(1).normal(0, 40, first.shape), 0, 255)
    second = second.astype(np.uint8)
    expected = original(weights(), first, second)
    found = lpips.create(str(path))(first, second)
    np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_zero_to_itself_symmetric_and_independent_of_batches(path, monkeypatch):
    distance = lpips.create(str(path))
    first, second = pictures(3, 16, 16), pictures(3, 16, 16, seed=1)
    assert distance(first, first).max() < 1e-12
    np.testing.assert_allclose(distance(first, second), distance(second, first), rtol=1e-6)
    whole = distance(first, second)
    assert whole.shape == (3,) and whole.min() > 0
    monkeypatch.setattr(lpips, "BATCH", 2)
    np.testing.assert_allclose(distance(first, second), whole, rtol=1e-5)


def test_both_layouts_and_formats_are_the_same(path, tmp_path):
    np.savez(tmp_path / "alexnet.npz", **flax_names(weights()))
    one, other = lpips.load_weights(str(path)), lpips.load_weights(str(tmp_path / "alexnet.npz"))
    for i in range(5):
        np.testing.assert_array_equal(one["heads"][i], other["heads"][i])
        for name in ("kernel", "bias"):
            a, b = (w["alexnet"][f"conv_{i}"][name] for w in (one, other))
            np.testing.assert_array_equal(a, b)


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
        arrays = flax_names(weights())
        change(arrays)
        np.savez(broken, **arrays)
        return str(broken)

    with pytest.raises(ValueError, match="lacks NetLinLayer_4/Conv_0/kernel"):
        lpips.load_weights(saved(lambda a: a.pop("NetLinLayer_4/Conv_0/kernel")))
    with pytest.raises(ValueError, match="stage 1 has shapes"):
        lpips.load_weights(saved(lambda a: a.update({"AlexNet_0/Conv_1/bias": np.zeros(3)})))
    with pytest.raises(ValueError, match="stage 2 has negative"):
        key = "NetLinLayer_2/Conv_0/kernel"
        lpips.load_weights(saved(lambda a: a.update({key: a[key] - 1})))
