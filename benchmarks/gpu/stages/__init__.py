"""All stages, in the order of their worth: should the time be short, the last ones are missing."""

from __future__ import annotations

from benchmarks.gpu.stage import Stage
from benchmarks.gpu.stages.attention import cascade, decode, layouts, prefill
from benchmarks.gpu.stages.baselines import baselines
from benchmarks.gpu.stages.ceilings import ceilings
from benchmarks.gpu.stages.correctness import correctness
from benchmarks.gpu.stages.environment import compile_and_load, environment
from benchmarks.gpu.stages.launches import graphs, launch_cost
from benchmarks.gpu.stages.small import rows, sampling, swap
from benchmarks.gpu.stages.tools import counters, sanitizers

__all__ = ["STAGES"]

STAGES = (
    Stage("environment", 10, environment),
    Stage("compile and load", 60, compile_and_load),
    Stage("ceilings", 20, ceilings),
    Stage("correctness", 70, correctness),
    Stage("graphs", 10, graphs),
    Stage("decode", 90, decode),
    Stage("prefill", 45, prefill),
    Stage("baselines", 60, baselines),
    Stage("launch cost", 10, launch_cost),
    Stage("cascade", 15, cascade),
    Stage("layouts", 25, layouts),
    Stage("rows", 20, rows),
    Stage("sampling", 20, sampling),
    Stage("swap", 10, swap),
    Stage("sanitizers", 60, sanitizers),
    Stage("counters", 40, counters),
)
