"""Reads structs in Thrift's compact protocol, as parquet has them in footers and page headers (Apache Thrift, thrift-compact-protocol).

For bytes that nobody vouches for: what makes no sense raises MalformedThrift, and bytes that end too early IndexError.
"""

from __future__ import annotations

from typing import Any

_TRUE, _FALSE, _BYTE, _DOUBLE, _BINARY, _LIST, _SET, _STRUCT = 1, 2, 3, 7, 8, 9, 10, 12
_INTEGERS = (4, 5, 6)
_MAX_DEPTH = 24
_MAX_BITS = 70


class MalformedThrift(ValueError):
    """Bytes that are no struct."""


def next_field(data: bytes, position: int, number: int) -> tuple[int, int, int]:
    """Number, type and position of the value of the field at `position`; type 0 at the struct's end. number: of the field before."""
    kind, delta = data[position] & 0x0F, data[position] >> 4
    position += 1
    if kind and delta:
        number += delta
    elif kind:
        number, position = integer(data, position)
    return number, kind, position


def read_struct(data: bytes, position: int, depth: int = 0) -> tuple[dict[int, Any], int]:
    """The fields of a struct by number, and the position after it. Of strings and lists of anything but integers only None is kept."""
    if depth > _MAX_DEPTH:
        raise MalformedThrift("structs are nested too deeply")
    found: dict[int, Any] = {}
    number = 0
    while True:
        number, kind, position = next_field(data, position, number)
        if not kind:
            return found, position
        if kind in (_TRUE, _FALSE):
            found[number] = kind == _TRUE
        else:
            found[number], position = read_value(kind, data, position, depth)


def read_value(kind: int, data: bytes, position: int, depth: int = 0) -> tuple[Any, int]:
    """A value of a type and the position after it."""
    if kind in _INTEGERS:
        return integer(data, position)
    if kind == _STRUCT:
        return read_struct(data, position, depth + 1)
    if kind == _BINARY:
        size, position = _varint(data, position)
        return None, _within(data, position + size)
    if kind in (_TRUE, _FALSE, _BYTE):
        return None, _within(data, position + 1)
    if kind == _DOUBLE:
        return None, _within(data, position + 8)
    if kind in (_LIST, _SET):
        inner, size, position = list_header(data, position)
        values: list[Any] = []
        for _ in range(size):
            value, position = read_value(inner, data, position, depth + 1)
            if inner in _INTEGERS:
                values.append(value)
        return values if inner in _INTEGERS else None, position
    raise MalformedThrift(f"a value has the unknown type {kind}")


def list_header(data: bytes, position: int) -> tuple[int, int, int]:
    """Type and number of the values of a list, and the position of the first."""
    size, inner = data[position] >> 4, data[position] & 0x0F
    position += 1
    if size == 15:
        size, position = _varint(data, position)
    return inner, size, position


def integer(data: bytes, position: int) -> tuple[int, int]:
    """A signed number and the position after it."""
    value, position = _varint(data, position)
    return (value >> 1) ^ -(value & 1), position


def _varint(data: bytes, position: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
        shift += 7
        if shift >= _MAX_BITS:
            raise MalformedThrift("a number is too long")


def _within(data: bytes, position: int) -> int:
    if position > len(data):
        raise IndexError(position)
    return position
