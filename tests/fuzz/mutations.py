"""Damages files the way that finds faults in readers: by their structure first, then by bytes.

Files are JSON, lines of JSON, YAML or anything else. What is drawn comes from one source of
randomness, so that hypothesis can shrink it and atheris can repeat it.
"""

from __future__ import annotations

import copy
import json
import struct
from collections.abc import Iterator, Mapping
from random import Random
from typing import Any

import yaml

ODD_VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2**31, 2**63, -(2**63) - 1, 10**30, 10**400, 0.5, -0.0, 1e308,
    float("nan"), float("inf"), -float("inf"), "", " ", "0", "1e999", "nan", "None", "\0", "\ud83d",
    "\udc00x", "../../etc/passwd", "/", "a" * 300, "é\u2028\x85", "²", "\u0661", [], {}, [[]],
    [None], {"": None}, {"0": []}, [1, "a"], ["-1.5", "False"], [["nan", "False"]],
    {"a": {"b": {"c": []}}}, "2024-01-01", "[" * 50, "{{x}}", "$HOME", "-", ":", "&a *a",
)  # fmt: skip

ODD_BYTES = (
    b"", b"\0", b"\xff\xfe", b"\xef\xbb\xbf", b"\xed\xa0\xbd", b"\n", b"\r", b"{", b"}", b"]",
    b"[" * 3000, b'{"a":' * 3000, b"1" * 5000, b"NaN", b"-Infinity", b"\\ud83d", b'"', b"\\", b",",
    b"\x1f\x8b", b"!!python/object:os.system", b"&x [*x]", b"%", b"1e400", b"\xc2\x85",
)  # fmt: skip


def damaged(files: Mapping[str, bytes], chance: Random) -> dict[str, bytes]:
    """Copy of ``files`` (relative path -> content) of which one or two are damaged."""
    result = dict(files)
    for _ in range(chance.choice((1, 1, 1, 2, 3))):
        if not result:
            break
        name = chance.choice(sorted(result))
        if chance.random() < 0.03:
            del result[name]
        else:
            result[name] = damaged_file(name, result[name], chance)
    return result


def damaged_file(name: str, content: bytes, chance: Random) -> bytes:
    """One file, damaged by its structure where it has one, else by its bytes."""
    if chance.random() < 0.8:
        try:
            return _by_structure(name, content, chance)
        except (ValueError, RecursionError, yaml.YAMLError, struct.error, OverflowError):
            pass  # it was damaged before
    return _by_bytes(content, chance)


def _by_structure(name: str, content: bytes, chance: Random) -> bytes:
    if name.endswith(".json"):
        return _json(_edited(json.loads(content), chance))
    if name.endswith(".jsonl"):
        lines = content.splitlines()
        at = chance.randrange(len(lines)) if lines else 0
        if chance.random() < 0.1:
            lines[at:at] = lines[at : at + 1]
        elif lines:
            lines[at] = _json(_edited(json.loads(lines[at]), chance))
        return b"\n".join(lines) + b"\n"
    if name.endswith(".yaml"):
        edited = _edited(yaml.safe_load(content), chance)
        return yaml.safe_dump(edited, allow_unicode=True).encode("utf-8", "surrogatepass")
    if name.endswith(".safetensors"):
        (length,) = struct.unpack("<Q", content[:8])
        header = _json(_edited(json.loads(content[8 : 8 + length]), chance))
        return struct.pack("<Q", len(header)) + header + content[8 + length :]
    raise ValueError(name)


def _json(value: Any) -> bytes:
    return json.dumps(value).encode()


def _edited(value: Any, chance: Random) -> Any:
    """The value with one place in it changed."""
    result = copy.deepcopy(value)
    places = list(_places(result))
    if not places:
        return chance.choice(ODD_VALUES)
    holder, key = chance.choice(places)
    action = chance.randrange(6)
    if action == 0:
        del holder[key]
    elif action == 1 and isinstance(holder, dict):
        other = chance.choice(
            [str(odd) for odd in ODD_VALUES if isinstance(odd, str)] + ["label: "]
        )
        holder[other] = holder.pop(key)
    elif action == 2:
        source, name = chance.choice(places)
        holder[key] = copy.deepcopy(source[name]) if name in _keys(source) else None
    elif action == 3:
        holder[key] = chance.choice(([holder[key]], {"0": holder[key]}, str(holder[key])))
    else:
        holder[key] = copy.deepcopy(chance.choice(ODD_VALUES))
    return result


def _keys(holder: Any) -> Any:
    return holder if isinstance(holder, dict) else range(len(holder))


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    if isinstance(value, dict | list):
        for key in list(_keys(value)):
            yield value, key
            yield from _places(value[key])


def _by_bytes(content: bytes, chance: Random) -> bytes:
    at = chance.randrange(len(content) + 1)
    action = chance.randrange(4)
    if action == 0:
        return content[:at]
    if action == 1:
        return content[:at] + chance.choice(ODD_BYTES) + content[at:]
    if action == 2 and at < len(content):
        return content[:at] + bytes([content[at] ^ (1 << chance.randrange(8))]) + content[at + 1 :]
    end = min(len(content), at + chance.randrange(1, 40))
    return content[:at] + chance.choice(ODD_BYTES) + content[end:]
