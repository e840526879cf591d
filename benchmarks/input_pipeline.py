"""Speed of the input pipeline: `python -m benchmarks.input_pipeline [--cores=0,1] [--save]`.

The images are noise with the spectrum of photographs: `imagenet` of about 500 x 375 pixels and
`cc12m` with short sides of 1024 to 1536, which mode prepare turns into TFDS data sets. Bare Pillow,
our parts, and PyTorch's loader with the same work are timed in turn, several times; then caches of
random latents, against bare array_record reading the same views. Rates are per second of CPU time,
of all threads and worker processes: images/s per core.
"""

from __future__ import annotations

import importlib.metadata
import io
import itertools
import json
import math
import os
import platform
import subprocess
import tempfile
import time
from collections.abc import Callable
from multiprocessing import active_children
from pathlib import Path

import numpy as np
import torch
from absl import app, flags, logging
from PIL import Image

from condiff_jax.conditioning.control import scalar_names
from condiff_jax.data.augment import CROPS
from condiff_jax.data.builders.prepare import prepare
from condiff_jax.data.builders.shards import write_json, write_shard
from condiff_jax.data.latent_cache import FORMAT, MANIFEST, Cache, pack
from condiff_jax.data.pipeline import Preprocess, batches
from condiff_jax.data.tfds_source import TFDS
from condiff_jax.objectives.validate import create_config
from configs import base

RESULTS = Path(__file__).parent / "results" / "input_pipeline.json"
# name: (images, short sides in pixels, JPEG quality); all are 4:3, landscape or portrait
SETS = {"imagenet": (48, (340, 400), 92), "cc12m": (12, (1024, 1536), 90)}
RESOLUTIONS = (256, 512)
CROP = CROPS["global"]
BATCH = 4
RECORDS = 60_000  # apparent size of a set: grain's shuffle is slow for few records
# Batches to take before a measurement, for each worker: up to about 16 wait in grain's queues, and
# reading those costs nothing more.
BUFFERED = 20
WORKERS = (0, 2)
MEMORY = (50_000, 5_000, 100)  # images, images between two measurements, images per batch
LATENTS = {256: (32, 32, 8), 512: (64, 64, 8)}  # resolution: shape of the moments
CACHE = (256, 8, 256, 8192)  # images, views of each, images per batch, images in a repetition
PACKAGES = ("pillow", "simplejpeg", "opencv-python-headless", "grain", "array_record",
            "tensorflow_datasets", "numpy", "torch")  # fmt: skip
FLAGS = flags.FLAGS


def photo(seed: int, short: tuple[int, int]) -> Image.Image:
    """An image whose amplitudes fall as 1 / frequency^1.2, nearly gray, as photographs are."""
    rng = np.random.default_rng(seed)
    side = int(rng.integers(short[0], short[1] + 1))
    h, w = (side, 4 * side // 3) if rng.random() < 0.75 else (4 * side // 3, side)
    frequency = np.hypot(np.fft.fftfreq(h)[:, None], np.fft.rfftfreq(w)[None])
    frequency[0, 0] = np.inf  # no mean
    fields = [np.fft.irfft2(np.fft.rfft2(rng.normal(size=(h, w))) / frequency**1.2, s=(h, w))
              for _ in range(4)]  # fmt: skip
    gray, *tints = (field / field.std() for field in fields)
    pixels = 118 + 52 * np.stack([gray + 0.35 * tint for tint in tints], -1)
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def make_set(folder: Path, count: int, short: tuple[int, int], quality: int) -> list[bytes]:
    """Write a TFDS data set folder/out by mode prepare; return the bytes of its image files."""
    classes = folder / "in" / "noise"
    classes.mkdir(parents=True)
    for seed in range(count):
        photo(seed, short).save(classes / f"{seed:03d}.jpg", quality=quality)
    prepare("folder", folder / "in", folder / "out", processes=1)
    return [path.read_bytes() for path in sorted(classes.iterdir())]


class Repeated(TFDS):
    """A TFDS data set that repeats its few records."""

    def __len__(self):
        return RECORDS

    def _record(self, i: int) -> dict:
        return super()._record(i % super().__len__())


class RepeatedCache(Cache):
    """A cache that repeats the views of its few images."""

    def __len__(self):
        return RECORDS

    def _read(self, i: int, number: int) -> bytes:
        return super()._read(i % super().__len__(), number)


def make_cache(folder: Path, shape: tuple[int, int, int]) -> None:
    """Write a cache of random moments in the format of mode encode."""
    rng, (n_images, views, _, _) = np.random.default_rng(0), CACHE
    controls = [
        {name: np.float32(rng.random()) for name in scalar_names(jitter=False)}
        for _ in range(views)
    ]
    records = itertools.chain.from_iterable(
        pack({"label": i, "caption": f"number {i}", "controls": controls,
              "moments": rng.normal(size=(views, *shape)).astype(np.float16)})
        for i in range(n_images)
    )  # fmt: skip
    folder.mkdir(parents=True)
    write_shard(folder / "0.array_record", next(records), records, math.inf)
    manifest = {"moments": shape, "features": None, "views": views, "classes": ["0"], "words": [],
                "shards": [{"name": "0.array_record", "pictures": n_images}],
                "settings": {"format": FORMAT}}  # fmt: skip
    write_json(folder / MANIFEST, manifest)


def pipeline_config(
    resolution: int, path: Path, workers: int, name: str = "tfds", batch: int = BATCH
):
    """The config of `batches`."""
    values = base.get_config()
    values.batch_size = batch
    values.data.name, values.data.path = name, str(path)
    values.data.resolution, values.data.workers = resolution, workers
    return create_config(values)


def draw(rng: np.random.Generator, width: int, height: int) -> tuple[int, int, int, bool]:
    """Side, left, top and flip of a crop, distributed as in `augment`."""
    side = round(rng.uniform(*CROP) * min(height, width))
    top, left = (int(rng.integers(n - side + 1)) for n in (height, width))
    return side, left, top, rng.random() < 0.5


def pillow_example(data: bytes, rng: np.random.Generator, resolution: int) -> np.ndarray:
    """Decode, crop and resize with Pillow, as a usual training script: (R, R, 3) uint8."""
    image = Image.open(io.BytesIO(data)).convert("RGB")
    side, left, top, flip = draw(rng, *image.size)
    image = image.crop((left, top, left + side, top + side))
    image = image.resize((resolution, resolution), Image.Resampling.BICUBIC)
    return np.array(image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip else image)


class ImageFiles(torch.utils.data.Dataset):
    """`pillow_example` of files in memory, for PyTorch's loader."""

    def __init__(self, files: list[bytes], resolution: int):
        self.files, self.resolution = files, resolution

    def __len__(self):
        return RECORDS

    def __getitem__(self, i: int) -> torch.Tensor:
        rng = np.random.default_rng(i)
        return torch.from_numpy(
            pillow_example(self.files[i % len(self.files)], rng, self.resolution)
        )


def decode_all(files: list[bytes], scale: int) -> None:
    """Decode with bare Pillow, to RGB arrays of a `scale`-th of the size."""
    for data in files:
        image = Image.open(io.BytesIO(data))
        if scale > 1:
            image.draft("RGB", (image.width // scale, image.height // scale))
        np.asarray(image.convert("RGB"))


def scale_of(files: list[bytes], resolution: int) -> int:
    """The largest scale that keeps all of the images' short sides at the resolution."""
    short = min(min(Image.open(io.BytesIO(data)).size) for data in files)
    return max(s for s in (1, 2, 4, 8) if s == 1 or short >= s * resolution)


def methods(path: Path, files: list[bytes], resolution: int) -> dict[str, tuple[Callable, int]]:
    """name -> (a function that reads that many images, how many to read before it is timed)."""
    source, scale = Repeated(path), scale_of(files, resolution)
    process = Preprocess(source, resolution, CROP, True)
    rng = np.random.default_rng(0)

    def loop(read_all: Callable) -> tuple[Callable, int]:
        return lambda n: [read_all() for _ in range(n // len(files))], 0

    def take(iterator, workers: int) -> tuple[Callable, int]:
        ahead = BUFFERED * max(1, workers) * BATCH
        return lambda n: [next(iterator) for _ in range(n // BATCH)], ahead

    table = {
        "Pillow: decode": loop(lambda: decode_all(files, 1)),
        f"Pillow: decode at 1/{scale}": loop(lambda: decode_all(files, scale)),
        "Pillow: decode, crop, resize": loop(
            lambda: [pillow_example(f, rng, resolution) for f in files]
        ),
        "ours: read, decode, crop, resize": loop(
            lambda: [process.random_map(i, rng) for i in range(len(files))]
        ),
    }
    for workers in WORKERS:
        ours = batches(pipeline_config(resolution, path, workers), source)
        table[f"ours: batches, {workers} workers"] = take(ours, workers)
        theirs = torch.utils.data.DataLoader(
            ImageFiles(files, resolution), BATCH, shuffle=True, num_workers=workers,
            multiprocessing_context="spawn" if workers else None,
        )  # fmt: skip
        table[f"torch: DataLoader, {workers} workers"] = take(iter(theirs), workers)
    return table


def cpu_seconds() -> float:
    """CPU seconds so far of all threads of this process and its worker processes."""
    ticks = 0
    for child in active_children():
        fields = Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return time.process_time() + ticks / os.sysconf("SC_CLK_TCK")


def mebibytes() -> int:
    """Memory that this process and its worker processes hold, each counted in full."""
    pids = [os.getpid(), *(child.pid for child in active_children())]
    pages = sum(int(Path(f"/proc/{pid}/statm").read_text().split()[1]) for pid in pids)
    return pages * os.sysconf("SC_PAGE_SIZE") // 2**20


def timed(read: Callable, images: int, ahead: int) -> tuple[float, float]:
    """Images per second of CPU time and of wall time, with empty queues at both ends."""
    read(ahead)
    start, used = time.perf_counter(), cpu_seconds()
    read(images)
    rates = images / (cpu_seconds() - used), images / (time.perf_counter() - start)
    busy = True
    while ahead and busy:  # until the queues are full again, so that the next method is timed alone
        before = cpu_seconds()
        time.sleep(0.3)
        busy = cpu_seconds() - before > 0.03
    return rates


def measure(table: dict[str, tuple[Callable, int]], images: int, bare: str) -> list[dict]:
    """A row for each method: median, extremes, and the rate relative to that of `bare`."""
    runs = {method: [] for method in table}
    for repetition in range(FLAGS.repetitions + 1):
        for method, (read, ahead) in table.items():
            rates = timed(read, images, ahead)
            if repetition:  # the first warms up
                runs[method].append(rates)
    limit = np.array([cpu for cpu, _ in runs[bare]])
    rows = []
    for method, rates in runs.items():
        cpu, wall = np.array(rates).T
        rows.append({
            "method": method,
            "per_core": float(np.median(cpu)), "least": float(cpu.min()), "most": float(cpu.max()),
            "of_limit": float(np.median(cpu / limit)), "per_second": float(np.median(wall)),
        })  # fmt: skip
    return rows


def compare(name: str, path: Path, files: list[bytes], resolution: int) -> list[dict]:
    """Rows of `measure` for an image data set."""
    images = FLAGS.images // (4 if name == "cc12m" else 1) // len(files) * len(files)
    return measure(methods(path, files, resolution), images, "Pillow: decode")


def latents(path: Path) -> list[dict]:
    """Rows of `measure` for a cache."""
    n_images, views, batch, images = CACHE
    source = RepeatedCache(path)
    shard, _ = source._shards.find(0)
    order = np.random.default_rng(0).permutation(n_images * (1 + views)).tolist()

    def bare(n: int) -> None:
        for i in range(n):
            shard.read([order[i % len(order)]])

    table = {"array_record: read": (bare, 0)}
    for workers in WORKERS:
        stream = batches(pipeline_config(256, path, workers, batch=batch), source)
        read = lambda n, stream=stream: [next(stream) for _ in range(n // batch)]  # noqa: E731
        table[f"ours: batches, {workers} workers"] = read, BUFFERED * max(1, workers) * batch
    return measure(table, images, "array_record: read")


def memory(folder: Path, workers: int) -> list[int]:
    """MiB that all processes hold after each part of a long run over small images."""
    images, every, batch = MEMORY
    stream = batches(
        pipeline_config(32, folder / "out", workers, batch=batch), Repeated(folder / "out")
    )
    held = []
    for number in range(1, (images + every) // batch + 1):  # the first part warms up
        next(stream)
        if number * batch % every == 0:
            held.append(mebibytes())
    return held


def surroundings() -> dict:
    """Hardware, versions and commit of the measurement."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=RESULTS.parent, capture_output=True, text=True
    )
    return {
        "cpu": model,
        "cores": sorted(os.sched_getaffinity(0)),
        "load": os.getloadavg(),
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
        "commit": commit.stdout.strip(),
    }


def show(title: str, rows: list[dict], limit: str) -> list[dict]:
    """Print rows of `measure`; return them with their title."""
    print(f"{title:<36}{'images/s per core':>24}{f'of {limit}':>12}{'images/s':>12}")
    for row in rows:
        spread = f"{row['per_core']:.0f} ({row['least']:.0f}-{row['most']:.0f})"
        print(f"{row['method']:<36}{spread:>24}{row['of_limit']:>12.0%}{row['per_second']:>12.0f}",
              flush=True)  # fmt: skip
    return [{"set": title, **row} for row in rows]


def main(_) -> None:
    """Print the tables; with --save, write RESULTS."""
    logging.set_verbosity(logging.WARNING)
    if FLAGS.cores:
        os.sched_setaffinity(0, map(int, FLAGS.cores))
    torch.set_num_threads(1)
    record, rows, held = surroundings(), [], {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_set(folder / "small", 100, (60, 70), 90)
        for workers in WORKERS:
            held[f"{workers} workers"] = memory(folder / "small", workers)
            print(f"Memory every {MEMORY[1]} images, {workers} workers, MiB: "
                  f"{', '.join(map(str, held[f'{workers} workers']))}")  # fmt: skip
        for resolution, shape in LATENTS.items():
            make_cache(folder / str(resolution), shape)
            measured = latents(folder / str(resolution))
            rows += show(f"latents, {resolution} px", measured, "read")
        for name, arguments in SETS.items():
            files = make_set(folder / name, *arguments)
            print(f"{name}: {len(files)} images, {sum(map(len, files)) // len(files) // 1000} kB")
            for resolution in RESOLUTIONS:
                measured = compare(name, folder / name / "out", files, resolution)
                rows += show(f"{name}, {resolution} px", measured, "decode")
    record |= {"rows": rows, "memory_mib": held}
    if FLAGS.save:
        RESULTS.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    flags.DEFINE_list("cores", [], "cores to run on; all by default")
    flags.DEFINE_integer("images", 480, "images in a repetition; of cc12m a quarter")
    flags.DEFINE_integer("repetitions", 5, "repetitions of every measurement")
    flags.DEFINE_bool("save", False, f"write {RESULTS.name}")
    app.run(main)
