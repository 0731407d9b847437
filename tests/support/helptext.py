"""What a help text says, without how typer lays it out: in one way before 0.27, in another one since."""

import re


def words(text: str) -> str:
    """The words of a text, in lower case and with single spaces."""
    plain = text.lower().replace("<str>", "text")
    return " ".join(re.sub(r"[<>{}\[\]]", "", plain).split())
