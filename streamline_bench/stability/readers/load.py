"""``load_samples``: an evaluation folder or file of any known kind as samples."""

from __future__ import annotations

import logging
from pathlib import Path

from streamline_bench.errors import SamplesError, first_line
from streamline_bench.stability.readers.lm_eval_reader import read_lm_eval
from streamline_bench.stability.readers.opencompass_folder import find_predictions
from streamline_bench.stability.samples import Samples

log = logging.getLogger(__name__)


def load_samples(
    path: str | Path,
    *,
    run: str | None = None,
    timestamp: str | None = None,
    progress: bool = True,
) -> Samples:
    """Read a run: a ``.parquet`` file of ours, or a folder of lm-eval or OpenCompass, at any level.

    Several evaluations of one model with the same settings are joined. What is not read of a
    folder is named in ``info.left_out`` and in the log.

    Args:
        path: the file or folder. Of OpenCompass: a work folder, a run in it, its ``predictions``, a
            model in these, or one prediction file.
        run: label of the run; by default the name of the folder that holds the results.
        timestamp: read this evaluation of the folder only.
        progress: show a progress bar with ETA when reading takes more than two seconds.

    Raises:
        SamplesError: nothing readable is there, or a file is damaged (file and line are named).
        NumericsError: a score is NaN or infinite (the document is named).
    """
    path = Path(path)
    try:
        samples = _load(path, run, timestamp, progress)
    except OSError as error:
        raise SamplesError(f"'{path}' cannot be read ({first_line(error)}); check it.") from None
    for name, reason in samples.info.left_out.items():
        log.warning("%s: %s is left out: %s.", path, name, reason)
    return samples


def _load(path: Path, run: str | None, timestamp: str | None, progress: bool) -> Samples:
    if not path.exists():
        raise SamplesError(
            f"There is no file or folder '{path}'; give an output folder of lm-eval or OpenCompass."
        )
    if path.suffix == ".parquet":
        samples = Samples.load(path)
        return samples if run is None else samples.relabelled(run)
    predictions = find_predictions(path, timestamp)
    if predictions is not None:
        from streamline_bench.stability.readers.opencompass_reader import read_opencompass

        return read_opencompass(predictions, run=run, progress=progress)
    return read_lm_eval(path, run=run, timestamp=timestamp, progress=progress)
