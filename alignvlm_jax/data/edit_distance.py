"""How far two texts are apart: Levenshtein's distance."""


def edit_distance(left: str, right: str) -> int:
    """The fewest insertions, deletions and substitutions of code points between two texts."""
    row = list(range(len(right) + 1))
    for i, letter in enumerate(left, start=1):
        diagonal, row[0] = row[0], i
        for j, other in enumerate(right, start=1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (letter != other))
    return row[-1]
