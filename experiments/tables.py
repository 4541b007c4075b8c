"""Averages over datasets, and tables as Markdown.

As in the paper, Base and New are averaged first, over datasets and seeds (`scores.over_seeds`). H is the harmonic mean
of the averages.
"""

import statistics

from harness.scores import average


def over_datasets(by_dataset):
    """Averages over datasets: {score: number} for each seed that all of them have.

    by_dataset: for each dataset a list over seeds, {score: number} or None where the cell is missing.
    """
    cells = [of_seed for of_seed in zip(*by_dataset) if all(of_seed)]
    return [{score: average([cell[score] for cell in of_seed]) for score in of_seed[0]} for of_seed in cells]


def markdown(table):
    """A Markdown table with aligned columns, one string. table: lists of text, the first one is the head."""
    widths = [max(map(len, column)) for column in zip(*table)]
    lines = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths)) + " |" for line in table]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]])


def paired(ours, theirs):
    """(mean difference, its standard error, pairs that have the mean's sign, pairs) of two lists of numbers."""
    found = [one - other for one, other in zip(ours, theirs)]
    mean, count = statistics.mean(found), len(found)
    error = statistics.stdev(found) / count**0.5 if found[1:] else float("nan")
    return mean, error, sum(one * mean > 0 for one in found), count


def told(mean, error, agree, count):
    """A difference of `paired` as text: "none" where it is below two standard errors."""
    return f"{mean:+.2f} ± {error:.2f}, {agree} of {count}" + ("" if abs(mean) > 2 * error else ", none")
