"""What disks, downloads, editors and other programs do to files, at random: JSON, text, safetensors, state dicts."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch

REPLACED = (b"", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", b"<!DOCTYPE html><html></html>",
            b"\x00" * 64, b"\xff\xfe{\x00}\x00", b"null", b"PK\x03\x04", b"\x80\x02}")  # fmt: skip
NASTY_BYTES = (b"\x00", b"\xff", b"\xed\xa0\x80", b"\n", b'"', b",", b"{", b"[" * 3000, b"(" * 300, b"1+" * 3000, b"-" * 3000,
               b"9" * 5000, b"x" * 140000, "\u2028".encode(), b"\\ud800", b"NaN", b"-1", b"../" * 90, b"y" * 300)  # fmt: skip


def nasty(chance: random.Random) -> Any:
    """A value that somebody, or a broken disk, could have put there."""
    deep: Any = []
    for _ in range(chance.choice((3, 70, 300))):
        deep = chance.choice(([deep], {"a": deep}))
    return chance.choice(
        (None, True, False, 0, 1, 2, 3, -1, 4.0, -0.0, 0.5, 255, 1e6, 10**6, 2**31, 2**40, 2**53, 2**63, 2**64, 10**400,
         1e308, math.nan, math.inf, "", "x", "x" * 300, "a/../../b", "\ud800", "a\0b", "null", "0", [], {}, [[]], [1, 2],
         [0] * 2000, {"a": 1}, {"": {}}, deep, "silu", "gelu", "grouped")
    )  # fmt: skip


def damage_json(chance: random.Random, value: Any) -> Any:
    """One to three places of a JSON value changed."""
    value = json.loads(json.dumps(value))
    for _ in range(chance.choice((1, 1, 1, 2, 3))):
        places = list(_places(value))
        if not places:
            return nasty(chance)
        holder, key = chance.choice(places)
        action = chance.randrange(6)
        if action == 0:
            del holder[key]
        elif action == 1 and isinstance(holder, dict):
            holder[chance.choice((str(nasty(chance)), "alpha", key + "_"))[:400]] = holder.pop(key)
        elif action == 2 and isinstance(holder[key], int | float):
            with suppress(OverflowError):
                holder[key] = holder[key] * chance.choice((-1, 0, 2, 1000, 10**9, 0.5))
        elif action == 3:
            other, its = chance.choice(places)
            holder[key] = json.loads(
                json.dumps(other.get(its) if isinstance(other, dict) else nasty_if_gone(other, its))
            )
        else:
            holder[key] = nasty(chance)
    return value


def nasty_if_gone(values: list, index: int) -> Any:
    return values[index] if index < len(values) else None


def _places(value: Any):
    for key in list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield value, key
        yield from _places(value[key])


def json_text(chance: random.Random, value: Any) -> bytes:
    """A damaged JSON value as bytes, which may be damaged once more."""
    text = json.dumps(damage_json(chance, value)).encode()
    if chance.random() < 0.02:
        depth = chance.choice((500, 50_000))
        text = chance.choice((b"[" * depth + b"]" * depth, b'{"a":' * depth + b"1" + b"}" * depth))
    return damage_bytes(chance, text) if chance.random() < 0.2 else text


def damage_bytes(chance: random.Random, content: bytes) -> bytes:
    """Bytes flipped, cut, repeated, or replaced as a whole."""
    content = bytearray(content)
    for _ in range(chance.choice((1, 1, 2, 4))):
        place = chance.randrange(len(content) + 1)
        action = chance.randrange(8)
        if action == 0 and content:
            content[place % len(content)] ^= 1 << chance.randrange(8)
        elif action == 1:
            del content[place:]
        elif action == 2:
            del content[place : place + chance.randrange(1, 20)]
        elif action == 3:
            content[place:place] = content[: chance.randrange(1, 60)]
        elif action == 4 and chance.random() < 0.2:
            content = bytearray(chance.choice(REPLACED))
        else:
            content[place:place] = chance.choice(NASTY_BYTES)
    return bytes(content)


def damage_safetensors(chance: random.Random, content: bytes) -> bytes:
    """The header's JSON changed, with its length kept right or not, or any bytes."""
    if chance.random() < 0.3:
        return damage_bytes(chance, content)
    length = int.from_bytes(content[:8], "little")
    values = json.loads(content[8 : 8 + length])
    own = values.get("__metadata__") or {}
    packed = [key for key, text in own.items() if text[:1] == "{"]
    if packed and chance.random() < 0.6:  # what we keep as text inside
        key = chance.choice(packed)
        own[key] = json_text(chance, json.loads(own[key])).decode("utf-8", "replace")
    else:
        values = damage_json(chance, values)
    header = json.dumps(values, ensure_ascii=chance.random() < 0.5).encode("utf-8", "replace")
    header += b" " * (-len(header) % 8)
    length = chance.choice((len(header),) * 20 + (0, 1, len(header) - 1, len(header) + 8, 2**31, 2**62))
    return length.to_bytes(8, "little") + header + content[8 + int.from_bytes(content[:8], "little") :]


def damage_state(chance: random.Random, state: dict[Any, Any]) -> dict[Any, Any]:
    """A state dict as another node pack could make one."""
    state = dict(state)
    for _ in range(chance.choice((1, 1, 2))):
        key = chance.choice(list(state)) if state else "a.lora_A.weight"
        tensor = state.get(key, torch.zeros(2, 2))
        if not isinstance(tensor, torch.Tensor):
            continue
        with suppress(IndexError, RuntimeError, NotImplementedError):  # not every tensor can be made into every other
            state[key] = chance.choice(_TENSORS)(tensor)
        if key in state and chance.random() < 0.3:
            name = chance.choice(
                (None, 3, "", b"x", ("a", 1), f"{key}.alpha", key.upper() if isinstance(key, str) else key)
            )
            state[name] = state.pop(key)
    return state


_TENSORS: tuple[Callable[[torch.Tensor], Any], ...] = (
    lambda t: None,
    lambda t: [1, 2],
    lambda t: "text",
    lambda t: 3.0,
    lambda t: t[:0],
    lambda t: t.flatten(),
    lambda t: t.reshape(-1)[:1].reshape(()) if t.numel() else t,
    lambda t: t.to("meta"),
    lambda t: t.to_sparse() if t.ndim == 2 else t,
    lambda t: t.to(torch.complex64),
    lambda t: t.to(torch.int64),
    lambda t: t.bool(),
    lambda t: t.to(torch.float8_e4m3fn),
    lambda t: t.half(),
    lambda t: t * float("nan"),
    lambda t: t * float("inf"),
    lambda t: t.unsqueeze(0),
    lambda t: t.reshape(*t.shape, 1, 1),
    lambda t: t.transpose(0, -1) if t.ndim else t,
    lambda t: torch.zeros(3, 3),
    lambda t: torch.zeros(0),
    lambda t: torch.nn.Parameter(t) if t.is_floating_point() else t,
)
