"""Tables: a header, row keys, and one or two columns of values."""

from alignvlm_jax.data.synthetic.families import Questions
from alignvlm_jax.data.synthetic.layout import Page, Shape
from alignvlm_jax.data.synthetic.values import DoesNotFitError, Values

_TITLES = ("Stock", "Prices", "Results", "Orders", "Parts", "Trips", "List")
_KEY_HEADERS = ("Item", "Part", "Row", "Key")
_ONE_COLUMN = {
    "Price": "amount",
    "Cost": "amount",
    "Qty": "quantity",
    "Sales": "quantity",
    "Units": "quantity",
    "Net": "decimal",
    "Tax": "percent",
    "Share": "percent",
    "Code": "code",
    "Time": "time",
}
# Two columns besides the keys leave three or four characters each.
_TWO_COLUMNS = {"Qty": "count", "Net": "tenths", "Tax": "whole_percent", "Fee": "count", "Day": "count"}
_TWO_COLUMN_WIDTH = 11.0  # digits: on narrower pages two columns rarely fit


def compose(page: Page, values: Values) -> Questions:
    """Prints a table."""
    dice = page.dice
    if dice.chance(0.6):
        page.line(page.aligned(dice.pick(_TITLES), dice.pick((0.0, 0.5, 1.0))))
        page.gap(0, 5)

    two = page.width >= _TWO_COLUMN_WIDTH * page.face.digit and dice.chance(0.8)
    kinds = _TWO_COLUMNS if two else _ONE_COLUMN
    headers = dice.shuffled(tuple(kinds))[: 2 if two else 1]
    keys, body = [], []
    for _ in range(dice.integer(4, 6)):
        cells = [values.draw(getattr(values, kinds[header])) for header in headers]
        keys.append(values.name(3, 3 if two else 5, page.face, page.room(*cells)))
        body.append(cells)
    rows = [
        ["Key" if two else dice.pick(_KEY_HEADERS), *headers],
        *([key, *cells] for key, cells in zip(keys, body, strict=True)),
    ]
    cell_starts = page.columns(rows, last_right=dice.chance(0.6))
    if cell_starts is None:
        raise DoesNotFitError
    _print(page, rows, cell_starts)

    direct, reverse = [], []
    for key, cells in zip(keys, body, strict=True):
        for header, cell in zip(headers, cells, strict=True):
            phrasings = (
                f"What is the {header} of {key}?",
                f"Which {header} does {key} have?",
                f"What {header} has {key}?",
            )
            direct.append((phrasings, cell))
            reverse.append(((f"Which row has {cell}?", f"What has {header} {cell}?"), key))
    return Questions(tuple(direct), tuple(reverse))


def _print(page: Page, rows: list[list[str]], cell_starts: list[list[float]]) -> None:
    """Prints the rows of a table at these positions, with rules and bands."""
    dice = page.dice
    ruled, header_band = dice.chance(0.35), dice.chance(0.25)
    top = page.y
    for number, (row, starts) in enumerate(zip(rows, cell_starts, strict=True)):
        if number == 0 and header_band:
            page.shapes.append(Shape("fill", (-1.0, page.y, page.width + 1, page.y + page.pitch), "band"))
        page.line(*zip(row, starts, strict=True))
        if number == 0 and not header_band:
            page.rule("solid" if dice.chance(0.7) else None)
        elif ruled and number < len(rows) - 1:
            page.shapes.append(Shape("line", (0.0, page.y, page.width, page.y), "faint"))
    if dice.chance(0.25):
        page.shapes.append(Shape("frame", (-2.0, top - 1, page.width + 2, page.y + 1)))
