"""Generated blocks of the documentation: what stands between two comments that name it.

**Invariant**: only the text between the comments is replaced.
"""

import re
from typing import Final

_BLOCK: Final = "<!-- generated: {name} -->\n{text}<!-- end of generated: {name} -->"


def names(text: str) -> list[str]:
    """Return the names of the blocks of a page, in order."""
    return re.findall(r"^<!-- generated: (.+) -->$", text, re.MULTILINE)


def with_block(text: str, name: str, block: str) -> str:
    """Return the page with the named block replaced. Raises ValueError if it has none, or several."""
    pattern = re.escape(_BLOCK).replace(r"\{name\}", re.escape(name)).replace(r"\{text\}", "(.*?)")
    found = re.findall(pattern, text, re.DOTALL)
    if len(found) != 1:
        raise ValueError(f"expected one block {name!r}, got {len(found)}")
    return re.sub(pattern, lambda _: _BLOCK.format(name=name, text=f"\n{block.strip()}\n\n"), text, flags=re.DOTALL)
