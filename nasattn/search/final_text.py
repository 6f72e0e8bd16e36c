"""What `Study.final` returned, in words: the table and the notes below it."""

from collections.abc import Mapping
from typing import Any

from nasattn.record import counted
from nasattn.search.final import Evaluation

ROLES = {"baseline": "plain", "control": "SE", "former": "left the frontier"}


def line(evaluation: Evaluation, blocks: str) -> str:
    """One evaluation that is done, on a line."""
    figures = {"test": evaluation.test, "val": evaluation.val}
    shown = [f"{split} {value:.4f}" for split, value in figures.items() if value is not None]
    outcome = ", ".join(shown) or f"failed: {evaluation.reason}"
    return f"final, seed {evaluation.seed}: {outcome}  {blocks}"


def count(final: Mapping[str, int]) -> str:
    """`3 of 10 evaluations, 1 failed`."""
    failed = f", {final['failed']} failed" if final["failed"] else ""
    return f"{final['done']} of {counted(final['evaluations'], 'evaluation')}{failed}"


def title(name: str, final: Mapping[str, Any]) -> str:
    return f"final of {name}: {counted(final['seeds'], 'seed')}, means with 95 % intervals"


def table(final: Mapping[str, Any]) -> list[list[str]]:
    """The head, then a row an architecture; a control below the first member of its sites, what
    has left the frontier last."""
    seeds, split = final["seeds"], judged_on(final)
    splits = dict.fromkeys((split, "val"))
    lines = [["trial", *splits, "gain", "over SE", "on the frontier", "blocks"]]
    for row in final["rows"]:
        figures = row[split] or {}
        share = figures.get("membership")
        lines.append(
            [
                _name(row),
                *(interval(row[s], seeds) for s in splits),
                interval(figures.get("gain"), seeds, "+"),
                interval(figures.get("over_control"), seeds, "+"),
                "-" if share is None else f"{share:.0%}",
                row["blocks"],
            ]
        )
    return lines


def notes(final: Mapping[str, Any]) -> list[str]:
    """What belongs below the table, the selection bias first."""
    seeds, split = final["seeds"], judged_on(final)
    lines = [
        f"the search's val minus the final {s} is {interval(gap['frontier'], seeds, '+')} for "
        f"{counted(gap['members'], 'member')} of the frontier and "
        f"{interval(gap['baseline'], seeds, '+')} for the plain backbone, which nothing selected: "
        f"selection bias {interval(gap['bias'], seeds, '+')}"
        for s in dict.fromkeys((split, "val"))
        if (gap := final["gap"][s])["frontier"]
    ]
    if lines and not final["same_schedule"]:
        lines.append(
            "the search trained by `training` and the final by `pretrain`: that is in both "
            "differences, and in the bias as far as it does more for the one than for the other"
        )
    anew = ", the plain backbone trained anew for each" if final["warm_start"] else ""
    lines.append(
        f"{final['done']} of {counted(final['evaluations'], 'evaluation')} done, "
        f"{final['failed']} failed; {counted(seeds, 'seed')}{anew}; a gain is on {split}, over the "
        "plain backbone, paired by seed; on the frontier: the probability to be non-dominated "
        "under the seeds' noise"
    )
    judged = final["judged"].get(split)
    if judged and seeds > 1:
        rivals = [r for r in final["rows"] if r["key"] in judged["rivals"]]
        out = [_name(r) for r in rivals if r["key"] not in judged["points"]]
        if out or judged["seeds"] < seeds:
            but = f"; left out, as it failed: {', '.join(out)}" if out else ""
            lines.append(
                f"on the frontier: by {counted(judged['seeds'], 'seed')}, which all that is "
                f"compared has{but}"
            )
    if seeds == 1:
        lines.append("one seed: an anecdote, not yet a finding")
    if seeds == 2:
        lines.append(
            "two seeds: with one degree of freedom an interval is far too wide, or by chance far "
            "too narrow; `final: {seeds: 3}` says more"
        )
    lines += [
        f"failed: seed {failure['seed']}, {row['blocks']}: {failure['reason']}"
        for row in final["rows"]
        for failure in row["failures"]
    ]
    return lines


def judged_on(final: Mapping[str, Any]) -> str:
    """The split that counts."""
    return "test" if final["test"] else "val"


def interval(estimate: Mapping[str, Any] | None, seeds: int, sign: str = "") -> str:
    """`0.9123 [0.9001, 0.9245]`, with the n where it is not `seeds`; `-` for what is not there."""
    if estimate is None:
        return "-"

    def digits(value: float) -> str:
        return f"{round(value, 4) + 0.0:{sign}.4f}"  # a sum with 0.0 is never -0.0

    text = digits(estimate["mean"])
    if estimate["low"] is not None:
        low, high = (estimate["low"], estimate["high"]) if sign else clipped(estimate)
        text += f" [{digits(low)}, {digits(high)}]"
    return text if estimate["n"] == seeds else f"{text} (n={estimate['n']})"


def clipped(accuracy: Mapping[str, Any]) -> tuple[float, float]:
    """The ends of an accuracy's interval, as far as there are accuracies."""
    mean = accuracy["mean"]
    low, high = (mean if end is None else end for end in (accuracy["low"], accuracy["high"]))
    return max(0.0, low), min(1.0, high)


def _name(row: Mapping[str, Any]) -> str:
    """`7`, `(SE)` for a control, `7 (left the frontier)`."""
    said = ", ".join(ROLES[role] for role in row["roles"] if role in ROLES)
    number = "" if row["number"] is None else str(row["number"])
    return f"{number} ({said})".strip() if said else number
