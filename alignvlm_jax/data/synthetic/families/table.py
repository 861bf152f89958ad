"""Tables: a header, row keys, one or two columns of values."""

from alignvlm_jax.data.synthetic.families import Questions
from alignvlm_jax.data.synthetic.layout import Page, Shape
from alignvlm_jax.data.synthetic.values import DoesNotFitError, Values

_TITLES = ("Stock", "Prices", "Results", "Orders", "Parts", "Trips", "List")
_KEY_HEADERS = ("Item", "Part", "Row", "Key")
_COLUMNS = {
    "Price": "amount",
    "Cost": "amount",
    "Qty": "quantity",
    "Sold": "quantity",
    "Left": "quantity",
    "Net": "decimal",
    "Tax": "percent",
    "Share": "percent",
    "Code": "code",
    "Time": "time",
}
_SHORT_CELL, _LONG_CELL = 4, 6  # characters


def compose(page: Page, values: Values) -> Questions:
    dice, face = page.dice, page.face
    if dice.chance(0.6):
        page.line(page.aligned(dice.pick(_TITLES), dice.pick((0.0, 0.5, 1.0))))
        page.gap(0, 5)

    two = dice.chance(0.4)
    headers = dice.shuffled(tuple(_COLUMNS))[: 2 if two else 1]
    keys, body = [], []
    for _ in range(dice.integer(4, 6)):
        key = values.draw(values.name(3, 3) if two else values.name(3, 5))
        longest = _SHORT_CELL if two else _LONG_CELL
        body.append(
            [
                values.draw(getattr(values, _COLUMNS[h]), lambda cell: len(cell) <= longest and (two or page.fits(key, cell)))
                for h in headers
            ]
        )
        keys.append(key)
    rows = [[dice.pick(_KEY_HEADERS), *headers], *([key, *cells] for key, cells in zip(keys, body, strict=True))]
    right = dice.chance(0.6)
    places = page.columns(rows, right)
    if places is None and not two:
        raise DoesNotFitError
    if places is None:  # the second column is one too many
        headers, rows = headers[:1], [row[:2] for row in rows]
        body = [cells[:1] for cells in body]
        places = page.columns(rows, right)
        if places is None:
            raise DoesNotFitError

    ruled, header_band = dice.chance(0.35), dice.chance(0.25)
    top = page.y
    for number, (row, starts) in enumerate(zip(rows, places, strict=True)):
        if number == 0 and header_band:
            page.shapes.append(Shape("fill", (-1.0, page.y, page.width + 1, page.y + page.pitch), "band"))
        page.line(*zip(row, starts, strict=True))
        if number == 0 and not header_band:
            page.rule("solid" if dice.chance(0.7) else None)
        elif ruled and number < len(rows) - 1:
            page.shapes.append(Shape("line", (0.0, page.y, page.width, page.y), "faint"))
    if dice.chance(0.25):
        page.shapes.append(Shape("frame", (-2.0, top - 1, page.width + 2, page.y + 1)))

    direct, reverse = [], []
    for key, cells in zip(keys, body, strict=True):
        for header, cell in zip(headers, cells, strict=True):
            direct.append(((f"What is the {header} of {key}?", f"What {header} has {key}?", f"Which {header} is in row {key}?"), cell))
            reverse.append(((f"Which row has {cell}?", f"What has {header} {cell}?"), key))
    return Questions(tuple(direct), tuple(reverse))
