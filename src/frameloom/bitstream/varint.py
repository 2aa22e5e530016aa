"""Whole numbers in as few bytes as they need (LEB128): seven bits a byte, least significant first."""

from collections.abc import Iterable

from frameloom.errors import InputError


def pack_numbers(numbers: Iterable[int]) -> bytes:
    """Non-negative whole numbers as bytes."""
    out = bytearray()
    for number in numbers:
        while number > 0x7F:
            out.append(number & 0x7F | 0x80)
            number >>= 7
        out.append(number)
    return bytes(out)


def unpack_numbers(data: bytes, count: int, start: int = 0) -> tuple[list[int], int]:
    """`count` numbers (each below 2^63) from `data[start:]`, and where they end."""
    numbers = []
    for _ in range(min(count, len(data) - start + 1)):
        number = shift = 0
        while True:
            if start >= len(data) or shift > 56:
                raise InputError("a packed number is cut short or too large")
            byte = data[start]
            number |= (byte & 0x7F) << shift
            start, shift = start + 1, shift + 7
            if byte < 0x80:
                break
        numbers.append(number)
    return numbers, start
