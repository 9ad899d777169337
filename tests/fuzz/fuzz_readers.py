"""Fuzzes one reader: ``python tests/fuzz/fuzz_readers.py lm_eval --minutes 10``.

With atheris (``pip install atheris``) the search follows the branches that the readers take;
without it, it is random. Minutes are of this process's processor time. Every kind of finding
(exception and place) is stored once, as JSON (relative path -> content), and printed; the exit code
is 1 where there was one.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import shutil
import sys
import tempfile
import time
import traceback
import warnings
from importlib.util import find_spec
from pathlib import Path
from random import Random

sys.path.insert(0, str(Path(__file__).resolve().parent))

from mutations import damaged
from readers import TARGETS, Target


def packed(files: dict[str, bytes]) -> bytes:
    """A folder as one piece of JSON."""
    return json.dumps({name: content.decode("latin-1") for name, content in files.items()}).encode()


def unpacked(data: bytes) -> dict[str, bytes]:
    """The folder that :func:`packed` packed; empty where it is none."""
    try:
        return {name: text.encode("latin-1") for name, text in json.loads(data).items()}
    except (ValueError, AttributeError):
        return {}


class Fuzzer:
    """Reads damaged folders and keeps what should not have happened."""

    def __init__(self, name: str, target: Target, findings: Path, seconds: float) -> None:
        self.name, self.target, self.findings = name, target, findings
        self.until = time.process_time() + seconds
        self.known: set[str] = set()
        self.count = self.refused = 0
        self.folder = Path(tempfile.mkdtemp(dir="/dev/shm" if Path("/dev/shm").is_dir() else None))

    def read(self, files: dict[str, bytes]) -> None:
        """Read one folder."""
        from streamline_bench.errors import StreamlineBenchError

        place = self.folder / str(self.count)
        write_folder(place, files)
        self.count += 1
        try:
            self.target.read(place)
        except StreamlineBenchError:
            self.refused += 1
        except Exception as error:
            self.note(error, files)
        finally:
            shutil.rmtree(place)

    def note(self, error: Exception, files: dict[str, bytes]) -> None:
        """Keep a finding, once for each kind of exception and line of ours that raised it."""
        frames = [f for f in traceback.extract_tb(error.__traceback__)
                  if "/streamline_bench/" in f.filename]  # fmt: skip
        at = f"{Path(frames[-1].filename).name}:{frames[-1].name}" if frames else "outside"
        kind = f"{type(error).__name__} in {at}"
        if kind in self.known:
            return
        self.known.add(kind)
        print(f"FINDING {self.name}: {kind}: {str(error)[:200]!r}", flush=True)
        traceback.print_exception(error)
        self.findings.mkdir(parents=True, exist_ok=True)
        (self.findings / f"{self.name}-{len(self.known)}.json").write_bytes(packed(files))

    def over(self) -> bool:
        """Whether the time is up."""
        return time.process_time() > self.until

    def ended(self) -> int:
        """Report, remove what was made, and return the exit code."""
        shutil.rmtree(self.folder, ignore_errors=True)
        print(
            f"{self.name}: {self.count} folders read in {time.process_time():.0f} s of processor "
            f"time, {self.refused} refused, {len(self.known)} kinds of findings",
            flush=True,
        )
        return 1 if self.known else 0


def write_folder(place: Path, files: dict[str, bytes]) -> None:
    """Write files below a folder."""
    place.mkdir()
    for name, content in files.items():
        path = place / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def search_randomly(fuzzer: Fuzzer) -> None:
    """Damage valid folders, and damaged ones again, at random."""
    chance = Random(time.time_ns())
    while not fuzzer.over():
        files = dict(chance.choice(fuzzer.target.seeds))
        for _ in range(chance.choice((1, 1, 2, 4))):
            files = damaged(files, chance)
        fuzzer.read(files)


def search_by_coverage(fuzzer: Fuzzer) -> None:
    """Let atheris choose what to damage further; it ends the process itself."""
    import atheris

    corpus = Path(tempfile.mkdtemp())
    for number, files in enumerate(fuzzer.target.seeds):
        (corpus / str(number)).write_bytes(packed(dict(files)))

    def one(data: bytes) -> None:
        if fuzzer.over():
            code = fuzzer.ended()
            shutil.rmtree(corpus, ignore_errors=True)
            sys.stdout.flush()
            os._exit(code)
        files = unpacked(data)
        if files:
            fuzzer.read(files)

    def mutate(data: bytes, max_size: int, seed: int) -> bytes:
        chance = Random(seed)
        files = unpacked(data) or dict(chance.choice(fuzzer.target.seeds))
        result = packed(damaged(files, chance))
        return result if len(result) <= max_size else data[:max_size]

    options = [f"-max_len={1 << 20}", "-rss_limit_mb=0", "-timeout=120", "-verbosity=0"]
    atheris.Setup([sys.argv[0], *options, str(corpus)], one, custom_mutator=mutate)
    atheris.Fuzz()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("target", choices=sorted(TARGETS))
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--findings", type=Path, default=Path("fuzz-findings"))
    parser.add_argument("--random", action="store_true", help="search without atheris")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    target = TARGETS[arguments.target]
    covered = find_spec("atheris") is not None and not arguments.random
    if covered:
        import atheris

        with atheris.instrument_imports(include=["streamline_bench"]):
            _read_once(target)
    fuzzer = Fuzzer(arguments.target, target, arguments.findings, 60 * arguments.minutes)
    if covered:
        search_by_coverage(fuzzer)
    else:
        search_randomly(fuzzer)
    return fuzzer.ended()


def _read_once(target: Target) -> None:
    """Import what the reader needs; every valid folder must be read."""
    for files in target.seeds:
        place = Path(tempfile.mkdtemp()) / "valid"
        write_folder(place, dict(files))
        target.read(place)
        shutil.rmtree(place.parent)


if __name__ == "__main__":
    raise SystemExit(main())
