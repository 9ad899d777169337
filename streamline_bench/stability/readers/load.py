"""``load_samples``: an evaluation folder or file of any known kind as samples."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from streamline_bench.errors import SamplesError
from streamline_bench.stability.samples import Samples

__all__ = ["load_samples"]


def load_samples(
    path: str | Path,
    *,
    run: str | None = None,
    timestamp: str | None = None,
    progress: bool = True,
) -> Samples:
    """Read a run: a ``.parquet`` file of ours, or a folder of lm-eval or OpenCompass, at any level.

    Args:
        path: the file or folder. Of OpenCompass: a work folder, a run in it, its ``predictions``, a
            model in these, or one prediction file.
        run: label of the run; by default the name of the folder that holds the results.
        timestamp: which evaluation of the folder; by default the newest.
        progress: show a progress bar with ETA when reading takes more than two seconds.

    Raises:
        SamplesError: nothing readable is there, or a file is damaged (file and line are named).
        NumericsError: a score is NaN or infinite (the document is named).
    """
    path = Path(path)
    if not path.exists():
        raise SamplesError(
            f"There is no file or folder '{path}'; give an output folder of lm-eval or OpenCompass."
        )
    if path.suffix == ".parquet":
        samples = Samples.load(path)
        return samples if run is None else _relabel(samples, run)
    from streamline_bench.stability.readers.lm_eval_reader import read_lm_eval
    from streamline_bench.stability.readers.opencompass_folder import find_predictions
    from streamline_bench.stability.readers.opencompass_reader import read_opencompass

    predictions = find_predictions(path, timestamp)
    if predictions is not None:
        return read_opencompass(predictions, run=run, progress=progress)
    return read_lm_eval(path, run=run, timestamp=timestamp, progress=progress)


def _relabel(samples: Samples, run: str) -> Samples:
    frame = samples.frame.assign(run=pd.Series(run, index=samples.frame.index, dtype="str"))
    return Samples(frame, samples.info.model_copy(update={"run": run}))
