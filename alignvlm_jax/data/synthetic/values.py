"""Values that documents print (invented names, amounts, dates, codes) and the split that each value belongs to.

A value belongs to a split by a hash of its letters and digits, for every seed and every corpus ("$48.20" and "48.20"
belong to the same split). A document redraws a value until it belongs to the document's split. No value printed in a
held-out document was therefore ever printed in a training document: a correct answer on held-out documents was read,
not remembered. Labels ("Total", "City") are few, fixed and shared.
"""

import hashlib
from collections.abc import Callable

from alignvlm_jax.data.synthetic.dice import Dice
from alignvlm_jax.data.synthetic.fonts import Face

SPLITS = ("train", "validation", "heldout")
_TRAIN_SHARE, _VALIDATION_SHARE = 0.80, 0.08

CONSONANTS = "BCDFGHJKLMNPQRSTVWXYZ"
_VOWELS = "AEIOU"
NAME_PATTERNS = {
    3: ("CVC", "VCV", "VCC"),
    4: ("CVCV", "CVCC", "VCVC"),
    5: ("CVCVC", "CVCCV", "VCCVC"),
    6: ("CVCCVC", "CVCVCV", "VCVCVC"),
    7: ("CVCCVCV", "CVCVCVC", "CVCVCCV"),
}
_PUNCTUATION = str.maketrans("", "", ".,-/%$#: ")
_TRIES = 200


def spell_name(dice: Dice, pattern: str) -> str:
    """Returns a random name with this pattern of consonants (C) and vowels (V)."""
    return "".join([dice.pick(CONSONANTS if letter == "C" else _VOWELS) for letter in pattern])


class DoesNotFitError(Exception):
    """No value of this kind fits the available space. The page is then laid out again."""


def split_of(value: str) -> str:
    """Returns the only split whose documents may print this value."""
    # The first 32 bits of the hash as a number from 0 to 1.
    share = int.from_bytes(hashlib.sha256(value.translate(_PUNCTUATION).encode()).digest()[:4], "big") / 2**32
    if share < _TRAIN_SHARE:
        return "train"
    return "validation" if share < _TRAIN_SHARE + _VALIDATION_SHARE else "heldout"


class Values:
    """Draws values of one split, without repetitions on a page."""

    def __init__(self, dice: Dice, split: str):
        self._dice = dice
        self._split = split
        self._printed: set[str] = set()
        # A page writes all its amounts and dates in the same way.
        self._dollar = dice.chance(0.35)
        self._date_separator = dice.pick("//-.")

    def draw(self, kind: Callable[[], str], fits: Callable[[str], bool] = lambda value: True) -> str:
        """Returns a fitting value of this kind (`values.amount`, `values.date`, ...) that is new on the page.

        Args:
          kind: draws a value.
          fits: returns whether a value fits.

        Raises:
          DoesNotFitError: if no value of the split fits after many tries.
        """
        for _ in range(_TRIES):
            value = kind()
            if value not in self._printed and fits(value) and split_of(value) == self._split:
                self._printed.add(value)
                return value
        raise DoesNotFitError

    def name(self, shortest: int, longest: int, face: Face, room: float) -> str:
        """Returns an invented name like TORVAL or MEB, of `shortest` to `longest` letters and at most `room` px."""
        dice = self._dice
        # Skip lengths that hardly ever fit: drawing values again is most of the cost of a document.
        longest = min(longest, max(shortest, int(room / face.capital)))
        if room < 0.85 * shortest * face.capital:
            raise DoesNotFitError

        def make() -> str:
            return spell_name(dice, dice.pick(NAME_PATTERNS[dice.integer(shortest, longest)]))

        return self.draw(make, lambda name: face.width(name) <= room)

    def amount(self) -> str:
        """Returns an amount like 48.20 or 128.40 or, on a page in dollars, $7.35."""
        units = self._dice.integer(1, 99) if self._dice.chance(0.8) else self._dice.integer(100, 999)
        return f"{'$' if self._dollar else ''}{units}.{self._dice.integer(0, 99):02d}"

    def date(self) -> str:
        """Returns a date like 21.03.19, with the document's separator."""
        dice, separator = self._dice, self._date_separator
        day, month, year = dice.integer(1, 28), dice.integer(1, 12), dice.integer(0, 49)
        return f"{day:02d}{separator}{month:02d}{separator}{year:02d}"

    def code(self) -> str:
        """Returns a code like RQ-5821, #48215 or K7-204."""
        dice = self._dice
        form = dice.integer(0, 2)
        if form == 0:
            return f"{self._letter()}{self._letter()}-{dice.integer(100, 9999)}"
        if form == 1:
            return f"#{dice.integer(1000, 99999)}"
        return f"{self._letter()}{dice.integer(0, 9)}-{dice.integer(100, 999)}"

    def phone(self) -> str:
        """Returns a phone number like 555-0142."""
        return f"{self._dice.integer(200, 999)}-{self._dice.integer(0, 9999):04d}"

    def time(self) -> str:
        """Returns a time like 08:45."""
        return f"{self._dice.integer(0, 23):02d}:{self._dice.integer(0, 59):02d}"

    def quantity(self) -> str:
        """Returns an integer of three to five digits."""
        digits = self._dice.pick((3, 4, 4, 5, 5))
        return str(self._dice.integer(10 ** (digits - 1), 10**digits - 1))

    def count(self) -> str:
        """Returns an integer of three digits, for narrow columns."""
        return str(self._dice.integer(100, 999))

    def percent(self) -> str:
        """Returns a percentage like 12.5%."""
        return f"{self._dice.integer(1, 99)}.{self._dice.integer(0, 9)}%"

    def whole_percent(self) -> str:
        """Returns a percentage like 45%."""
        return f"{self._dice.integer(10, 99)}%"

    def tenths(self) -> str:
        """Returns a number like 4.5."""
        return f"{self._dice.integer(1, 9)}.{self._dice.integer(0, 9)}"

    def decimal(self) -> str:
        """Returns a number like 37.2."""
        return f"{self._dice.integer(1, 99)}.{self._dice.integer(0, 9)}"

    def _letter(self) -> str:
        # I and O are excluded, because they look like 1 and 0 among digits.
        return self._dice.pick("ABCDEFGHJKLMNPQRSTUVWXYZ")
