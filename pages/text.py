"""Text of unknown origin, such as names in a data set, for a terminal or a page."""


def shown(text: object, most: int | None = None) -> str:
    """Text of unknown origin for people's eyes: on one line, without control characters, at most so many characters."""
    clean = "".join(c if c.isprintable() else " " if c.isspace() else "\N{REPLACEMENT CHARACTER}" for c in str(text))
    return clean if most is None or len(clean) <= most else clean[: most - 1] + "…"
