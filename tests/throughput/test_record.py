"""Records survive the way through a file; what is not one is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from streamline_bench.errors import ThroughputError
from streamline_bench.throughput.record import (
    RECORD_NAME,
    ThroughputRecord,
    read_record,
    write_record,
)
from streamline_bench.throughput.served import ServingPoint

Make = Callable[..., ThroughputRecord]


def test_round_trip(make_record: Make, point: Any, tmp_path: Path) -> None:
    record = make_record(dense=[point(1, 10.0)], small=[point(1, None)])
    path = write_record(record, tmp_path)
    assert path == tmp_path / RECORD_NAME
    assert read_record(path) == read_record(tmp_path) == record


def test_an_infinite_rate_survives_as_valid_json(
    make_record: Make, point: Any, tmp_path: Path
) -> None:
    record = make_record(dense=[point(1, 10.0)])
    served = ServingPoint(request_rate=float("inf"), status="ok")
    model = record.models[0].model_copy(update={"serving": (served,)})
    path = write_record(record.model_copy(update={"models": (model,)}), tmp_path)
    json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert read_record(path).models[0].serving[0].request_rate == float("inf")


def test_newer_schema_asks_for_an_upgrade(make_record: Make, point: Any, tmp_path: Path) -> None:
    path = write_record(make_record(dense=[]), tmp_path)
    path.write_text(json.dumps({**json.loads(path.read_text()), "schema_version": 99}))
    with pytest.raises(ThroughputError, match=r"schema version 99, newer.*upgrade"):
        read_record(path)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "{}", '{"schema_version": 1}'])
def test_damage_is_named(text: str, tmp_path: Path) -> None:
    path = tmp_path / RECORD_NAME
    path.write_text(text)
    with pytest.raises(ThroughputError, match="measure again"):
        read_record(path)


def test_a_record_without_models_is_refused(make_record: Make, point: Any, tmp_path: Path) -> None:
    path = write_record(make_record(dense=[point(1, 10.0)]), tmp_path)
    path.write_text(json.dumps({**json.loads(path.read_text()), "models": []}))
    with pytest.raises(ThroughputError, match=r"'models'.*; remove it\.$"):
        read_record(path, "remove it")


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ThroughputError, match="cannot be read"):
        read_record(tmp_path / "nowhere.json")


def test_a_record_without_blocks_is_one_block(
    make_record: Make, point: Any, tmp_path: Path
) -> None:
    """Schema 1 had one start of every process, and an ideal per model."""
    path = write_record(make_record(dense=[point(1, 10.0)], small=[point(1, 5.0, 0.5)]), tmp_path)
    data = json.loads(path.read_text())
    data["schema_version"] = 1
    for key in ("blocks", "stopped", "self_check"):
        del data[key]
    for key in ("blocks", "until_precision", "minutes", "self_check"):
        del data["workload"][key]
    for model in data["models"]:
        model["ideal"] = {"kind": "layers", "ratio": 1.5, "layers": 1.5, "flops": 1.4, "weights": 1}
        for each in model["points"]:
            del each["ideal"]
            if each["ratio"]:
                each["ratio"] = {key: each["ratio"][key] for key in ("value", "low", "high")}
    path.write_text(json.dumps(data))
    found = read_record(path)
    assert (found.workload.blocks, found.blocks) == (1, 1)
    (small,) = found.models[1].points
    assert small.ideal is not None and (small.ideal.kind, small.ideal.ratio) == ("layers", 1.5)
    assert small.ratio is not None and (small.ratio.low, small.ratio.median) == (0.4, None)
    assert read_record(write_record(found, tmp_path)) == found
