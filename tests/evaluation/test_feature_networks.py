"""Published networks: loaded from their files, equal to the originals; other files are errors."""

import hashlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from benchmarks import torch_inception
from benchmarks.parity import jit
from condiff_jax.evaluation import feature_networks
from condiff_jax.evaluation.feature_networks import load_clip, load_inception, random_inception
from condiff_jax.models import clip, inception
from condiff_jax.pretrained.layout import to_torch
from tests import clips

VISION = dict(hidden_size=12, intermediate_size=20, num_hidden_layers=2, num_attention_heads=2)
VISION |= dict(image_size=16, patch_size=4)
CAPTIONS = ("a red circle", "blue", "a small ring, a large square", "a red circle")


def random_images(height, width, n=4):
    rng = np.random.default_rng(height)
    return rng.integers(0, 256, (n, height, width, 3)).astype(np.uint8)


@pytest.fixture(scope="module")
def inception_state():
    shapes = feature_networks.inception_shapes()
    empty = to_torch(jax.tree.map(lambda s: np.broadcast_to(np.float32(0), s.shape), shapes))
    return torch_inception.random_state({name: a.shape for name, a in empty.items()})


def test_inception_equals_pytorch_from_weight_files_to_features(inception_state, tmp_path):
    state = {name: torch.tensor(a) for name, a in inception_state.items()}
    # Every BatchNorm2d has this counter; some conversions of the weights contain it.
    state["Mixed_7c.branch_pool.bn.num_batches_tracked"] = torch.tensor(3)
    torch.save(state, tmp_path / "weights.pth")
    network = load_inception(str(tmp_path / "weights.pth"))
    assert network.sha256 == hashlib.sha256((tmp_path / "weights.pth").read_bytes()).hexdigest()
    images = [random_images(n, n, 1) for n in (32, 299, 512)]
    resized = np.concatenate([torch_inception.resize(image) for image in images])
    expected, logits = torch_inception.Network(inception_state)(resized)
    assert np.std(expected, axis=0).mean() > 0.1 * expected.mean()  # images differ
    for image, row in zip(images, expected, strict=True):
        features = network(image)
        assert features.shape == (1, network.width)
        np.testing.assert_allclose(features[0], row, atol=1e-4 * row.max())
    apply_logits = jit(lambda p, x: inception.InceptionV3().apply({"params": p}, x)[1])
    actual = apply_logits(network.params, network.prepare(images[1]))
    np.testing.assert_allclose(actual[0], logits[1], atol=1e-4 * np.abs(logits[1]).max())


class Narrow(nn.Module):
    """Chain of 16 of Inception's units; compiling the initialization of all takes long."""

    @nn.compact
    def __call__(self, images):
        x = inception.chain((images - 128) / 128, "unit", (16, 3, 2), *[(16, 1)] * 15)
        return x.mean((1, 2)), None


@pytest.mark.parametrize(
    "kind", [Narrow, pytest.param(inception.InceptionV3, marks=pytest.mark.slow)]
)
def test_random_inception_distinguishes_images_and_is_named_random(kind, monkeypatch):
    monkeypatch.setattr(inception, "InceptionV3", kind)
    network = random_inception()
    images = random_images(64, 64, 3)
    images[0], images[1] = 0, 255
    features = network(images)
    assert features.shape == (3, 16 if kind is Narrow else 2048) and "random" in network.name
    assert 0.01 < features.mean() < 100  # the scale of weights preserves the variance
    assert features.std(0).mean() > 0.1 * features.mean()
    assert network.sha256 == random_inception().sha256 != hashlib.sha256().hexdigest()


def test_files_that_are_not_inception(inception_state, tmp_path):
    state = inception_state | {"AuxLogits.fc.weight": np.zeros(3, np.float32)}
    state["fc.bias"] = np.zeros(1000, np.float32)  # as torchvision's network has it
    del state["Mixed_5b.branch_pool.bn.running_mean"]
    save_file(state, tmp_path / "weights.safetensors")
    with pytest.raises(
        ValueError, match="does not fit Inception: .*; give pt_inception-2015"
    ) as error:
        load_inception(str(tmp_path / "weights.safetensors"))
    for problem in (
        "missing Mixed_5b.branch_pool.bn.running_mean",
        "unexpected AuxLogits.fc.weight",
        "fc.bias is (1000,), not (1008,)",
    ):
        assert problem in str(error.value)
    broken = tmp_path / "weights.pth"
    broken.write_bytes(b"nothing")
    with pytest.raises(ValueError, match="does not fit Inception: .*cannot be read") as error:
        load_inception(str(broken))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("path", ["", "/no/such/file.pth"])
def test_missing_weights_are_an_error_that_names_their_source(path):
    for load, source in (
        (load_inception, "give pt_inception-2015-12-05-6726825d.pth of github.com/mseitzer"),
        (load_clip, "give a folder or hub id of a CLIPModel, such as openai/clip-vit-large"),
    ):
        with pytest.raises(FileNotFoundError, match=source) as error:
            load(path)
        assert "\n" not in str(error.value)


def write_clip(folder, act="quick_gelu", **settings):
    vision = VISION | {"hidden_act": act} | settings
    clips.write(folder, whole=True, vision=vision, hidden_act=act, num_hidden_layers=2)
    return folder


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    return write_clip(tmp_path_factory.mktemp("clip"))


def transformers_model(folder):
    return transformers.CLIPModel.from_pretrained(folder, local_files_only=True).eval()


@pytest.mark.parametrize("act, epsilon", [("quick_gelu", 1e-5), ("gelu", 1e-2)])
def test_image_tower_equals_transformers(tmp_path, act, epsilon):
    write_clip(tmp_path, act, layer_norm_eps=epsilon)
    kind = transformers.CLIPVisionModelWithProjection
    original = kind.from_pretrained(tmp_path, local_files_only=True).eval()
    images = random_images(16, 16)
    pixels = torch.tensor(np.asarray(clip.normalize(images))).permute(0, 3, 1, 2)
    with torch.no_grad():
        expected = original(pixels).image_embeds.numpy()
    network = load_clip(str(tmp_path)).images
    assert network.width == expected.shape[1] == 512
    np.testing.assert_allclose(network(images), expected, atol=1e-5 * np.abs(expected).max())


@pytest.fixture(scope="module")
def score(clip_folder):
    return load_clip(str(clip_folder))


@pytest.mark.parametrize("size", [(16, 16), (40, 40), (50, 33), (9, 21)])
def test_clip_score_equals_transformers(clip_folder, score, size):
    images = random_images(*size)
    processor = CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size=16)
    pixels = processor(list(images), return_tensors="pt")["pixel_values"]
    tokenizer = transformers.CLIPTokenizer.from_pretrained(clip_folder, local_files_only=True)
    length = dict(padding="max_length", max_length=clips.LENGTH, truncation=True)
    tokens = tokenizer(list(CAPTIONS), return_tensors="pt", **length)
    with torch.no_grad():
        out = transformers_model(clip_folder)(pixel_values=pixels, **tokens)
    cosines = (out.image_embeds * out.text_embeds).sum(1).numpy()
    scores = score(images, CAPTIONS)
    np.testing.assert_allclose(scores, 100 * cosines, rtol=1e-4, atol=1e-3)
    assert np.ptp(scores) > 1


def test_captions_are_embedded_alike_in_any_batch(score, monkeypatch):
    whole = score.texts(CAPTIONS)
    monkeypatch.setattr(feature_networks, "TEXTS", 3)
    np.testing.assert_allclose(score.texts(CAPTIONS), whole, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(whole[0], whole[3])


def test_unequal_numbers_of_images_and_captions(score):
    with pytest.raises(ValueError, match="4 images, but 2 captions"):
        score(random_images(16, 16), CAPTIONS[:2])


def change(edit):
    def apply(folder):
        state = load_file(folder / "model.safetensors")
        edit(state)
        save_file(state, folder / "model.safetensors")

    return apply


@pytest.mark.parametrize(
    "edit, kind, message",
    [
        (lambda f: (f / "config.json").unlink(), FileNotFoundError, "no config.json in"),
        (lambda f: (f / "merges.txt").unlink(), FileNotFoundError, "no merges.txt in"),
        (lambda f: (f / "model.safetensors").unlink(), FileNotFoundError, "no weights.*give a"),
        (change(lambda s: s.pop("visual_projection.weight")), ValueError, "missing projection"),
        (change(lambda s: s.pop("text_projection.weight")), ValueError, "missing text_projection"),
        (
            change(lambda s: s.pop("vision_model.post_layernorm.bias")),
            ValueError,
            "does not fit CLIP: .*missing norm_out.bias; give a folder",
        ),
    ],
)
def test_bad_clip_folders(tmp_path, edit, kind, message):
    edit(write_clip(tmp_path))
    with pytest.raises(kind, match=message) as error:
        load_clip(str(tmp_path))
    assert "\n" not in str(error.value)


def test_hub_ids_download_the_needed_files(clip_folder, monkeypatch):
    downloads = []

    def snapshot_download(source, allow_patterns):
        downloads.append((source, allow_patterns))
        return str(clip_folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    load_clip("owner/name")
    assert downloads[0] == ("owner/name", ["*.safetensors", clip.CONFIG, *clip.WORDS])


def test_default_image_size_is_vit_l_14():
    x = jnp.zeros((1, 224, 224, 3))
    shapes = jax.eval_shape(clip.ImageTower(clip.ImageSize()).init, jax.random.key(0), x)
    # CLIPVisionModelWithProjection of openai/clip-vit-large-patch14.
    assert sum(a.size for a in jax.tree.leaves(shapes)) == 303_966_208
