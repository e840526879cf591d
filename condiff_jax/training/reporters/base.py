"""What every run logs: metrics.jsonl, TensorBoard events, image grids."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import numpy as np
from PIL import Image
from tqdm import tqdm

from condiff_jax.evaluation.records import delete_measurements_after
from condiff_jax.runs.workdir import Workdir
from condiff_jax.runtime.files import append_json, drop_lines_after
from condiff_jax.runtime.process import hide_module
from condiff_jax.sampling.sample import save_png

with hide_module("torch"):  # which it loads for annotations alone: seconds at every start
    from tensorboardX import SummaryWriter


class Log:
    """Writes text and pictures of a run; process 0 alone touches files.

    first: the step that the run goes on from; what is logged beyond is dropped.
    """

    def __init__(self, folder: Workdir, *, first: int = 0):
        self.folder, self.chief = folder, jax.process_index() == 0
        if self.chief:
            folder.samples.mkdir(parents=True, exist_ok=True)
            drop_lines_after(folder.metrics, first)
            drop_lines_after(folder.evaluation, first)
            delete_measurements_after(folder, first)
            for grid in folder.samples.glob("*.png"):
                if grid.stem.isdigit() and int(grid.stem) > first:
                    grid.unlink()
            self.events = SummaryWriter(str(folder.path), purge_step=first or None)

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """One line of metrics.jsonl and one point of each TensorBoard curve."""
        if self.chief:
            append_json(self.folder.metrics, {"step": step, **values})
            for name, value in values.items():
                self.events.add_scalar(name, value, step)
            self.events.flush()

    def picture(self, step: int, grid: Image.Image) -> None:
        """samples/STEP.png, also in TensorBoard."""
        if self.chief:
            save_png(self.folder.grid(step), grid)
            self.events.add_image("samples", np.asarray(grid), step, dataformats="HWC")

    def close(self, lines: Sequence[str] = ()) -> None:
        """The end of a run: what came out, if anything, line by line, and where everything is."""
        if self.chief:
            self.events.close()
        if self.chief and lines:
            curves = f"{self.folder.metrics} (and TensorBoard events beside it)"
            places = f"  curves       {curves}", f"  checkpoints  {self.folder.checkpoints}"
            tqdm.write("\n".join([*lines, *places]))
