"""Charts: horizontal or upright bars, or a curve with markers; every mark has a name and a value.

A chart is transcribed mark by mark, "MAR 4821", from the top or from the left, as a person would read it aloud.
"""

from collections.abc import Callable

from alignvlm_jax.data.synthetic.families import Questions
from alignvlm_jax.data.synthetic.layout import Page, Shape
from alignvlm_jax.data.synthetic.values import DoesNotFitError, Values

_TITLES = ("Sales", "Visits", "Rain", "Power", "Growth", "Output", "Votes", "Stock")
_KINDS = ("quantity", "percent", "decimal", "quantity")


def compose(page: Page, values: Values) -> Questions:
    """Prints a chart."""
    dice = page.dice
    direct = []
    if dice.chance(0.5):
        page.line(page.aligned(dice.pick(_TITLES), dice.pick((0.0, 0.5))))
        page.gap(0, 4)
    elif dice.chance(0.6):
        title = values.name(4, 7, page.face, page.width)
        page.line(page.aligned(title, dice.pick((0.0, 0.5))))
        page.gap(0, 4)
        direct.append((("What is the title?", "What is the chart called?", "Which title is printed?"), title))

    draw = dice.pick((_bars_across, _bars_under, _bars_upright, _curve))
    marks = draw(page, values, getattr(values, dice.pick(_KINDS)))
    reverse = []
    for name, value in marks:
        direct.append(((f"What is the value for {name}?", f"What value has {name}?", f"How much is {name}?"), value))
        reverse.append(((f"Which one has {value}?", f"What has the value {value}?"), name))
    return Questions(tuple(direct), tuple(reverse))


def _bars_across(page: Page, values: Values, kind: Callable[[], str]) -> list[tuple[str, str]]:
    """Prints name, bar and value in one row; values are right of the longest bar, or each at the end of its bar."""
    dice, face = page.dice, page.face
    names, numbers = _draw_marks(page, values, kind, dice.integer(3, 5), dice.pick((3, 4)), 5)
    name_width, number_width = (max(face.width(text) for text in texts) for texts in (names, numbers))
    # From left to right: names, aligned at the axis, then bars and values.
    left = name_width + face.space * 0.6
    room = page.width - left - number_width - face.space * 0.6
    if room < 8:
        raise DoesNotFitError
    at_end = dice.chance(0.5)
    first = page.y
    for name, number, share in zip(names, numbers, _shares(numbers), strict=True):
        top = page.y
        length = room * share
        page.line(
            (name, name_width - face.width(name)),
            (number, left + length + face.space * 0.6 if at_end else page.width - face.width(number)),
        )
        page.shapes.append(Shape("fill", (left, top + 3, left + length, top + page.pitch - 3), "mark"))
        page.gap(0, 2)
    page.shapes.append(Shape("line", (left, first, left, page.y)))
    return list(zip(names, numbers, strict=True))


def _bars_under(page: Page, values: Values, kind: Callable[[], str]) -> list[tuple[str, str]]:
    """Prints name and value on a line, with a horizontal bar below it."""
    dice = page.dice
    names, numbers = _draw_marks(page, values, kind, dice.integer(3, 5), 5, 6)
    thickness = dice.uniform(2, 5)
    for name, number, share in zip(names, numbers, _shares(numbers), strict=True):
        page.spread(name, number)
        page.shapes.append(Shape("fill", (0.0, page.y, page.width * share, page.y + thickness), "mark"))
        page.y += thickness + dice.uniform(1, 3)
    return list(zip(names, numbers, strict=True))


def _bars_upright(page: Page, values: Values, kind: Callable[[], str]) -> list[tuple[str, str]]:
    """Prints bars on an axis, each with its value above and its name below the axis."""
    names, numbers, centers, tops, axis = _upright_marks(page, values, kind)
    half = page.dice.uniform(5, min(11, page.width / len(names) / 2 - 2))
    for center, top in zip(centers, tops, strict=True):
        page.shapes.append(Shape("fill", (center - half, top, center + half, axis), "mark"))
    page.shapes.append(Shape("line", (0.0, axis, page.width, axis)))
    return list(zip(names, numbers, strict=True))


def _curve(page: Page, values: Values, kind: Callable[[], str]) -> list[tuple[str, str]]:
    """Prints markers joined by a line, each with its value above and its name below the axis."""
    dice, face = page.dice, page.face
    names, numbers, centers, tops, axis = _upright_marks(page, values, kind)
    points = [coordinate for point in zip(centers, tops, strict=True) for coordinate in point]
    page.shapes.append(Shape("line", tuple(points), "mark", width=dice.integer(1, 2)))
    for number, center, top in zip(numbers, centers, tops, strict=True):
        # Clear the paper behind the number, because a steep curve would run through it.
        half = face.width(number) / 2
        page.shapes.append(Shape("fill", (center - half, top - 5 - face.cap_height, center + half, top - 3), "paper"))
        page.shapes.append(Shape("dot", (center, top, dice.uniform(1.6, 2.6)), "mark"))
    page.shapes.append(Shape("line", (0.0, axis, page.width, axis)))
    if dice.chance(0.5):
        page.shapes.append(Shape("line", (0.0, min(tops) - 6, 0.0, axis)))
    return list(zip(names, numbers, strict=True))


def _upright_marks(
    page: Page, values: Values, kind: Callable[[], str]
) -> tuple[list[str], list[str], list[float], list[float], float]:
    """Prints two or three names under an axis, with their values at proportional heights.

    Returns:
      Names, numbers, the x of each mark, the y of its top, and the y of the axis.
    """
    dice, face = page.dice, page.face
    count = 3 if dice.chance(0.6) else 2
    column = page.width / count
    numbers = [values.draw(kind, lambda number: face.width(number) + 3 <= column) for _ in range(count)]
    names = [values.name(3, 4 if count == 2 else 3, face, column - 3) for _ in range(count)]
    # From top to bottom: values, marks, axis, names.
    tallest = dice.uniform(40, 80)
    number_room = face.cap_height + 5
    axis = page.y + number_room + tallest
    baseline = axis + 4 + face.cap_height
    centers = [column * (i + 0.5) for i in range(count)]
    tops = [axis - tallest * share for share in _shares(numbers)]
    for name, number, center, top in zip(names, numbers, centers, tops, strict=True):
        page.print_text(name, center - face.width(name) / 2, baseline)
        page.print_text(number, center - face.width(number) / 2, top - 4)
        page.lines.append(f"{name} {number}")
    page.y = baseline + 3
    return names, numbers, centers, tops, axis


def _draw_marks(
    page: Page, values: Values, kind: Callable[[], str], count: int, longest_name: int, longest_number: int
) -> tuple[list[str], list[str]]:
    """Returns names and numbers such that each pair fits on one line."""
    numbers = [values.draw(kind, lambda number: len(number) <= longest_number) for _ in range(count)]
    return [values.name(3, longest_name, page.face, page.room(number)) for number in numbers], numbers


def _shares(numbers: list[str]) -> list[float]:
    """Returns each value as a share of the largest; small values are kept visible."""
    amounts = [float(number.rstrip("%")) for number in numbers]
    return [max(amount / max(amounts), 0.06) for amount in amounts]
