"""Levenshtein distance between two texts."""


def edit_distance(left: str, right: str) -> int:
    """Returns the smallest number of code points to insert, delete or replace to turn one text into the other."""
    # One row of the distance matrix is kept: row[j] is the distance between the letters of `left` so far and right[:j].
    row = list(range(len(right) + 1))
    for i, letter in enumerate(left, start=1):
        diagonal, row[0] = row[0], i
        for j, other in enumerate(right, start=1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (letter != other))
    return row[-1]
