"""The jobs that compress, compare on a text, and measure speed; scoring is in ``score.py``."""

from __future__ import annotations

import itertools
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from streamline_bench.core.files import atomic_write_text, staged_output
from streamline_bench.core.machine.ranks import launched, run_in_ranks
from streamline_bench.errors import CheckpointError, StreamlineBenchError
from streamline_bench.runs.folder import RunPaths
from streamline_bench.runs.jobs.job import (
    Facts,
    Job,
    Result,
    Together,
    command_line,
    last_line,
    write_done,
    write_failed,
)
from streamline_bench.runs.planning.plan import ModelPlan, TextPlan, digest

if TYPE_CHECKING:
    from streamline_bench.stability.texts import MeasuredDivergence
    from streamline_bench.throughput import ServingLoad, Workload

_TOKENS = 2048
"""Of a text, read at once, in as many windows as that takes; both models' logits are in memory."""


def compress_name(place: str) -> str:
    """Return the name of the job that compresses the model for the row with this folder."""
    return f"compress-{place}"


class CompressJob(Job):
    """Compress the model of a run by one recipe.

    Attributes:
        weights_sha256: content of the model's weights and config.
        recipe: the complete recipe.
        dtype: of the model in memory; None: as for ``compress``.
        states: name of the hidden states that other rows are trained on as well.
        placement: of the model's weights, as for ``compress``.
        memory: bytes of its machine's memory that it may take; None: all that is free.
    """

    kind: Literal["compress"] = "compress"
    label: str
    weights_sha256: str
    recipe: dict[str, Any]
    dtype: str | None = None
    states: str | None = None
    placement: str = "auto"
    memory: int | None = None

    def products(self, run: RunPaths) -> list[Path]:
        return [run.checkpoint(self.place)]

    def work(self, run: RunPaths) -> Result:
        """Write the row's checkpoint, or take the one in the cache or of an earlier attempt.

        Interrupted training is kept in the run folder, so the next attempt resumes it.
        """
        import torch

        from streamline_bench.compression.pipeline import compress, compress_shared, trains
        from streamline_bench.core.checkpoint.reader import CheckpointReader
        from streamline_bench.core.recipe.schema import parse_recipe

        if "OMP_NUM_THREADS" in os.environ:
            torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
        recipe = parse_recipe(self.recipe, "The row's recipe")
        how: dict[str, Any] = {
            "revision": self.revision,
            "device": self.device,
            "dtype": self.dtype,
            "trust_remote_code": self.trust_remote_code,
            "states": None if self.states is None else run.states / self.states,
            "placement": self.placement,
            "memory": self.memory,
        }
        if launched().count > 1:
            output = run.checkpoint(self.place)
            compress(self.model, recipe, output, cache=run.compressing, overwrite=True, **how)
            return Result()
        found = CheckpointReader(self.source()).fingerprint(progress=False)
        if found != self.weights_sha256:
            raise CheckpointError(
                f"{self.model} is not the model this run was started with (its weights differ); "
                "give another --output."
            )
        output = run.checkpoint(self.place)
        if not _is_published(output, recipe.model_dump(mode="json"), found):
            several = self.processes > 1 and trains(recipe)
            reused = compress_shared(
                self.model,
                recipe,
                output,
                work=run.compressing,
                make=partial(self._make_in_processes, run) if several else None,
                **how,
            )
            if reused:
                print("The result was in the cache.", flush=True)
        return Result(self._command(run))

    def _make_in_processes(self, run: RunPaths) -> None:
        """Let processes of their own, which share the training, call :meth:`work`."""
        command = [sys.executable, "-m", "streamline_bench.runs.jobs.worker", run.root, self.name]
        code = run_in_ranks([str(word) for word in command], self.processes)
        why = last_line(run.log(self.name))
        if code == 2:
            raise StreamlineBenchError(why)
        if code:
            raise StreamlineBenchError(
                f"One of its {self.processes} processes ended with exit code {code}: {why}"
            )

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
            "--placement": None if self.placement == "auto" else self.placement,
            "--output": run.checkpoint(self.place),
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
    """Compare the next-token distributions of one row with the dense model's, on a text.

    Attributes:
        other: what is compared where it was made elsewhere; None: the row's checkpoint.
        shareable: it may be done in one process with others, the dense model run once.
    """

    kind: Literal["text"] = "text"
    label: str
    text: TextPlan
    dtype: str
    other: ModelPlan | None = None
    shareable: bool = False

    @property
    def needs(self) -> tuple[str, ...]:
        return () if self.other else (compress_name(self.place),)

    def compared(self, run: RunPaths) -> Path:
        """Return the folder that is compared with the dense model's."""
        from streamline_bench.core.checkpoint.folder import resolve_pretrained

        if self.other is None:
            return run.checkpoint(self.place)
        return resolve_pretrained(self.other.name, self.other.revision)

    def products(self, run: RunPaths) -> list[Path]:
        return [run.divergence(self.place)]

    def work(self, run: RunPaths) -> Result:
        from streamline_bench.divergence import token_divergence

        compared = token_divergence(
            self.source(),
            self.compared(run),
            self._documents(),
            trust_pruned=self.other.trust_remote_code if self.other else None,
            **self._how(),
        )
        return self.publish(run, compared)

    def together(
        self, run: RunPaths, jobs: Sequence[TextJob]
    ) -> dict[str, MeasuredDivergence | StreamlineBenchError]:
        """Return label -> result of these jobs, which all ask what this one does."""
        from streamline_bench.divergence import Other, token_divergences

        others = {
            job.label: Other(
                job.compared(run),
                job.other.trust_remote_code if job.other else job.trust_remote_code,
            )
            for job in jobs
        }
        return token_divergences(self.source(), others, self._documents, **self._how())

    def _documents(self) -> Iterator[str]:
        from streamline_bench.divergence import read_texts
        from streamline_bench.modeling.loading import load_tokenizer

        text = self.text
        tokenizer = load_tokenizer(self.source(), trust_remote_code=self.trust_remote_code)
        return itertools.islice(read_texts(Path(text.file), text.field, tokenizer), text.documents)

    def _how(self) -> dict[str, Any]:
        return {
            "window": self.text.window,
            "batch_size": max(1, _TOKENS // self.text.window),
            "device": self.device,
            "dtype": self.dtype,
            "trust_remote_code": self.trust_remote_code,
        }

    def publish(
        self, run: RunPaths, compared: MeasuredDivergence, facts: Facts | None = None
    ) -> Result:
        """Write the result, and return what there is to say about it."""
        # A checkpoint made elsewhere may have no folder yet, where its answers are another row's.
        run.divergence(self.place).parent.mkdir(exist_ok=True)
        atomic_write_text(run.divergence(self.place), compared.model_dump_json(indent=2) + "\n")
        text, how = self.text, self._how()
        options = {
            "--text-field": text.field,
            "--documents": text.documents,
            "--window": text.window,
            "--batch-size": how["batch_size"],
            "--device": self.device,
            "--dtype": self.dtype,
            "--revision": self.revision,
        }
        other = self.other.name if self.other else run.checkpoint(self.place)
        words = ["divergence", self.model, other, text.file]
        command = command_line(words, options, trust_remote_code=self.trust_remote_code)
        return Result(command, facts or Facts())


class TextTogether(Together):
    """Compare several rows on a text in one process, and mark each as done or failed.

    Attributes:
        jobs: those of the rows; all ask the same of the same dense model.
    """

    kind: Literal["text-together"] = "text-together"
    jobs: tuple[TextJob, ...] = Field(min_length=2)

    @property
    def name(self) -> str:
        return f"{self.kind}-{self.key[:8]}"

    def work(self, run: RunPaths) -> Result:
        """Compare the rows; those without a mark are compared alone if this fails as a whole."""
        began = time.monotonic()
        found = self.jobs[0].together(run, self.jobs)
        seconds = (time.monotonic() - began) / len(self.jobs)
        for job in self.jobs:
            compared = found[job.label]
            if isinstance(compared, StreamlineBenchError):
                write_failed(run, job.name, key=job.key, reason=str(compared))
                continue
            result = job.publish(run, compared, Facts(together=self.labels))
            write_done(
                run, job.name, key=job.key, seconds=seconds, products=job.products(run),
                result=result,
            )  # fmt: skip
        return Result()


def text_together_job(jobs: Sequence[TextJob]) -> Job:
    """Return the job that does these in one process; of a single one, itself."""
    if len(jobs) == 1:
        return jobs[0]
    first = jobs[0]
    return TextTogether(
        key=digest(["text together", [job.key for job in jobs]]),
        model=first.model,
        revision=first.revision,
        device=first.device,
        trust_remote_code=first.trust_remote_code,
        environment=first.environment,
        jobs=tuple(jobs),
    )


class MeasureJob(Job):
    """Measure how fast the rows' models generate, all in one job so that they take turns.

    Attributes:
        rows: label -> whether the row has a checkpoint in the run folder.
        places: label -> the row's folder, where it is not the label.
        models: label -> the model of a row that was not made here, if it is not the run's.
        keys: label -> content key of the row.
        question: names the set of rows, if it is not the first; see :class:`.ScoreJob`.
        dense: label of the row that the others are compared with.
        load: what is sent to vLLM's server; empty: batches are generated.
        threads: CPU threads of each model's process.
    """

    kind: Literal["measure"] = "measure"
    rows: dict[str, bool]
    places: dict[str, str] = Field(default_factory=dict)
    models: dict[str, ModelPlan] = Field(default_factory=dict)
    keys: dict[str, str] = Field(default_factory=dict)
    question: str = ""
    dense: str
    engine: Literal["vllm", "hf"]
    workload: dict[str, Any]
    load: dict[str, Any] = Field(default_factory=dict)
    dtype: str | None = None
    threads: int

    @property
    def name(self) -> str:
        return f"throughput-{self.question}" if self.question else "throughput"

    def products(self, run: RunPaths) -> list[Path]:
        return [run.measured(self.question)]

    def _folder(self, run: RunPaths, label: str) -> Path:
        from streamline_bench.core.checkpoint.folder import resolve_pretrained

        if self.rows[label]:
            return run.checkpoint(self.places.get(label, label))
        other = self.models.get(label)
        return resolve_pretrained(other.name, other.revision) if other else self.source()

    def _named(self, run: RunPaths, label: str) -> str:
        if self.rows[label]:
            return str(self._folder(run, label))
        return self.models[label].name if label in self.models else self.model

    def work(self, run: RunPaths) -> Result:
        from streamline_bench.throughput import ServingLoad, Setup, Workload, measure, serve

        workload = Workload.model_validate(self.workload)
        load = ServingLoad.model_validate(self.load) if self.load else None
        trusted = [self.trust_remote_code, *(m.trust_remote_code for m in self.models.values())]
        models: dict[str, Path | str] = {label: self._folder(run, label) for label in self.rows}
        setup = Setup(
            device=self.device,
            dtype=self.dtype or "auto",
            threads=self.threads,
            trust_remote_code=all(trusted),
            tensor_parallel=self.processes,
        )
        with staged_output(run.measured(self.question), overwrite=True) as staging:
            how: dict[str, Any] = {"dense": self.dense, "workload": workload, "setup": setup}
            if load is None:
                measure(models, engine=self.engine, output=staging, **how)
            else:
                serve(models, load=load, output=staging, **how)
        return Result(self._command(run, workload, load))

    def _command(self, run: RunPaths, workload: Workload, load: ServingLoad | None) -> str:
        asked = ["blocks", "until_precision", "minutes", "seed"]
        if load is None:
            batches = ",".join(map(str, workload.batch_sizes))
            what: dict[str, Any] = {"--engine": self.engine, "--batch": batches}
            asked += ["prompt_tokens", "output_tokens", "rounds", "warmup_rounds"]
        else:
            what = load.options
            asked += ["prompt_tokens"] if load.prompts == "random" else []
            asked += ["output_tokens"] if load.output_lengths == "fixed" else []
        options = {
            "--dense": self.dense,
            **what,
            **{f"--{name.replace('_', '-')}": getattr(workload, name) for name in asked},
            "--device": self.device,
            "--dtype": self.dtype or "auto",
            "--threads": self.threads,
            "--revision": self.revision,
            "--tensor-parallel-size": self.processes if self.processes > 1 else None,
        }
        models = [f"{label}={self._named(run, label)}" for label in self.rows]
        flags = {"serve": load is not None, "prefix_caching": workload.prefix_caching,
                 "self_check": workload.self_check,
                 "trust_remote_code": self.trust_remote_code}  # fmt: skip
        return command_line(["throughput", *models], options, **flags)
