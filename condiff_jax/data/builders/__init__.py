"""Builders of mode prepare, which convert downloaded archives to TFDS data sets in array_record.

A builder takes the source folder and returns a `Plan`; `prepare.prepare` executes it.
"""

from condiff_jax.data.builders.cc12m import cc12m
from condiff_jax.data.builders.coco import coco
from condiff_jax.data.builders.folder import folder
from condiff_jax.data.builders.imagenet import imagenet1k, imagenet22k

BUILDERS = {
    "imagenet1k": imagenet1k,
    "imagenet22k": imagenet22k,
    "cc12m": cc12m,
    "coco": coco,
    "folder": folder,
}
