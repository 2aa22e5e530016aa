"""Numbers as people read them."""


def in_bytes(count: int) -> str:
    """`38.1 MB`: an amount of bytes to three digits."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{count / scale:.3g} {unit}"
    return f"{count} B"
