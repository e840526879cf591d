"""Base of the reporters: metrics.jsonl, TensorBoard events and image grids."""

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

# tensorboardX imports torch for annotations only, which takes seconds at every start.
with hide_module("torch"):
    from tensorboardX import SummaryWriter


class Log:
    """Log of a run, written by process 0 only.

    first: the step that the run resumes from; what was logged after it is deleted.
    """

    def __init__(self, folder: Workdir, *, first: int = 0):
        self.folder = folder
        self.chief = jax.process_index() == 0
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
        """Write one line of metrics.jsonl and one point of each TensorBoard curve."""
        if self.chief:
            append_json(self.folder.metrics, {"step": step, **values})
            for name, value in values.items():
                self.events.add_scalar(name, value, step)
            self.events.flush()

    def image(self, step: int, grid: Image.Image) -> None:
        """Write samples/STEP.png, also to TensorBoard."""
        if self.chief:
            save_png(self.folder.grid(step), grid)
            self.events.add_image("samples", np.asarray(grid), step, dataformats="HWC")

    def close(self, lines: Sequence[str] = ()) -> None:
        """Close the log; print the lines of a result, if any, and the paths of the files."""
        if self.chief:
            self.events.close()
        if self.chief and lines:
            curves = f"{self.folder.metrics} (and TensorBoard events beside it)"
            paths = [f"  curves       {curves}", f"  checkpoints  {self.folder.checkpoints}"]
            tqdm.write("\n".join([*lines, *paths]))
