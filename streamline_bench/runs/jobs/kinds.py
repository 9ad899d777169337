"""The jobs that compress, compare on a text, and measure speed; scoring is in ``score.py``."""

from __future__ import annotations

import itertools
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from streamline_bench.core.files import atomic_write_text, staged_output
from streamline_bench.errors import CheckpointError
from streamline_bench.runs.folder import RunPaths
from streamline_bench.runs.jobs.job import Job, Result, command_line
from streamline_bench.runs.planning.plan import TextPlan

_TOKENS = 2048
"""Of a text, read at once, in as many windows as that takes; both models' logits are in memory."""


def compress_name(label: str) -> str:
    """Return the name of the job that compresses the model for a row."""
    return f"compress-{label}"


class CompressJob(Job):
    """Compress the model of a run by one recipe.

    Attributes:
        weights_sha256: content of the model's weights and config.
        recipe: the complete recipe.
        dtype: of the model in memory; None: float32.
    """

    kind: Literal["compress"] = "compress"
    label: str
    weights_sha256: str
    recipe: dict[str, Any]
    dtype: str | None = None

    def products(self, run: RunPaths) -> list[Path]:
        return [run.checkpoint(self.label)]

    def work(self, run: RunPaths) -> Result:
        """Write the row's checkpoint, or take the whole one that an earlier attempt published.

        Interrupted training is kept in the run folder, so the next attempt resumes it.
        """
        import torch

        from streamline_bench.compression.pipeline import compress
        from streamline_bench.core.checkpoint.reader import CheckpointReader
        from streamline_bench.core.recipe.schema import parse_recipe

        if "OMP_NUM_THREADS" in os.environ:
            torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
        recipe = parse_recipe(self.recipe, "The row's recipe")
        found = CheckpointReader(self.source()).fingerprint(progress=False)
        if found != self.weights_sha256:
            raise CheckpointError(
                f"{self.model} is not the model this run was started with (its weights differ); "
                "give another --output."
            )
        output = run.checkpoint(self.label)
        if not _is_published(output, recipe.model_dump(mode="json"), found):
            compress(
                self.model,
                recipe,
                output,
                revision=self.revision,
                cache=run.compressing,
                device=self.device,
                dtype=self.dtype,
                trust_remote_code=self.trust_remote_code,
                overwrite=True,
            )
        return Result(self._command(run))

    def _command(self, run: RunPaths) -> str:
        """What a reader can type; its recipe is written into the job's folder."""
        import yaml

        path = run.job(self.name) / "recipe.yaml"
        text = yaml.safe_dump(self.recipe, sort_keys=False, allow_unicode=True)
        atomic_write_text(path, text)
        options = {
            "--recipe": path,
            "--revision": self.revision,
            "--device": self.device,
            "--dtype": self.dtype,
            "--output": run.checkpoint(self.label),
        }
        trust = self.trust_remote_code
        return command_line(["compress", self.model], options, trust_remote_code=trust)


def _is_published(output: Path, recipe: Mapping[str, Any], weights: str) -> bool:
    """Whether an attempt was stopped between publishing the checkpoint and saying so."""
    from streamline_bench.core.checkpoint.folder import read_manifest, verify_files

    try:
        manifest = read_manifest(output)
        if manifest is None:
            return False
        verify_files(output, manifest)
    except CheckpointError:
        return False
    return manifest.recipe == recipe and manifest.source.weights_sha256 == weights


class TextJob(Job):
    """Compare the next-token distributions of one row with the dense model's, on a text."""

    kind: Literal["text"] = "text"
    label: str
    text: TextPlan
    dtype: str

    @property
    def needs(self) -> tuple[str, ...]:
        return (compress_name(self.label),)

    def products(self, run: RunPaths) -> list[Path]:
        return [run.divergence(self.label)]

    def work(self, run: RunPaths) -> Result:
        from streamline_bench.divergence import read_texts, token_divergence
        from streamline_bench.modeling.loading import load_tokenizer

        text, folder = self.text, self.source()
        tokenizer = load_tokenizer(folder, trust_remote_code=self.trust_remote_code)
        batch_size = max(1, _TOKENS // text.window)
        compared = token_divergence(
            folder,
            run.checkpoint(self.label),
            itertools.islice(read_texts(Path(text.file), text.field, tokenizer), text.documents),
            window=text.window,
            batch_size=batch_size,
            device=self.device,
            dtype=self.dtype,
            trust_remote_code=self.trust_remote_code,
        )
        atomic_write_text(run.divergence(self.label), compared.model_dump_json(indent=2) + "\n")
        options = {
            "--text-field": text.field,
            "--documents": text.documents,
            "--window": text.window,
            "--batch-size": batch_size,
            "--device": self.device,
            "--dtype": self.dtype,
            "--revision": self.revision,
        }
        words = ["divergence", self.model, run.checkpoint(self.label), text.file]
        return Result(command_line(words, options, trust_remote_code=self.trust_remote_code))


class MeasureJob(Job):
    """Measure how fast the rows' models generate, all in one job so that they take turns.

    Attributes:
        rows: label -> whether the row has a checkpoint of its own.
        dense: label of the row that the others are compared with.
        threads: CPU threads of each model's process.
    """

    kind: Literal["measure"] = "measure"
    rows: dict[str, bool]
    dense: str
    engine: Literal["vllm", "hf"]
    workload: dict[str, Any]
    dtype: str | None = None
    threads: int

    @property
    def name(self) -> str:
        return "throughput"

    def products(self, run: RunPaths) -> list[Path]:
        return [run.throughput]

    def work(self, run: RunPaths) -> Result:
        from streamline_bench.throughput import Setup, Workload, measure

        workload = Workload.model_validate(self.workload)
        with staged_output(run.throughput, overwrite=True) as staging:
            measure(
                {
                    label: run.checkpoint(label) if compressed else self.source()
                    for label, compressed in self.rows.items()
                },
                dense=self.dense,
                engine=self.engine,
                workload=workload,
                setup=Setup(
                    device=self.device,
                    dtype=self.dtype or "auto",
                    threads=self.threads,
                    trust_remote_code=self.trust_remote_code,
                ),
                output=staging,
            )
        asked = ("prompt_tokens", "output_tokens", "rounds", "warmup_rounds", "seed")
        options = {
            "--dense": self.dense,
            "--engine": self.engine,
            "--batch": ",".join(map(str, workload.batch_sizes)),
            **{f"--{name.replace('_', '-')}": getattr(workload, name) for name in asked},
            "--device": self.device,
            "--dtype": self.dtype or "auto",
            "--threads": self.threads,
            "--revision": self.revision,
        }
        models = [
            f"{label}={run.checkpoint(label) if compressed else self.model}"
            for label, compressed in self.rows.items()
        ]
        flags = {"prefix_caching": workload.prefix_caching,
                 "trust_remote_code": self.trust_remote_code}  # fmt: skip
        return Result(command_line(["throughput", *models], options, **flags))
