"""Tiny sources in the formats that the builders read."""

import io
import json
import tarfile
import zipfile

import numpy as np
import scipy.io
from PIL import Image

WNIDS = tuple(f"n{number:08d}" for number in (7, 3, 1, 9, 5, 2, 8, 4, 6, 10))  # unsorted


def pixels(seed, height=20, width=28):
    """Smooth random image (H, W, 3) uint8, which JPEG changes little."""
    small = np.random.default_rng(seed).integers(0, 256, (3, 4, 3), np.uint8)
    return np.asarray(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC))


def encode(image, format="JPEG", **options):
    out = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(
        out, format, **options
    )
    return out.getvalue()


def jpeg(seed, height=20, width=28):
    return encode(pixels(seed, height, width), quality=95)


def tar(members, **options):
    """Bytes of a tar with members (name, data)."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode=options.pop("mode", "w"), **options) as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return out.getvalue()


def devkit(wnids=WNIDS, truth=(1, 2, 3)):
    """ILSVRC2012_devkit_t12.tar.gz, with ids 1, 2, ... in the order of wnids, and a parent."""
    fields = ("ILSVRC2012_ID", "WNID", "words", "gloss", "num_children", "children")
    synsets = np.empty((len(wnids) + 1, 1), [(field, object) for field in fields])
    for row, wnid in enumerate(wnids):
        synsets[row, 0] = (row + 1, wnid, f"thing {wnid[-2:]}, a thing", "gloss", 0, [])
    parent = ("n99999999", "entity", "gloss", len(wnids), list(range(len(wnids))))
    synsets[-1, 0] = (len(wnids) + 1, *parent)
    mat = io.BytesIO()
    scipy.io.savemat(mat, {"synsets": synsets})
    lines = "".join(f"{number}\n" for number in truth).encode()
    root = "ILSVRC2012_devkit_t12"
    return tar(
        [
            (f"{root}/readme.txt", b"read me"),
            (f"{root}/data/meta.mat", mat.getvalue()),
            (f"{root}/data/ILSVRC2012_validation_ground_truth.txt", lines),
        ],
        mode="w:gz",
    )


def class_tar(wnid, n=3):
    return tar((f"{wnid}_{i}.JPEG", jpeg(int(wnid[1:]) * 10 + i)) for i in range(n))


def imagenet1k(folder, n=3, validation=5):
    folder.mkdir(parents=True)
    inner = [(f"{wnid}.tar", class_tar(wnid, n)) for wnid in WNIDS]
    (folder / "ILSVRC2012_img_train.tar").write_bytes(tar(inner))
    images = [(f"ILSVRC2012_val_{i + 1:08d}.JPEG", jpeg(900 + i)) for i in range(validation)]
    (folder / "ILSVRC2012_img_val.tar").write_bytes(tar(images))
    truth = [i % len(WNIDS) + 1 for i in range(validation)]
    (folder / "ILSVRC2012_devkit_t12.tar.gz").write_bytes(devkit(truth=truth))
    return folder


def imagenet22k(folder, classes=30, n=2):
    folder.mkdir(parents=True)
    for number in range(classes):
        wnid = f"n{number:08d}"
        (folder / f"{wnid}.tar").write_bytes(class_tar(wnid, n))
    return folder


def details(key, caption, size, original):
    """JSON values that img2dataset writes for each image."""
    height, width = size
    return {
        "key": key, "caption": caption, "status": "success", "error_message": None,
        "width": width, "height": height,
        "original_width": original[1], "original_height": original[0],
        "exif": "{}", "sha256": "0" * 64, "url": "http://127.0.0.1/x.jpg",
    }  # fmt: skip


def captioned(seed, caption, original=(200, 280), image=None):
    """Tar members of one sample of img2dataset."""
    key = f"{seed:09d}"
    data = jpeg(seed) if image is None else image
    metadata = json.dumps(details(key, caption, (20, 28), original)).encode()
    return [(f"{key}.jpg", data), (f"{key}.txt", caption.encode()), (f"{key}.json", metadata)]


def cc12m(folder, tars=2, n=8):
    folder.mkdir(parents=True)
    words = ("a red house", "a blue boat", "two green trees")
    for number in range(tars):
        seeds = range(number * 100, number * 100 + n)
        members = [m for seed in seeds for m in captioned(seed, f"{words[seed % 3]}, {seed}")]
        (folder / f"{number:05d}.tar").write_bytes(tar(members))
    return folder


def coco(folder, n=4, zipped=False, splits=("val2014",)):
    folder.mkdir(parents=True)
    files = {}  # archive -> {member: data}
    for split in splits:
        names = [f"COCO_{split}_{i:012d}.jpg" for i in range(n)]
        images = [{"id": i, "file_name": name, "height": 20} for i, name in enumerate(names)]
        annotations = [
            {"id": 100 + 5 * i + j, "image_id": i, "caption": f"picture {i} text {j}\n"}
            for j in range(5)
            for i in range(n)
        ]
        captions = json.dumps({"images": images, "annotations": annotations}).encode()
        archive_files = files.setdefault("annotations_trainval2014.zip", {})
        archive_files[f"annotations/captions_{split}.json"] = captions
        files[f"{split}.zip"] = {f"{split}/{name}": jpeg(i) for i, name in enumerate(names)}
    for name, members in files.items():
        if zipped:
            with zipfile.ZipFile(folder / name, "w", zipfile.ZIP_DEFLATED) as archive:
                for member, data in members.items():
                    archive.writestr(member, data)
        else:
            for member, data in members.items():
                (folder / member).parent.mkdir(exist_ok=True)
                (folder / member).write_bytes(data)
    return folder


def classes(folder, names=("cat", "dog"), n=3, splits=("train", "val")):
    """Class folders inside split folders."""
    for s, split in enumerate(splits):
        for c, name in enumerate(names):
            (folder / split / name).mkdir(parents=True)
            for i in range(n):
                data = jpeg(100 * s + 10 * c + i)
                (folder / split / name / f"{i}.jpg").write_bytes(data)
    return folder


def captions(folder, n=4, name="captions.csv"):
    """Images with a list of captions, which have the same words as those of `coco`."""
    folder.mkdir(parents=True)
    for i in range(n):
        (folder / f"{i}.jpg").write_bytes(jpeg(i))
    rows = [{"file_name": f"{i}.jpg", "caption": f"picture {i}, text {n}"} for i in range(n)]
    if name.endswith("jsonl"):
        (folder / name).write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    else:
        lines = [f'{row["file_name"]},"{row["caption"]}"' for row in rows]
        (folder / name).write_text("\n".join(["file_name,caption", *lines]))
    return folder
