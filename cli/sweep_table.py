"""The table of a sweep: a row per cell, with confidence intervals, and paired differences to the control.  Imports no torch.

Accuracies and differences are in percent.  None, an empty cell of the CSV, is undefined: the standard deviation of one value, or
interval and p-value of equal values.
"""
from collections import Counter
from statistics import fmean, stdev

from scipy.special import stdtr, stdtrit  # Student's t of n degrees of freedom, and its inverse

from rundir import files

SAME = 1e-9  # percent: smaller differences are rounding errors


def spread(values: list[float]) -> tuple[float | None, float | None, float | None, float | None, float | None]:
    """Mean, sample SD, 95 % confidence interval of the mean, and two-sided p-value against 0, by Student's t."""
    if len(values) < 2:
        return (*values, *[None] * (5 - len(values)))
    mean, n = fmean(values), len(values)
    if max(values) - min(values) < SAME:
        return mean, 0.0, None, None, None
    deviation = stdev(values)
    error = deviation / n ** 0.5
    half = float(stdtrit(n - 1, 0.975)) * error
    return mean, deviation, mean - half, mean + half, 2 * float(stdtr(n - 1, -abs(mean) / error))


def row_of(label: str, results: dict[int, dict], control: dict[int, dict] | None, metric: str) -> dict:
    """CSV column -> value of a cell.  results: seed -> summary, or only a verdict; control: the control's, None in its row."""
    finished, others = ({seed: summary for seed, summary in each.items() if metric in summary}
                        for each in (results, control or {}))
    mean, deviation, low, high, _ = spread([summary[metric] for summary in finished.values()])
    pairs = [summary[metric] - others[seed][metric] for seed, summary in finished.items() if seed in others]
    difference, _, difference_low, difference_high, p = spread(pairs)
    verdicts = Counter(summary["verdict"] for summary in results.values())
    return {
        "flags": label, "n": len(finished), "diverged": verdicts["diverged"],
        "mean": mean, "sd": deviation, "ci_low": low, "ci_high": high, "pairs": None if control is None else len(pairs),
        "difference": difference, "difference_ci_low": difference_low, "difference_ci_high": difference_high, "p": p,
        "last": fmean(summary["test_acc1_last"] for summary in finished.values()) if finished else None,
        "verdicts": ", ".join(f"{count} {verdict}" for verdict, count in sorted(verdicts.items())),
        "minutes": fmean(summary["wall_s"] for summary in finished.values()) / 60 if finished else None,
    }


COLUMNS = {  # header: format of a row's values
    "flags": "{flags}", "n": "{n}", "diverged": "{diverged}", "accuracy (%)": "{mean:.2f}", "SD": "{sd:.2f}",
    "95 % interval": "{ci_low:.2f} to {ci_high:.2f}", "pairs": "{pairs:d}", "difference": "{difference:+.2f}",
    "its 95 % interval": "{difference_ci_low:+.2f} to {difference_ci_high:+.2f}", "p": "{p:.3f}", "last (%)": "{last:.2f}",
    "verdicts": "{verdicts}", "minutes": "{minutes:.1f}",
}
LEFT = {"flags", "verdicts"}


def cell(row: dict, form: str) -> str:
    try:
        text = form.format_map(row) or "-"
    except TypeError:  # None has no such format
        return "-"
    return "<0.001" if form == COLUMNS["p"] and row["p"] < 0.001 else text


def table(results: dict[str, dict[int, dict]], control: str, metric: str, missing: int) -> tuple[list[dict], str]:
    """The rows, and the note below.

    results: label of a cell -> seed -> summary, or only a verdict.  control: label of a cell.  missing: number of failed runs.
    """
    rows = [row_of(label, each, None if label == control else results[control], metric) for label, each in results.items()]
    runs = [summary for each in results.values() for summary in each.values()]
    seeds = sorted({seed for each in results.values() for seed in each})
    selected = ", ".join(sorted({summary["selected_on"] for summary in runs if "selected_on" in summary})) or "nothing yet"
    weights = {"test_acc1_best": "best", "test_acc1_last": "last"}[metric]
    compared = sum(row["p"] is not None for row in rows)
    note = (
        f"Accuracy: {metric}, on the test set with the weights of the {weights} epoch, mean and sample SD over n finished runs. "
        f"Seeds: {', '.join(map(str, seeds)) or 'none'}. Best epoch selected on: {selected}. Intervals: 95 %, Student's t. "
        f"Difference: to the control, {control}, over the pairs of runs with the same seed. "
        f"p: paired t-test, two-sided, not corrected for multiple comparisons ({compared} made here). "
        "Last: mean accuracy with the weights of the last epoch. Minutes: mean of a run. A run that diverged has no accuracy. "
        "-: not defined, as with fewer than two values, or for an interval and p where all values are equal.")
    return rows, note + (f" Not finished, and not counted: {missing} {'run' if missing == 1 else 'runs'}." if missing else "")


def as_markdown(rows: list[dict], note: str) -> str:
    return files.as_markdown({header: [cell(row, form) for row in rows] for header, form in COLUMNS.items()}, LEFT, note)
