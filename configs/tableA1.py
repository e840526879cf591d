"""Table A1: parameters and forward GFLOP of the architectures; shown by `--mode=report`.

--config=configs/tableA1.py:arch=pixart,data=cc12m,resolution=512
"""

from configs import base, recipes

HEADINGS = ("parameters (M)", "forward GFLOP")
_CELLS = {  # the paper gives parameters once per model
    "arch=unet,data=imagenet1k,resolution=256": (401.75, 95.38),
    "arch=unet,data=imagenet1k,resolution=512": (401.75, 390),
    "arch=pixart,data=imagenet1k,resolution=256": (611.7, 275.14),
    "arch=pixart,data=imagenet1k,resolution=512": (611.7, 1200),
    "arch=mmdit,data=imagenet1k,resolution=256": (679.09, 237.93),
    "arch=mmdit,data=imagenet1k,resolution=512": (679.09, 1050),
    "arch=dit_att,data=imagenet1k,resolution=256": (792.44, 237.93),
    "arch=dit_att,data=imagenet1k,resolution=512": (792.44, 1050),
    "arch=mdtv2,data=imagenet1k,resolution=256": (748.07, 259.08),
    "arch=mdtv2,data=imagenet1k,resolution=512": (748.07, 1140),
    "arch=dit_ln,data=imagenet1k,resolution=256": (679.09, 237.4),
    "arch=dit_ln,data=imagenet1k,resolution=512": (679.09, 1050),
    "arch=unet,data=cc12m,resolution=256": (864.31, 189.78),
    "arch=unet,data=cc12m,resolution=512": (864.31, 819.56),
    "arch=pixart,data=cc12m,resolution=256": (610.12, 314.68),
    "arch=pixart,data=cc12m,resolution=512": (610.12, 1140),
    "arch=mmdit,data=cc12m,resolution=256": (791.64, 397.06),
    "arch=mmdit,data=cc12m,resolution=512": (791.64, 1260),
    "arch=dit_att,data=cc12m,resolution=256": (940.49, 407.88),
    "arch=dit_att,data=cc12m,resolution=512": (940.49, 1500),
}
PAPER = {row: dict(zip(HEADINGS, cells, strict=True)) for row, cells in _CELLS.items()}
ROWS = tuple(PAPER)
NOTES = (
    "GFLOP count a multiply-add as 2, as the paper's figure for DiT-XL/2 does; one image once.",
    "Parameters leave out the paper's position table (1.18 M), a constant here; E_h and E_l are "
    "two MLPs, which adds as much.",
    "unet, imagenet1k: the size is LDM-4's, as Sec. 3.1 says, and has the paper's parameters. Its "
    "GFLOP are 1.9 times ours; nearest comes LDM-4 on its own 64 x 64 latents with a multiply-add "
    "as 1 (104.2, of which attention's products are 4.5). The paper gives no channels or levels.",
    "unet, cc12m: Stable Diffusion 1.5's size, as the parameters tell; no layout is given.",
    "dit_att: the paper gives no formula. Ours is DiT with cross-attention in every block, "
    "4 D^2 = 5.3 M a layer. Its GFLOP for classes equal mmDiT's, so its attention is likely joint.",
    "mmdit, cc12m: the paper's GFLOP are those of 154 text tokens within 2.3% (388.5 and 1230.8); "
    "77 is what Sec. 3.1 says and what we count.",
    "pixart, cc12m: at 512 the paper has less than for classes, though 77 tokens are more than "
    "one; the cell at 256 is likely that of more text tokens as well.",
)


def get_config(args: str | None = None):
    """Arguments: arch, data (imagenet1k | cc12m), resolution (256 | 512), scale."""
    row = base.arguments(args, arch="ours", data="imagenet1k", resolution=256, scale="paper")
    init = "low_res" if row.resolution == 512 else "none"
    return recipes.scaled(recipes.paper(row.arch, row.data, row.resolution, init), row.scale)
