"""Averages over seeds and datasets, and tables as Markdown.

As in the paper, Base and New are averaged first, over datasets and seeds. H is the harmonic mean of the averages.
"""

import statistics

from harness.scores import harmonic_mean

ORDER = {"Base": 0, "New": 1, "H": 2}  # other scores follow


def average(values):
    """The mean of numbers, or None where one of them is None."""
    return None if None in values else statistics.mean(values)


def over_datasets(by_dataset):
    """Averages over datasets: {score: number} for each seed that all of them have.

    by_dataset: for each dataset a list over seeds, {score: number} or None where the cell is missing.
    """
    cells = [of_seed for of_seed in zip(*by_dataset) if all(of_seed)]
    return [{score: average([cell[score] for cell in of_seed]) for score in of_seed[0]} for of_seed in cells]


def over_seeds(by_seed):
    """{score: (mean, standard deviation or None)} of a list over seeds of {score: number}; with Base and New also H.

    The mean of H is that of the averaged Base and New; its deviation is that of each seed's H.
    """
    each = {score: [cell[score] for cell in by_seed] for score in by_seed[0]}
    found = {score: average(values) for score, values in each.items()}
    if found.get("Base") is not None and found.get("New") is not None:
        each["H"] = [harmonic_mean(cell["Base"], cell["New"]) for cell in by_seed]
        found["H"] = harmonic_mean(found["Base"], found["New"])
    return {
        score: (found[score], statistics.stdev(each[score]) if by_seed[1:] and found[score] is not None else None)
        for score in sorted(found, key=lambda score: ORDER.get(score, len(ORDER)))
    }


def text(value, spread=None):
    """A number for a table, with its standard deviation behind it; "-" for None. Text stays as it is."""
    if value is None or isinstance(value, str):
        return value or "-"
    if isinstance(value, int):
        return f"{value:,}"
    told = f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.2f}"
    return told if spread is None else f"{told} ± {spread:.2f}"


def markdown(table):
    """A Markdown table with aligned columns, one string. table: lists of text, the first one is the head."""
    widths = [max(map(len, column)) for column in zip(*table)]
    lines = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths)) + " |" for line in table]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]])
