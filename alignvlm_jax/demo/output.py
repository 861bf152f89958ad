"""Prints the demo's progress."""


def show(text: str) -> None:
    """Prints a line without buffering it, also if the output is a file or a pipe."""
    print(text, flush=True)


def show_heading(number: int, text: str) -> None:
    """Prints the heading of a step."""
    show(f"\n== {number}. {text}")
