"""MessagePack, the little of it that scripts read: lists, texts, bytes and integers below 2^63. Source: the MessagePack specification."""

import struct
from collections.abc import Iterable

Packable = int | str | bytes | Iterable["Packable"]


class Packed(bytes):
    """What is packed already: part of something larger as it is."""

    __slots__ = ()


def packed(value: Packable) -> Packed:
    """Returns the value as `cmsgpack.unpack` reads it."""
    out = bytearray()
    _pack(value, out)
    return Packed(out)


def _pack(value: Packable, out: bytearray) -> None:
    if isinstance(value, int):
        _pack_integer(value, out)
    elif isinstance(value, Packed):
        out += value
    elif isinstance(value, str | bytes):
        text = value.encode() if isinstance(value, str) else value
        # A text of up to 31 bytes has its length in its tag; Lua makes no difference between texts and bytes.
        out += bytes((0xA0 | len(text),)) if len(text) < 32 else struct.pack(">BI", 0xDB, len(text))
        out += text
    else:
        items = list(value)
        out += bytes((0x90 | len(items),)) if len(items) < 16 else struct.pack(">BI", 0xDD, len(items))
        for item in items:
            _pack(item, out)


def _pack_integer(value: int, out: bytearray) -> None:
    if 0 <= value < 128:
        out.append(value)
    elif 0 <= value < 1 << 32:
        out += struct.pack(">BI", 0xCE, value)
    else:
        out += struct.pack(">Bq", 0xD3, value)


def unpacked(data: bytes) -> Packable:
    """Returns what a script packed. Raises: ValueError for what scripts never write."""
    value, _ = _unpack(data, 0)
    return value


_SIZES = {0xCC: ">B", 0xCD: ">H", 0xCE: ">I", 0xCF: ">Q", 0xD0: ">b", 0xD1: ">h", 0xD2: ">i", 0xD3: ">q", 0xCB: ">d"}
_LENGTHS = {0xD9: ">B", 0xDA: ">H", 0xDB: ">I", 0xC4: ">B", 0xC5: ">H", 0xC6: ">I", 0xDC: ">H", 0xDD: ">I"}


def _unpack(data: bytes, at: int) -> tuple[Packable, int]:
    tag, at = data[at], at + 1
    if tag < 0x80:
        return tag, at
    if tag >= 0xE0:
        return tag - 256, at
    if tag in _SIZES:
        form = _SIZES[tag]
        return int(struct.unpack_from(form, data, at)[0]), at + struct.calcsize(form)
    if 0x90 <= tag < 0xA0:
        return _unpack_list(data, at, tag & 0x0F)
    if 0xA0 <= tag < 0xC0:
        return data[at : at + (tag & 0x1F)], at + (tag & 0x1F)
    if tag not in _LENGTHS:
        msg = f"no script writes the tag {tag:#x}"
        raise ValueError(msg)
    form = _LENGTHS[tag]
    (length,), at = struct.unpack_from(form, data, at), at + struct.calcsize(form)
    return _unpack_list(data, at, length) if tag >= 0xDC else (data[at : at + length], at + length)


def _unpack_list(data: bytes, at: int, length: int) -> tuple[Packable, int]:
    items: list[Packable] = []
    for _ in range(length):
        item, at = _unpack(data, at)
        items.append(item)
    return items, at
