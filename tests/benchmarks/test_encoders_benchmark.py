"""benchmarks.encoders, on tiny random encoders."""

import diffusers
import pytest
import torch

from benchmarks import encoders
from tests import clips

VAE = dict(
    down_block_types=["DownEncoderBlock2D"] * 2,
    up_block_types=["UpDecoderBlock2D"] * 2,
    block_out_channels=(8, 16),
    layers_per_block=1,
    latent_channels=3,
    norm_num_groups=2,
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Arguments for a CLIP and an autoencoder, as their libraries write them."""
    clip = clips.write(tmp_path_factory.mktemp("clip"), max_position_embeddings=77)
    vae = tmp_path_factory.mktemp("vae")
    torch.manual_seed(0)
    diffusers.AutoencoderKL(**VAE).save_pretrained(vae)
    return [f"--clip={clip}", f"--vae={vae}", "--side=16"]


def test_equal_encoders_pass(folders, capsys):
    assert encoders.main(folders) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines[:-1]] == [
        ["clip", "tokens"],
        ["clip", "pooled"],
        ["vae", "moments"],
        ["vae", "pictures"],
    ]
    assert lines[-1].startswith("equal to the originals: largest relative error")


def test_other_numbers_fail(folders, capsys, monkeypatch):
    monkeypatch.setattr(encoders, "LIMIT", 0.0)
    assert encoders.main(folders[:1]) == 1
    assert "NOT equal" in capsys.readouterr().out


def test_unreadable_folders_are_one_line(capsys, tmp_path):
    clips.write(tmp_path)
    (tmp_path / "merges.txt").unlink()
    for argument in ("--clip=/no/such", "--vae=/no/such", f"--clip={tmp_path}"):
        assert encoders.main([argument]) == 2
        assert capsys.readouterr().err.splitlines()[-1].startswith("error: ")
    with pytest.raises(SystemExit):
        encoders.main([])
