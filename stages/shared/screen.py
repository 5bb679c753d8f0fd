"""Text of others on a screen: nothing of it can steer a terminal or look like another line."""

import reprlib

# A message that is longer tells nobody more.
LONGEST = 2000


def on_screen(text: object, most: int = LONGEST) -> str:
    """`text` on one line of at most `most` characters.

    What is not printable (control characters, line ends, marks of direction, half surrogate pairs)
    becomes its escape, such as \\x1b.
    """
    text = str(text)
    if len(text) > most:
        text = text[:most] + "…"
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def tell(text: str) -> None:
    """Print one line that holds text of others, at once."""
    print(on_screen(text), flush=True)


def brief(value: object) -> str:
    """`value` on one line of at most 60 characters; aliases in YAML can make it endless."""
    short = reprlib.Repr()
    short.maxstring = short.maxother = 60
    try:
        text = short.repr(value)
    except ValueError:
        return "a number of thousands of digits"
    return text if len(text) <= 60 else text[:57] + "..."
