"""The tables of RESULTS.md, from what bench.py measured: python tables.py [cpu | cuda]"""

import sys
from collections.abc import Callable, Iterable

import numpy as np
from bench import HERE, SIDES, Row, read

PARTS = ("forward", "backward", "wall", "fastest")


def column(rows: list[Row], name: str) -> list[str]:
    return list(dict.fromkeys(row[name] for row in rows))


def matrix(rows: list[Row], cell: Callable[[Row], str]) -> Iterable[str]:
    """Blocks down, shapes across."""
    shapes = column(rows, "shape")
    yield "| block | " + " | ".join(shapes) + " |"
    yield "|---|" + "--:|" * len(shapes)
    for label in column(rows, "block"):
        of = {row["shape"]: cell(row) for row in rows if row["block"] == label}
        yield f"| {label} | " + " | ".join(of.get(shape, "") for shape in shapes) + " |"


def ratio(row: Row) -> str:
    """Naive over ours and its quartiles; bold where even the upper one is below 1."""
    if row["skipped"]:
        return f"({row['skipped']})"
    middle, low, high = (float(row[f"ratio{q}"]) for q in ("", "_q1", "_q3"))
    shown = f"**{digits(middle)}**" if high < 1 else digits(middle)
    return f"{shown} ({digits(low)} to {digits(high)})"


def memory(row: Row) -> str:
    naive = digits(row["naive_mib"]) if row["naive_mib"] else row["skipped"]
    return f"{naive} / {digits(row['ours_mib'])}"


def details(rows: list[Row]) -> Iterable[str]:
    for shape in column(rows, "shape"):
        yield f"\n#### {shape}\n"
        yield "| block | n | naive ms | ours ms | " + " | ".join(PARTS) + " |"
        yield "|---|" + "--:|" * (3 + len(PARTS))
        for row in (row for row in rows if row["shape"] == shape):
            naive = row["skipped"] or spread(row, "naive_step_ms")
            parts = [digits(row[f"ratio_{p}"]) if not row["skipped"] else "" for p in PARTS]
            cells = (row["repeats"], naive, spread(row, "ours_step_ms"), *parts)
            yield f"| {row['block']} | " + " | ".join(cells) + " |"


def spread(row: Row, name: str) -> str:
    return f"{digits(row[name])} ({digits(row[f'{name}_q1'])} to {digits(row[f'{name}_q3'])})"


def growth(rows: list[Row]) -> Iterable[str]:
    """Peak memory by side, and the exponent of N that fits it best."""
    yield "| block | form | " + " | ".join(f"{side} px" for side in SIDES) + " | exponent |"
    yield "|---|---|" + "--:|" * (len(SIDES) + 1)
    for label in column(rows, "block"):
        for form in ("naive", "ours"):
            of = [r for r in rows if (r["block"], r["form"]) == (label, form)]
            points = np.log([(int(r["side"]) ** 2, float(r["mib"])) for r in of if r["mib"]])
            slope = ""
            if len(points) > 2:
                slope = f"{np.polyfit(points[:, 0], points[:, 1], 1)[0]:.2f}"
            cells = [digits(r["mib"]) if r["mib"] else r["skipped"] for r in of]
            yield f"| {label} | {form} | " + " | ".join((*cells, slope)) + " |"


def digits(value: str | float) -> str:
    """Three of them."""
    number = float(value)
    return (
        f"{number:,.0f}" if number >= 100 else f"{number:.2f}" if number < 10 else f"{number:.1f}"
    )


def main() -> None:
    device = sys.argv[1] if len(sys.argv) > 1 else "cpu"
    speeds = read(HERE / f"speed_{device}.csv")
    for title, table in {
        "Time, naive / ours": matrix(speeds, ratio),
        "Peak memory in MiB, naive / ours": matrix(speeds, memory),
        "Growth of peak memory in MiB": growth(read(HERE / f"growth_{device}.csv")),
        "Times in full": details(speeds),
    }.items():
        print(f"\n### {title}\n", *table, sep="\n")


if __name__ == "__main__":
    main()
