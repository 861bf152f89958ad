"""One file a family. Each has `compose(page, values) -> Questions`: print a document, say what may be asked of it."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Questions:
    """(phrasings, answer) pairs. `reverse` holds the ones that ask from the value back to its name: asked rarely."""

    direct: tuple[tuple[tuple[str, ...], str], ...]
    reverse: tuple[tuple[tuple[str, ...], str], ...] = ()
