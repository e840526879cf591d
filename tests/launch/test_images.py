"""Container images and the Kubernetes job."""

import ast
import json
import re
import subprocess
from pathlib import Path

import pytest
import yaml

from tests.launch.jobs import LAUNCH, ROOT, readme_blocks


def extras():
    """The extras of setup.py."""
    tree = ast.parse((ROOT / "setup.py").read_text())
    (value,) = [
        k.value for k in ast.walk(tree) if isinstance(k, ast.keyword) and k.arg == "extras_require"
    ]
    return ast.literal_eval(value)


@pytest.mark.parametrize("platform", ["gpu", "tpu"])
def test_images_copy_files_that_exist_and_are_not_ignored(platform):
    lines = (LAUNCH / f"Dockerfile.{platform}").read_text().splitlines()
    steps = [line.split(maxsplit=1) for line in lines if line and not line.startswith("#")]
    sources = [s for step, rest in steps if step == "COPY" for s in rest.split()[:-1]]
    ignore = (ROOT / ".dockerignore").read_text().split()
    assert ignore[0] == "*" and {line[1:] for line in ignore if line[0] == "!"} == set(sources)
    assert all((ROOT / source).exists() for source in sources)
    (extra,) = re.findall(r'"\.\[([\w,]+)\]"', "\n".join(lines))
    accelerator, storage = [extras()[name] for name in extra.split(",")]
    assert accelerator == [{"gpu": "jax[cuda12]", "tpu": "jax[tpu]"}[platform]]
    assert storage == ["etils[epath-gcs]"]  # gs://
    assert [step for step, _ in steps][-3:] == ["USER", "ENTRYPOINT", "CMD"]
    assert dict(steps)["USER"] not in ("0", "root")
    assert json.loads(dict(steps)["ENTRYPOINT"]) == ["launch/run.sh", platform]


@pytest.mark.parametrize("platform", ["tpu", "gpu"])
def test_kubernetes_job_of_the_readme(stubs, platform):
    env, calls = stubs
    block = next(b for b in readme_blocks() if "kubectl" in b and f"Dockerfile.{platform}" in b)
    process = subprocess.run(
        ["bash", "-euc", block], env=env, cwd=ROOT, capture_output=True, text=True
    )
    assert process.returncode == 0, process.stderr
    assert [call[:2] for call in calls()] == [
        ["docker", "build"],
        ["docker", "push"],
        ["kubectl", "apply"],
    ]
    job = yaml.safe_load(Path(env["CALLS"] + ".stdin").read_text())
    assert (job["kind"], job["apiVersion"]) == ("JobSet", "jobset.x-k8s.io/v1alpha2")
    assert job["spec"]["failurePolicy"]["maxRestarts"] > 0
    (replicated,) = job["spec"]["replicatedJobs"]
    spec = replicated["template"]["spec"]
    assert spec["completionMode"] == "Indexed" and spec["backoffLimit"] == 0
    hosts = spec["parallelism"]
    assert hosts == spec["completions"] > 1 and replicated["replicas"] == 1
    pod = spec["template"]["spec"]
    assert pod["restartPolicy"] == "Never" and pod["terminationGracePeriodSeconds"] >= 60
    (container,) = pod["containers"]
    assert container["image"] == calls()[1][2]
    (device,) = container["resources"]["limits"]
    assert device == {"tpu": "google.com/tpu", "gpu": "nvidia.com/gpu"}[platform]
    assert all(
        f"gke-{'tpu' if platform == 'tpu' else 'accel'}" in key for key in pod["nodeSelector"]
    )
    command = container["args"]
    assert command[:3] == ["python", "-m", "condiff_jax.main"]
    assert any(arg.startswith("--workdir=gs://") for arg in command)
    name = job["metadata"]["name"]
    if platform == "gpu":  # on TPUs, GKE sets the process index
        assert command[-3:] == [
            f"--coordinator={name}-{replicated['name']}-0-0.{name}:8476",
            f"--processes={hosts}",
            "--process=$(JOB_COMPLETION_INDEX)",  # Kubernetes fills it in
        ]
