"""What was measured, as Markdown tables, as bars and as JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any, Final

from benchmarks.compare.agreement import SLACK, Agreement
from benchmarks.compare.aims import AIMS, LIMIT, WASTE_AIM, ratio
from benchmarks.compare.charts import Bar, Bars, bars
from benchmarks.compare.rounds import AGAIN, Measured
from benchmarks.report import print_table
from benchmarks.workloads import WORKLOADS

__all__ = ["HEADLINE", "aims", "picture", "print_agreement", "print_aims", "print_facts", "print_limits", "print_workload"]

HEADLINE: Final = {
    "single": ("rate", "output tok/s"),
    "mixed32": ("rate", "output tok/s"),
    "prefix32": ("rate", "output tok/s"),
    AGAIN: ("rate", "output tok/s"),
    "prefill512": ("prompt", "prompt tok/s"),
    "decode8": ("decode", "decoded tok/s"),
    "decode32": ("decode", "decoded tok/s"),
    "long8": ("decode", "decoded tok/s"),
}
"""The figure that each workload is about."""
_OURS: Final = "streamkv"

Titles = Mapping[str, str]


def what(workload: str) -> str:
    """In words."""
    return f"{WORKLOADS['prefix32'][0]}; the same tokens once more" if workload == AGAIN else WORKLOADS[workload][0]


def print_workload(workload: str, measured: Mapping[str, Measured], titles: Titles) -> None:
    """One row for each contestant, best first, and the limit."""
    own = measured[workload]
    figure, unit = HEADLINE[workload]
    rows: list[Sequence[object]] = []
    for name in _ranked(own, figure):
        rounds = [each for each in own.rounds[name] if figure in each]
        values = [each[figure] for each in rounds]
        rows.append(
            (
                titles[name],
                f"{median(values):.1f}",
                f"{min(values):.1f}–{max(values):.1f}",
                _ratio(ratio(measured, workload, figure, _OURS, name)),
                _percent(ratio(measured, workload, figure, name, LIMIT)),
                _median(rounds, "ttft", 1000),
                _median(rounds, "decode"),
                len(values),
            )
        )
    limit = median(each[figure] for each in own.limits)
    rows.append(("the machine's limit", f"{limit:.1f}", "", "", "100 %", "", _median(own.limits, "decode"), len(own.limits)))
    header = [
        "engine",
        f"{unit}, median",
        "range",
        "StreamKV to it",
        "of the limit",
        "first token ms, mean",
        "decoding tok/s",
        "rounds",
    ]
    print_table(f"*{workload}*: {what(workload)}", header, rows)
    for name, failure in own.failures.items() if workload != AGAIN else ():
        print(f"{titles[name]} failed: {failure}\n", flush=True)


def _ranked(measured: Measured, figure: str) -> list[str]:
    names = [name for name, rounds in measured.rounds.items() if any(figure in each for each in rounds)]
    return sorted(names, key=lambda name: -median(each[figure] for each in measured.rounds[name] if figure in each))


def _median(rounds: Sequence[Mapping[str, float]], figure: str, factor: float = 1.0) -> str:
    values = [each[figure] * factor for each in rounds if figure in each]
    return f"{median(values):.1f}" if values else ""


def _ratio(value: float | str) -> str:
    return "" if isinstance(value, str) else f"{value:.2f} ×"


def _percent(value: float | str) -> str:
    return "" if isinstance(value, str) else f"{100 * value:.0f} %"


def print_limits(measured: Mapping[str, Measured]) -> None:
    """What the machine could do, over all rounds."""
    machines = [machine for each in measured.values() for machine in each.machine]
    rows = []
    for title, values, unit in (
        ("read bandwidth", [machine.bandwidth / 1e9 for machine in machines], "GB/s"),
        ("matrix product", [machine.peak / 1e9 for machine in machines], "GFLOP/s"),
    ):
        rows.append((title, f"{median(values):.1f}", f"{min(values):.1f}–{max(values):.1f}", unit))
    print_table("The machine, measured in every round", ["", "median", "range", "unit"], rows)


def print_facts(measured: Mapping[str, Measured], titles: Titles) -> None:
    """What each says of itself."""
    facts = {name: each.facts[name] for each in measured.values() for name in each.facts}
    rows = [(titles[name], "; ".join(f"{key} {value}" for key, value in own.items())) for name, own in facts.items() if own]
    print_table("What they say of themselves", ["engine", ""], rows)


def print_agreement(found: Sequence[Agreement], titles: Titles) -> None:
    """How many greedy tokens are the same, and what stands at the first differences."""
    if not found:
        return
    rows = [
        (
            f"*{each.workload}*, {titles[each.name]}",
            f"{each.agreed} of {each.tokens}",
            each.differences,
            f"{each.worst:.2f}" if each.differences else "",
            f"{each.worst_reference:.2f}" if each.differences else "",
            "yes" if each.ok else "NO",
        )
        for each in found
    ]
    header = [
        "beside " + titles[found[0].reference],
        "tokens before the first difference",
        "differences",
        "worst",
        "worst of " + titles[found[0].reference],
        "rounding",
    ]
    print_table(f"Greedy tokens; deficits at first differences in errors of the dtype, rounding is up to {SLACK:g}", header, rows)


def aims(measured: Mapping[str, Measured], waste: float | None) -> list[dict[str, Any]]:
    """Each aim with what was measured, or why it was not."""
    found: list[dict[str, Any]] = []
    for aim in AIMS:
        value = ratio(measured, aim.workload, aim.figure, aim.ours, aim.theirs)
        known = None if isinstance(value, str) else value
        within = aim.theirs == LIMIT
        found.append(
            {
                "what": aim.what,
                "aim": _target(aim.target, within=within),
                "measured": value if known is None else _percent(known) if within else _ratio(known),
                "met": None if known is None or aim.target is None else known >= aim.target,
            }
        )
    text = "mixed32 was not run" if waste is None else f"{waste:.2f} %"
    met = None if waste is None else waste <= WASTE_AIM
    found.append({"what": "KV slots unfilled, *mixed32*, pool full", "aim": f"≤ {WASTE_AIM:g} %", "measured": text, "met": met})
    return found


def _target(target: float | None, *, within: bool) -> str:
    if target is None:
        return "no aim"
    return f"≥ {100 * target:.0f} %" if within else f"≥ {target:g} ×"


def print_aims(found: Sequence[Mapping[str, Any]]) -> None:
    """Aim beside figure."""
    words = {None: "", True: "yes", False: "no"}
    rows = [(each["what"], each["aim"], each["measured"], words[each["met"]]) for each in found]
    print_table("Aims", ["", "aim", "measured", "met"], rows)


def picture(measured: Mapping[str, Measured], titles: Titles) -> str:
    """All workloads as bars, as SVG."""
    groups = []
    for workload, own in measured.items():
        figure, unit = HEADLINE[workload]
        rows = []
        for name in _ranked(own, figure):
            values = [each[figure] for each in own.rounds[name] if figure in each]
            rows.append(Bar(titles[name], median(values), min(values), max(values)))
        groups.append(Bars(f"{workload}: {what(workload)}", unit, rows, median(each[figure] for each in own.limits)))
    return bars("Engines beside each other; medians and ranges, longer is better", groups)
