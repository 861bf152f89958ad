"""Forms: a title and a few fields, each label next to its value or above it."""

from collections.abc import Sequence

from alignvlm_jax.data.synthetic.families import Questions
from alignvlm_jax.data.synthetic.layout import Page, Shape
from alignvlm_jax.data.synthetic.values import Values

_TITLES = ("Order", "Permit", "Ticket", "Booking", "Claim", "Report", "Notice", "Visit")
_FIELDS = {
    "Name": "name",
    "City": "name",
    "Owner": "name",
    "Agent": "name",
    "Street": "name",
    "Bank": "name",
    "Date": "date",
    "Start": "date",
    "Expiry": "date",
    "Phone": "phone",
    "Fax": "phone",
    "Code": "code",
    "Number": "code",
    "Room": "code",
    "Amount": "amount",
    "Fee": "amount",
    "Price": "amount",
    "Time": "time",
    "Rate": "percent",
    "Weight": "quantity",
}


NAME_LABELS = tuple(label for label, kind in _FIELDS.items() if kind == "name")
OTHER_LABELS = tuple(label for label in _FIELDS if label not in NAME_LABELS)


def compose(page: Page, values: Values, labels: Sequence[str] | None = None) -> Questions:
    """Prints a form, from the top down.

    Args:
      page: page to print on.
      values: source of the fields' values.
      labels: labels of the fields; None draws three or four at random.
    """
    dice, face = page.dice, page.face
    if dice.chance(0.8):
        page.line(page.aligned(dice.pick(_TITLES), dice.pick((0.0, 0.5, 1.0))))
        page.rule() if dice.chance(0.6) else page.gap(1, 6)

    # One style for all fields of the form.
    colon = ":" if dice.chance(0.4) else ""
    above = dice.chance(0.4)
    boxed = dice.chance(0.3)
    indent = dice.uniform(0, 8) if dice.chance(0.5) else 0.0
    fields = []
    for label in labels or dice.shuffled(tuple(_FIELDS))[: dice.integer(3, 4)]:
        if _FIELDS[label] == "name":
            value = values.name(4, 7, face, page.width - 8)
        else:
            value = values.draw(getattr(values, _FIELDS[label]), lambda value: face.width(value) + 8 <= page.width)
        fields.append((label, value))
        printed = label + colon
        # Print the value next to its label if both fit on one line, and otherwise below the label.
        if not above and page.fits(printed, value):
            page.spread(printed, value) if dice.chance(0.3) else page.line(
                (printed, 0.0), (value, face.width(printed) + face.space)
            )
        else:
            page.line((printed, 0.0))
            page.y -= dice.uniform(0, 1)  # a value is slightly closer to its label than to the next field
            top = page.y
            page.line((value, min(indent, page.width - face.width(value)) if not boxed else 3.0))
            if boxed:
                page.shapes.append(Shape("frame", (0.0, top, page.width, page.y), "faint"))
        page.gap(0, 4)
        if dice.chance(0.2):
            page.rule("solid")

    return Questions(
        direct=tuple(
            ((f"What is the {field}?", f"Which {field} is given?", f"What {field} is written?"), value)
            for field, value in ((label.lower(), value) for label, value in fields)
        )
    )
