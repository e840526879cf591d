"""Caches of mode encode: equal to encoding during training, and complete after interruptions."""

import functools
import json
import os
import shutil
from pathlib import Path

import cloudpickle
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from array_record.python import array_record_module
from etils import epath

from benchmarks.parity import jit, random_like
from condiff_jax.config.errors import ConfigError
from condiff_jax.data.latent_cache import Cache
from condiff_jax.data.pipeline import Preprocess, batches, first_controls, open_source
from condiff_jax.models import kl
from condiff_jax.models.autoencoder import NETWORKS
from condiff_jax.sampling import sample
from condiff_jax.training import encode, loop, reporters
from condiff_jax.training.reporters import autoencoder
from tests import clips, tiny
from tests.data.builders import archives

IMAGES, VIEWS = 5, 4  # of each cache; views are two crops in both flips


@pytest.fixture(autouse=True, scope="module")
def small():
    """Patch models to few layers and levels, and shards to a few images."""
    with tiny.few_layers(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(encode, "MB", 1000)
        patch.setitem(kl.SIZES, "tiny", kl.Size((8, 16), resnets=1, codes=64))
        yield


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Folders of random autoencoders: kl, vq, and another kl."""
    parent = tmp_path_factory.mktemp("autoencoders")
    out = {}
    for name, kind in (("kl", "kl"), ("vq", "vq"), ("other", "kl")):
        network = NETWORKS[kind](kl.SIZES["tiny"])
        shapes = jax.eval_shape(network.init, jax.random.key(0), jnp.zeros((1, 16, 16, 3)))
        params = jax.device_get(random_like(shapes))
        params = jax.tree.map(lambda a, n=name: a * (1 + (n == "other")), params)
        autoencoder.export(network, params["params"], epath.Path(parent / name))
        out[name] = str(parent / name)
    return out


@pytest.fixture(scope="module")
def config_of(folders):
    def create(name="kl", **overrides):
        fields = {"autoencoder.name": name, "autoencoder.size": "tiny", "model.size": "tiny/2"}
        fields |= {"autoencoder.path": folders[name], "autoencoder.scale": 0.5}
        fields |= {"encode.records": IMAGES, "encode.views": 2, "encode.shard_mb": 13}
        return tiny.config(
            **fields | {"conditioning.control": ("crop", "flip", "size")} | overrides
        )

    return create


@pytest.fixture(scope="module")
def compiled(config_of):
    """A compiled encoder of kl, shared by runs of mode encode."""
    return encode.Encoder(tiny.objective(config_of()))


@pytest.fixture
def encoder(compiled, monkeypatch):
    """Patch mode encode to use the compiled encoder."""
    monkeypatch.setattr(encode, "Encoder", lambda objective: compiled)
    return compiled


@pytest.fixture(scope="module")
def caches(config_of, compiled, tmp_path_factory):
    """Caches written by mode encode: {name: folder}."""
    out = {name: tmp_path_factory.mktemp("cache") / name for name in ("kl", "vq")}
    encode.run(config_of("vq", **{"encode.path": str(out["vq"])}))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encode, "Encoder", lambda objective: compiled)
        encode.run(config_of(**{"encode.path": str(out["kl"])}))
    return out


@pytest.fixture
def cached(config_of, caches):
    """A function that creates configs for training from a cache."""

    def create(name="kl", **overrides):
        fields = {"data.name": "latents", "data.path": str(caches[name])}
        return config_of(name, **fields | overrides)

    return create


def contents(folder):
    return {p.name: p.read_bytes() for p in Path(folder).iterdir()}


def view_of(cache, i, k):
    batch = cache.batch([cache.view(i, k)])
    return batch["moments"][0], {name: value[0] for name, value in batch["control"].items()}


def stacked(examples):
    return jax.tree.map(lambda *rows: np.stack(rows), *examples)


def both_batches(config, cached_config, k, mirrored=0):
    """Batches of crop k of each image, as drawn in training and as cached.

    mirrored: 1 takes the other flip from the cache.
    """
    objective, other = tiny.objective(config), tiny.objective(cached_config)
    settings = (config.data.resolution, config.data.crop, config.data.flip)
    source, cache = open_source(config), open_source(cached_config)
    online, offline = [], []
    for i in range(IMAGES):
        encode_text = objective.encode_text if objective.text_encoder else None
        rng = np.random.default_rng([config.seed, i, k])
        online.append(Preprocess(source, *settings, encode_text).random_map(i, rng))
        flip = int(online[-1]["control"]["flip"]) ^ mirrored
        offline.append(cache.view(i, 2 * k + flip, caption=True))
        if not cache.features and other.text_encoder:
            ids, mask = other.encode_text(offline[-1]["caption"])
            offline[-1] |= {"ids": ids, "mask": mask}
    return stacked(online), cache.batch(offline)


@pytest.mark.parametrize("name", ["kl", "vq"])
def test_loss_equals_that_of_training_on_images(name, config_of, cached):
    objective, other = tiny.objective(config_of(name)), tiny.objective(cached(name))
    online, offline = both_batches(objective.config, other.config, k=1)
    assert {0, 1} == set(online["control"]["flip"].tolist())
    jax.tree.map(np.testing.assert_array_equal, online["control"], offline["control"])
    for field in ("ids", "mask", "label", "broken"):
        np.testing.assert_array_equal(online[field], offline[field])
    assert "image" not in offline and offline["moments"].dtype == np.float16
    params = random_like(objective.shapes)
    frozen = jax.device_get(objective.load_frozen())
    noise = objective.draw_noise(jax.random.key(1), IMAGES)
    noise["t"] = noise["t"] // 10  # at low noise, where x_0 matters
    loss = jit(lambda *inputs: objective.loss(*inputs)[0])
    expected = loss(params, online, noise, frozen)
    # The cache needs no parameters of the autoencoder. Values have float16's 2^-11 of error.
    np.testing.assert_allclose(loss(params, offline, noise, {}), expected, rtol=1e-3)
    _, flipped = both_batches(objective.config, other.config, k=1, mirrored=1)
    assert abs(loss(params, flipped, noise, {}) / expected - 1) > 1e-2
    space = objective.autoencoder
    x0 = jit(space.encode)(frozen["autoencoder"], online["image"], noise["latent"])
    np.testing.assert_allclose(
        space.sample(offline["moments"], noise["latent"]), x0, rtol=2e-3, atol=2e-3
    )


def test_both_flips_equal_those_of_flipped_images(config_of, cached):
    objective = tiny.objective(config_of())
    encode_image = jit(objective.autoencoder.moments)
    params = objective.load_frozen()["autoencoder"]
    online, _ = both_batches(objective.config, cached(), k=0)
    for i, image in enumerate(online["image"]):
        cache = open_source(cached())
        assert cache.views == VIEWS
        upright = image[:, ::-1] if online["control"]["flip"][i] else image
        for flip, view in enumerate((upright, upright[:, ::-1])):
            moments, control = view_of(cache, i, flip)
            expected = encode_image(params, np.ascontiguousarray(view)[None])[0]
            np.testing.assert_allclose(moments, expected, rtol=1e-3, atol=1e-4)
            assert control["flip"] == flip
            assert control["crop_top"] == online["control"]["crop_top"][i]


def test_without_flips_there_are_none(config_of, tmp_path):
    fields = {"data.flip": False, "encode.path": str(tmp_path / "c"), "encode.records": 2}
    encode.run(config_of(**fields))
    cache = Cache(tmp_path / "c")
    assert cache.views == 2
    controls = [view_of(cache, 0, k)[1] for k in range(2)]
    assert all(control["flip"] == 0 for control in controls)
    assert controls[0]["crop_left"] != controls[1]["crop_left"]


def test_the_stream_depends_on_seed_and_number_alone(cached):
    def stream(seed=0, **hosts):
        config = cached(seed=seed)
        return batches(config, open_source(config), tiny.objective(config).encode_text, **hosts)

    data = stream()
    seen = [next(data) for _ in range(4)]
    again, parts = stream(), [stream(process=p, processes=2) for p in (0, 1)]
    for batch in seen:
        jax.tree.map(np.testing.assert_array_equal, batch, next(again))
        halves = [next(part)["moments"] for part in parts]
        np.testing.assert_array_equal(batch["moments"], np.concatenate(halves))
    jax.tree.map(np.testing.assert_array_equal, seen[2], next(stream(first=2)))
    other = next(stream(seed=1))
    assert not np.array_equal(other["moments"], seen[0]["moments"])
    drawn = {m.tobytes() for batch in seen for m in batch["moments"]}
    assert len(drawn) > 0.8 * IMAGES * VIEWS  # 64 draws nearly always have all views


@pytest.mark.parametrize("semantics", ["text", "class"])
def test_vocabulary_and_records_are_the_same_as_without_the_cache(semantics, config_of, cached):
    fields = {"data.semantics": semantics}
    images, latents = open_source(config_of(**fields)), open_source(cached(**fields))
    assert (
        tiny.objective(cached(**fields)).vocabulary
        == tiny.objective(config_of(**fields)).vocabulary
    )
    for i in range(IMAGES):
        assert latents[i]["label"] == images[i]["label"]
        assert latents[i]["caption"] == images[i]["caption"]
    assert list(latents.captions()) == [images[i]["caption"] for i in range(IMAGES)]
    copy = cloudpickle.loads(cloudpickle.dumps(latents))  # as in worker processes
    np.testing.assert_array_equal(view_of(copy, 4, 3)[0], view_of(latents, 4, 3)[0])


class Killed(BaseException):
    pass


def test_caches_are_the_same_after_a_kill_at_any_rename(
    encoder, config_of, caches, tmp_path, monkeypatch
):
    whole, replace = contents(caches["kl"]), os.replace
    assert len(whole) == 3  # two shards and the manifest
    for last in range(8):
        out, renamed = tmp_path / str(last), []

        def rename(source, target, last=last, renamed=renamed):
            if len(renamed) == last:
                raise Killed
            renamed.append(Path(target).name)
            replace(source, target)

        config = config_of(**{"encode.path": str(out)})
        monkeypatch.setattr(os, "replace", rename)
        if last == 7:  # begun.json, 2 shards, 2 ledgers, the manifest and its move
            encode.run(config)
            assert contents(out) == whole
            break
        with pytest.raises(Killed):
            encode.run(config)
        monkeypatch.setattr(os, "replace", replace)
        with pytest.raises(ConfigError, match="data.path: .*is not finished; run mode encode ag"):
            open_source(config_of(**{"data.name": "latents", "data.path": str(out)}))
        if last:  # a begun cache is not resumed with other settings
            with pytest.raises(ConfigError, match="encode.path: .* another seed "):
                encode.run(config_of(seed=1, **{"encode.path": str(out)}))
        finished = list((out / ".encode").glob("0*.json"))
        read = []
        monkeypatch.setattr(encode.ReadRecord, "__call__", counting(read))
        encode.run(config)
        monkeypatch.undo()
        monkeypatch.setattr(encode, "Encoder", lambda objective: encoder)
        assert contents(out) == whole
        assert len(set(read)) == IMAGES - (0, 2, 5)[len(finished)]


def counting(numbers, call=encode.ReadRecord.__call__):
    def read(self, i):
        numbers.append(i)
        return call(self, i)

    return read


def test_each_host_writes_its_shards_and_the_first_the_manifest(
    encoder, config_of, caches, tmp_path, monkeypatch
):
    config = config_of(**{"encode.path": str(tmp_path / "c")})
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(encode, "barrier", lambda name: None)
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    encode.run(config)
    assert contents_names(tmp_path / "c") == {".encode", "00001-of-00002.array_record"}
    monkeypatch.setattr(jax, "process_index", lambda: 0)
    encode.run(config)
    assert contents(tmp_path / "c") == contents(caches["kl"])


def contents_names(folder):
    return {path.name for path in folder.iterdir()}


def test_a_finished_cache_is_left_alone(config_of, caches, capsys):
    before = contents(caches["kl"])
    encode.run(config_of(**{"encode.path": str(caches["kl"])}))
    assert "Nothing to do" in capsys.readouterr().out
    for fields in ({"seed": 1}, {"encode.views": 1}, {"data.crop": (0.5, 1.0)}):
        (field,) = fields
        with pytest.raises(ConfigError, match=f"^encode.path: .* another {field} ") as error:
            encode.run(config_of(**{"encode.path": str(caches["kl"])} | fields))
        assert "\n" not in str(error.value)
    assert contents(caches["kl"]) == before


def test_a_full_disk_is_one_line(encoder, config_of, tmp_path, monkeypatch):
    class Full(array_record_module.ArrayRecordWriter):
        def close(self):
            super().close()
            raise RuntimeError("write() failed: No space left on device")

    monkeypatch.setattr(array_record_module, "ArrayRecordWriter", Full)
    with pytest.raises(ConfigError, match="^encode.path: write.. failed: No space left"):
        encode.run(config_of(**{"encode.path": str(tmp_path / "c")}))


def test_another_data_set_of_the_same_size_is_refused(encoder, config_of, tmp_path):
    fields = {"data.name": "webdataset", "encode.path": str(tmp_path / "c"), "encode.records": 0}
    for name, side in (("a", 20), ("b", 300)):
        (tmp_path / name).mkdir()
        files = [(f"{i}.jpg", archives.jpeg(i, side, side)) for i in range(2)]
        (tmp_path / name / "0.tar").write_bytes(archives.tar(files))
    encode.run(config_of(**fields, **{"data.path": str(tmp_path / "a")}))
    (tmp_path / "a").rename(tmp_path / "moved")
    encode.run(config_of(**fields, **{"data.path": str(tmp_path / "moved")}))
    with pytest.raises(ConfigError, match="another data.path .sha256 .*, not sha256"):
        encode.run(config_of(**fields, **{"data.path": str(tmp_path / "b")}))


class SomeBroken:
    """Records of shapes; number 1 is broken and replaced by the next one."""

    def __init__(self, source):
        self.source, self.classes = source, source.classes

    def __len__(self):
        return IMAGES

    def __getitem__(self, i):
        return self.source[i + (i == 1)] | {"broken": np.int32(i == 1)}


def test_broken_images_are_skipped_and_counted(encoder, config_of, tmp_path):
    config = config_of(**{"encode.records": 0})
    objective, source = tiny.objective(config), open_source(config)
    manifest = encode.encode(objective, SomeBroken(source), tmp_path / "c")
    assert (manifest["pictures"], manifest["broken"]) == (IMAGES - 1, 1)
    cache = Cache(tmp_path / "c")
    expected = [source[i]["caption"] for i in (0, 2, 3, 4)]
    assert [cache[i]["caption"] for i in range(len(cache))] == expected


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"data.resolution": 32}, "data.resolution: is 32, but .* encoded with 16"),
        ({"data.crop": (0.4, 0.6)}, "data.crop: is .*0.4, 0.6.* encoded with .*0.9, 1.0"),
        ({"data.flip": False}, "data.flip: is False"),
        ({"autoencoder.path": "other"}, "autoencoder.path: is sha256 .* with sha256"),
        ({"autoencoder.name": "vq"}, "autoencoder.name: is vq, but"),
        ({"data.path": "/no/such"}, "data.path: /no/such does not exist; mode encode makes it"),
        ({"data.path": ""}, "data.path: empty, but data.name=latents"),
        ({"autoencoder.name": "pixels"}, "autoencoder.name: data.name=latents needs kl or vq"),
        ({"objective": "reconstruction"}, "data.name: .* needs images, no latents"),
    ],
)
def test_a_cache_with_other_settings_is_refused_before_training(
    fields, message, cached, folders, tmp_path
):
    if "autoencoder.path" in fields:
        fields = {"autoencoder.path": folders["other"]}
    with pytest.raises(ConfigError, match=message) as error:
        loop.run(cached(**fields), str(tmp_path / "run"))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run" / "config.json").exists()


def test_rows_of_a_batch_belong_to_one_image(cached):
    """Each row has the label, the caption and one view of the same image."""
    config = cached(seed=3)
    source, encode_text = open_source(config), tiny.objective(config).encode_text
    batch = next(batches(config, source, encode_text))
    expected = {}
    for i in range(IMAGES):
        for k in range(VIEWS):
            moments, control = view_of(source, i, k)
            expected[moments.tobytes()] = (source[i], control)
    assert len(expected) == IMAGES * VIEWS
    for row, moments in enumerate(batch["moments"]):
        record, control = expected[moments.tobytes()]
        assert batch["label"][row] == record["label"]
        np.testing.assert_array_equal(batch["ids"][row], encode_text(record["caption"])[0])
        assert {name: values[row] for name, values in batch["control"].items()} == control
    controls = first_controls(config, source, 16)
    np.testing.assert_array_equal(controls.T, list(batch["control"].values()))


def test_damaged_views_are_skipped_and_counted(caches, tmp_path):
    out = shutil.copytree(caches["kl"], tmp_path / "c")
    whole = Cache(out)
    shard = out / "00000-of-00002.array_record"
    contents = bytearray(shard.read_bytes())
    contents[contents.index(whole.view(1, 2)["view"]) + 99] ^= 0xFF  # breaks its checksum
    shard.write_bytes(contents)
    damaged = Cache(out)
    batch = damaged.batch([damaged.view(i, 2) for i in range(IMAGES)])
    assert batch["broken"].tolist() == [0, 1, 0, 0, 0]
    np.testing.assert_array_equal(batch["moments"][1], view_of(whole, 1, 3)[0])
    # Other views are not affected by earlier reads, so that a resumed run gets the same batches.
    assert [int(damaged.view(1, k)["broken"]) for k in range(VIEWS)] == [0, 0, 1, 0]


def test_damaged_caches_are_refused(caches, tmp_path):
    out = shutil.copytree(caches["kl"], tmp_path / "c")
    (out / "00001-of-00002.array_record").unlink()
    with pytest.raises(FileNotFoundError, match="00001-of-00002.array_record is missing"):
        Cache(out)
    manifest = json.loads((out / "manifest.json").read_text())
    manifest["settings"]["format"] = 1
    texts = (json.dumps(manifest), "of another version"), ("{", "cannot be read")
    for text, message in (*texts, ("{}", "holds no cache")):
        (out / "manifest.json").write_text(text)
        with pytest.raises(ValueError, match=message):
            Cache(out)
    with pytest.raises(ValueError, match="has no validation split"):
        Cache(caches["kl"], "validation")


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"encode.path": ""}, "encode.path: empty; mode encode needs it"),
        ({"autoencoder.name": "pixels"}, "autoencoder.name: mode encode needs kl or vq"),
        ({"encode.records": 0}, "encode.records: 0 is all, but shapes is endless"),
        ({"data.name": "latents", "data.path": "x"}, "data.name: latents are encoded"),
        ({"encode.text": True}, "encode.text: needs .*text_encoder.name=clip"),
        ({"autoencoder.path": "/no/such"}, "^autoencoder.path: /no/such does not exist"),
        ({"encode.path": "FULL"}, "encode.path: .* holds other files"),
        ({"encode.views": 0}, "encode.views: must be at least 1"),
    ],
)
def test_bad_fields_of_mode_encode_are_named(fields, message, config_of, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    fields = {k: str(tmp_path / "full") if v == "FULL" else v for k, v in fields.items()}
    with pytest.raises(ConfigError, match=message):
        encode.run(config_of(**{"encode.path": str(tmp_path / "c")} | fields))


def test_moments_beyond_float16_are_refused(encoder, config_of, tmp_path, monkeypatch):
    params = jax.tree.map(lambda a: np.asarray(a) * np.float32(1e5), encoder.params)
    monkeypatch.setattr(encoder, "params", jax.device_put(params))
    with pytest.raises(ConfigError, match="autoencoder.path: its moments are not finite"):
        encode.run(config_of(**{"encode.path": str(tmp_path / "c")}))


def test_text_features_replace_captions(config_of, tmp_path):
    clip = clips.write(tmp_path / "clip", num_hidden_layers=1)
    fields = {"text_encoder.name": "clip", "text_encoder.path": str(clip), "encode.text": True}
    config = config_of(**fields | {"encode.path": str(tmp_path / "c")})
    encode.run(config)
    latents = {"data.name": "latents", "data.path": str(tmp_path / "c")}
    online, offline = both_batches(config, config_of(**fields | latents), k=0)
    assert "ids" not in offline and offline["tokens"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(online["mask"], offline["mask"])
    assert not offline["tokens"][~offline["mask"]].any()
    objective = tiny.objective(config)
    noise = np.random.default_rng(0).normal(size=offline["tokens"].shape).astype(np.float32)
    frozen = objective.load_frozen()
    expected = jit(objective.condition)(frozen, online, noise).semantics
    actual = jit(objective.condition)({}, offline, noise).semantics
    np.testing.assert_allclose(actual.tokens, expected.tokens, rtol=2**-7, atol=2**-7)
    np.testing.assert_allclose(actual.pooled, expected.pooled, rtol=2**-8, atol=2**-8)
    assert actual.tokens.dtype == expected.tokens.dtype
    other = clips.write(tmp_path / "other", seed=1, num_hidden_layers=1)
    with pytest.raises(ConfigError, match="text_encoder.path: is sha256"):
        loop.run(
            config_of(**fields | latents | {"text_encoder.path": str(other)}), str(tmp_path / "run")
        )
    words = config_of(**latents)  # word embeddings need the captions
    assert "ids" in next(batches(words, open_source(words), tiny.objective(words).encode_text))


def test_trains_resumes_and_samples_from_a_cache(cached, tmp_path, monkeypatch):
    fields = {"model.name": "dit_ln", "data.semantics": "class", "steps": 3}
    config = cached(**fields, **{"checkpoint.every": 2, "log.every": 1})
    few = functools.partial(loop.first_controls, n=16)
    monkeypatch.setattr(loop, "first_controls", few)
    programs = []  # both runs use the same program, compiled once
    compile_step = loop.compile_step

    def compiled_once(*inputs):
        programs.append(programs[0] if programs else compile_step(*inputs))
        return programs[0]

    monkeypatch.setattr(loop, "compile_step", compiled_once)
    # Skip the final grid, as images are sampled below.
    monkeypatch.setattr(reporters.diffusion.Reporter, "finish", lambda *_: None)
    assert loop.run(config, str(tmp_path))
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    shutil.rmtree(tmp_path / "checkpoints" / "3")  # as if it had been killed in step 3
    assert loop.run(config, str(tmp_path))
    again = (tmp_path / "metrics.jsonl").read_text().splitlines()
    losses = [[json.loads(line)["loss"] for line in part] for part in (lines, again)]
    assert len(losses[0]) == 3 and losses[0] == losses[1]
    out = sample.run(cached(**fields, **{"sampling.labels": (1, 2)}), str(tmp_path))
    assert len(list(out.glob("0*.png"))) == 4
