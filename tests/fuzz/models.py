"""Damaged model directories: config.json with other values, weights that changed with or without their checksum."""

from __future__ import annotations

import copy
import hashlib
import json
import random
from pathlib import Path
from typing import Any

from tests.fuzz.mutations import mutate

_VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 3, 17, 10**6, 10**9, 10**30, 0.5, -0.5, 1e-300, 1e308, "", "x", "prior", "fit",
    "os:system", "builtins:eval", "../../etc/passwd", "y" * 500, [], [[]], {}, [1], [0, 0, 0], [10**6] * 3, {"a": 1},
    "marginal", "low-rank", "location", "shared", "#ffffff", "meta",
)  # fmt: skip


def damaged_model(folder: Path, number: int) -> Path:
    """`folder`/damaged: the model in `folder`/model with one to three damages, seeded by `number`."""
    source = random.Random(number)
    files = {path.name: path.read_bytes() for path in (folder / "model").iterdir()}
    for _ in range(source.choice((1, 1, 2, 3))):
        kind = source.choice(("value", "value", "value", "bytes", "weights", "weights", "missing"))
        if kind == "value":
            files["config.json"] = _other_value(files.get("config.json", b"{}"), source)
        elif kind == "bytes":
            files["config.json"] = mutate(files.get("config.json", b"{}"), "text", source)
        elif kind == "missing":
            files.pop(source.choice([*sorted(files), "nothing"]), None)
        else:
            files = _other_weights(files, source)
    target = folder / "damaged"
    target.mkdir(exist_ok=True)
    for path in target.iterdir():
        path.unlink()
    for name, content in files.items():
        (target / name).write_bytes(content)
    return target


def _other_weights(files: dict[str, bytes], source: random.Random) -> dict[str, bytes]:
    """Damaged weights; mostly with a checksum that fits, as of somebody who wrote both."""
    weights = files.get("weights.safetensors", b"")
    if source.random() < 0.5:  # within the header of safetensors: names, types, shapes, offsets
        length = int.from_bytes(weights[:8], "little")
        head = bytearray(weights[8 : 8 + length])
        for _ in range(source.choice((1, 2, 5))):
            if head:
                head[source.randrange(len(head))] = source.choice(b'0123456789[]{},:"FIU')
        weights = weights[:8] + bytes(head) + weights[8 + length :]
    else:
        weights = mutate(weights, "other", source)
    files = files | {"weights.safetensors": weights}
    if source.random() < 0.8:
        try:
            config = json.loads(files["config.json"])
            config["sha256"]["weights.safetensors"] = hashlib.sha256(weights).hexdigest()
            files["config.json"] = json.dumps(config).encode()
        except (KeyError, ValueError, TypeError):
            pass
    return files


def _other_value(content: bytes, source: random.Random) -> bytes:
    """config.json with one value, somewhere, replaced, removed or twice there."""
    try:
        config = json.loads(content)
    except ValueError:
        return content
    places = [place for place in _places(config) if place and place[0] != "sha256" or source.random() < 0.1]
    if not places:
        return content
    *way, last = source.choice(places)
    part = config
    for key in way:
        part = part[key]
    kind = source.random()
    if kind < 0.75:
        part[last] = copy.deepcopy(source.choice(_VALUES))
    elif kind < 0.9:
        del part[last]
    elif isinstance(part, list):
        part.insert(last, copy.deepcopy(part[last]))
    else:
        part[f"{last}2"] = part[last]
    return json.dumps(config).encode()


def _places(value: Any, way: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    found = [way] if way else []
    for key, item in items:
        found += _places(item, (*way, key))
    return found
