"""CLIP's text tower and tokenizer: parity with transformers on checkpoint folders it saved."""

import json
import pickle
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file

from benchmarks.parity import jit
from condiff_jax.config.errors import ConfigError
from condiff_jax.config.schema import TextEncoder
from condiff_jax.models import clip
from condiff_jax.pretrained import encoders, key_maps
from condiff_jax.pretrained.encoders import Clip
from condiff_jax.pretrained.layout import to_torch
from tests import clips

IDS = np.array([[2, 5, 9, 1, 1, 1, 1, 1], [2, 8, 4, 7, 6, 3, 9, 1], [2, 1, 1, 1, 1, 1, 1, 1]])
MASK = np.arange(8) < [[4], [8], [2]]


def encoder(folder, dtype=jnp.float32, **settings):
    fields = {"name": "clip", "length": clips.LENGTH, "width": clips.WIDTH} | settings
    return Clip(TextEncoder(path=str(folder), **fields), jnp.dtype(dtype))


def features(tower, ids, mask):
    return jit(tower.apply)({"params": tower.load()}, jnp.asarray(ids), jnp.asarray(mask))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return clips.write(tmp_path_factory.mktemp("clip"))


@pytest.mark.parametrize("whole", [False, True], ids=["CLIPTextModel", "CLIPModel"])
@pytest.mark.parametrize("act, end", [("quick_gelu", 2), ("gelu", 2), ("quick_gelu", clips.END)])
def test_tower_agrees_with_transformers(tmp_path, act, end, whole):
    # With an explicit end token, there are ids above it.
    settings = {"vocab_size": clips.END + 1 + 3 * (end != 2)}
    epsilon = 1e-5 if act == "quick_gelu" else 1e-2
    settings |= {"hidden_act": act, "eos_token_id": end, "layer_norm_eps": epsilon}
    clips.write(tmp_path, whole=whole, **settings)
    reference = transformers.CLIPTextModel.from_pretrained(tmp_path, local_files_only=True).eval()
    tower = encoder(tmp_path)
    ids = np.where(IDS == 1, clips.END, IDS)  # the end token, and the padding
    ids[0, 5:] = 0  # as Stable Diffusion 2 pads
    ids[1, 2] = clips.END + 2 * (end != 2) - (end == 2)  # the end is not always the largest id
    with torch.no_grad():
        expected = reference(torch.tensor(ids))
    text = features(tower, ids, MASK)
    assert text.tokens.dtype == jnp.float32
    np.testing.assert_allclose(text.tokens, expected.last_hidden_state, atol=1e-5)
    np.testing.assert_allclose(text.pooled, expected.pooler_output, atol=1e-5)
    np.testing.assert_array_equal(text.mask, MASK)
    rows = np.arange(3)
    np.testing.assert_array_equal(text.pooled, text.tokens[rows, MASK.sum(1) - 1])


def test_padding_has_no_influence(folder):
    ids, changed = np.where(MASK, IDS, 1), np.where(MASK, IDS, 0)
    ids[~MASK] = clips.END
    ids[np.arange(3), MASK.sum(1) - 1] = changed[np.arange(3), MASK.sum(1) - 1] = clips.END
    tower = encoder(folder)
    a, b = (features(tower, x, MASK) for x in (ids, changed))
    np.testing.assert_array_equal(np.asarray(a.tokens)[MASK], np.asarray(b.tokens)[MASK])
    np.testing.assert_array_equal(a.pooled, b.pooled)


def test_bf16_is_close_to_f32(folder):
    ids = np.where(IDS == 1, clips.END, IDS)
    f32, bf16 = (features(encoder(folder, dtype), ids, MASK) for dtype in ("float32", "bfloat16"))
    assert bf16.tokens.dtype == bf16.pooled.dtype == jnp.bfloat16
    error = np.asarray(f32.tokens - bf16.tokens.astype(jnp.float32))
    error = np.sqrt(np.mean(error**2) / np.mean(np.square(f32.tokens)))
    assert 1e-4 < error < 0.02
    types = {str(a.dtype) for a in jax.tree.leaves(encoder(folder, "bfloat16").load())}
    assert types == {"bfloat16", "float32"}  # matrices, norms and biases


def test_default_size_is_vit_l_14():
    tower, ids = clip.TextTower(clip.Size()), jnp.zeros((1, 77), jnp.int32)
    shapes = jax.eval_shape(tower.init, jax.random.key(0), ids, ids > 0)
    assert sum(a.size for a in jax.tree.leaves(shapes)) == 123_060_480


@pytest.mark.parametrize("prefix", ["", "text_model."])
def test_old_and_new_names_of_weights(folder, tmp_path, prefix):
    tensors = to_torch(encoder(folder).load())
    state = key_maps.to_published(tensors, key_maps.CLIP_TEXT)
    state = {prefix + name.removeprefix("text_model."): a for name, a in state.items()}
    state["logit_scale"] = np.ones(1, np.float32)
    state[f"{prefix}embeddings.position_ids"] = np.arange(8)[None]
    for name in (clip.CONFIG, *clip.WORDS):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    torch.save({k: torch.tensor(np.array(a)) for k, a in state.items()}, tmp_path / "model.bin")
    jax.tree.map(np.testing.assert_array_equal, to_torch(encoder(tmp_path).load()), tensors)


CAPTIONS = (
    "a red circle",
    "A  RED\tcircle's 2 edges!",
    "",
    " ",
    "ünïcode 円 🙂 and <|endoftext|> inside",
    "a red circle " * 800,
    "x" * 10_000,
)


@pytest.mark.parametrize("length", [8, 77])
def test_tokens_agree_with_transformers(folder, length):
    reference = transformers.CLIPTokenizer.from_pretrained(folder, local_files_only=True)
    tokenizer = pickle.loads(pickle.dumps(clip.Tokenizer.read(folder)))
    for caption in CAPTIONS:
        expected = reference(caption, padding="max_length", max_length=length, truncation=True)
        ids, mask = tokenizer(caption, length)
        assert (ids.dtype, mask.dtype, ids.shape) == (np.int32, bool, (length,))
        np.testing.assert_array_equal(ids, expected["input_ids"])
        np.testing.assert_array_equal(mask, expected["attention_mask"])
        assert ids[0] == clips.START and ids[mask][-1] == clips.END


def test_tokens_of_plain_words(folder):
    ids, mask = encoder(folder).tokenize("Red ring")
    words = json.loads((folder / "vocab.json").read_text())
    expected = [clips.START, words["red</w>"], words["ring</w>"], clips.END]
    assert ids[:4].tolist() == expected and mask.tolist() == [True] * 4 + [False] * 4


def test_captions_are_tokenized_fast(folder):
    tokenizer = encoder(folder)
    tokenizer.tokenize("")
    start = time.process_time()
    for _ in range(200):
        tokenizer.tokenize("a large red circle in the top left corner, on a light background")
    assert (time.process_time() - start) / 200 < 2e-3  # 40 us on an idle machine


def test_folders_of_stable_diffusion(folder, tmp_path):
    whole, split = encoder(folder), encoder(clips.split(clips.write(tmp_path / "sd")))
    assert [path.read_bytes() for path in split.files()] == [p.read_bytes() for p in whole.files()]
    jax.tree.map(np.testing.assert_array_equal, split.load(), whole.load())
    np.testing.assert_array_equal(split.tokenize("a ring"), whole.tokenize("a ring"))
    assert split.name == str(tmp_path / "sd")
    (tmp_path / "sd" / "tokenizer" / "vocab.json").unlink()
    with pytest.raises(ConfigError, match="text_encoder.path: no vocab.json in .*sd/tokenizer"):
        encoder(tmp_path / "sd").load()


def config_with(folder, **values):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def without(name):
    return lambda folder: (folder / name).unlink()


def change_weights(change):
    def edit(folder):
        state = load_file(folder / "model.safetensors")
        change(state)
        save_file(state, folder / "model.safetensors")

    return edit


NORM = "encoder.layers.0.layer_norm1.weight"


@pytest.mark.parametrize(
    "edit, message",
    [
        (without("config.json"), "text_encoder.path: no config.json in "),
        (without("vocab.json"), "text_encoder.path: no vocab.json in "),
        (without("merges.txt"), "text_encoder.path: no merges.txt in "),
        (without("model.safetensors"), "text_encoder.path: no weights .* in "),
        (lambda f: (f / "config.json").write_text("{"), "text_encoder.path: .*config.json cannot"),
        (lambda f: (f / "vocab.json").write_text("{"), "text_encoder.path: vocab.json or merges"),
        (lambda f: config_with(f, hidden_act="relu"), "text_encoder.path: .*hidden_act 'relu'"),
        (lambda f: config_with(f, vocab_size=20), "text_encoder.path: config.json has 20 tokens"),
        (lambda f: config_with(f, eos_token_id=7), "text_encoder.path: .* and end token 7, but"),
        (lambda f: config_with(f, hidden_size=32), "text_encoder.width: must be 32, .*got 16"),
        (
            lambda f: config_with(f, max_position_embeddings=77),
            "text_encoder.length: must be 77, .*got 8",
        ),
        (
            change_weights(lambda s: s.pop(NORM)),
            "text_encoder.path: weights do not fit: missing blocks.0.norm1.weight",
        ),
        (
            change_weights(lambda s: s.update({"adapter.weight": np.ones(1, np.float32)})),
            "text_encoder.path: no rule for adapter.weight",
        ),
        (lambda f: config_with(f, intermediate_size=8), "text_encoder.path: weights do not fit"),
    ],
)
def test_errors_of_broken_folders_are_one_line(tmp_path, edit, message):
    edit(clips.write(tmp_path))
    with pytest.raises(ConfigError, match=message) as error:
        encoder(tmp_path).load()
        encoder(tmp_path).files()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("path, message", [("", "empty; .* openai/"), ("/no/such", "not exist")])
def test_missing_folders_are_named(path, message):
    with pytest.raises(ConfigError, match=f"text_encoder.path.*{message}"):
        encoder(path).load()


def test_hub_ids_download_only_needed_files(folder, monkeypatch):
    calls = []

    def snapshot_download(source, allow_patterns):
        calls.append((source, allow_patterns))
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    tower = encoder("owner/name")
    tower.files(), tower.load(), tower.tokenize("")
    assert calls == [("owner/name", ["*.safetensors", clip.CONFIG, *clip.WORDS])]


def test_remote_folders_are_copied_for_libraries_that_need_local_ones(folder):
    class Remote(type(folder)):
        def __fspath__(self):
            return f"gs:/{self}"

        def __truediv__(self, name):
            return folder / name

    with encoders.local(Remote(folder), (clip.CONFIG, *clip.WORDS)) as copy:
        assert copy != folder
        assert clip.Size.read(copy) == clip.Size.read(folder)
        assert clip.Tokenizer.read(copy)("a ring", 8)[1].sum() == 4
    with encoders.local(folder, ()) as same:
        assert same == folder
