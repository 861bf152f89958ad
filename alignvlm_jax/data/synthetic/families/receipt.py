"""Receipts: a shop, a date, items with prices, and a total."""

from alignvlm_jax.data.synthetic.families import Questions
from alignvlm_jax.data.synthetic.layout import Page
from alignvlm_jax.data.synthetic.values import Values

_TOTAL_LABELS = ("Total", "Total", "Sum", "To pay")
_DATE_LABELS = ("Date", "Day", "On")


def compose(page: Page, values: Values) -> Questions:
    """Prints a receipt."""
    dice = page.dice
    shop = values.name(4, 7, page.face, page.width)
    page.line(page.aligned(shop, dice.pick((0.0, 0.5, 0.5, 1.0))))
    if dice.chance(0.5):
        page.rule()

    date = values.draw(values.date, page.fits)
    label = dice.pick(_DATE_LABELS)
    if dice.chance(0.7) and page.fits(label, date):
        page.spread(label, date)
    else:
        page.line(page.aligned(date, dice.pick((0.0, 0.5, 1.0))))
    page.rule() if dice.chance(0.6) else page.gap(0, 8)

    items = []
    for _ in range(dice.integer(3, 5)):
        price = values.draw(values.amount, lambda price: page.room(price) >= 3 * page.face.capital)
        name = values.name(3, 6, page.face, page.room(price))
        items.append((name, price))
        page.spread(name, price)
    page.rule() if dice.chance(0.7) else page.gap(0, 8)

    total_label = dice.pick(_TOTAL_LABELS)
    total = values.draw(values.amount)
    if page.fits(total_label, total):
        page.spread(total_label, total)
    else:
        page.line((total_label, 0.0))
        page.line(page.aligned(total, dice.pick((0.0, 1.0))))

    return Questions(
        direct=(
            (("What is the total?", "How much is the total?", "What total is printed?"), total),
            (("What is the date?", "Which date is printed?", "What date is it?"), date),
            (("What is the shop?", "Which shop is it?", "What is the shop called?"), shop),
            *(
                ((f"What does {name} cost?", f"How much is {name}?", f"What is the price of {name}?"), price)
                for name, price in items
            ),
        ),
        reverse=tuple(((f"What costs {price}?", f"Which item costs {price}?"), name) for name, price in items),
    )
