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
from benchmarks.gpu.stages.whole_model import whole_model

__all__ = ["STAGES"]

STAGES = (
    Stage("environment", 10, environment),
    Stage("compile and load", 60, compile_and_load),
    Stage("ceilings", 15, ceilings),
    Stage("correctness", 55, correctness),
    Stage("graphs", 10, graphs),
    Stage("decode", 70, decode),
    Stage("whole model", 115, whole_model),
    Stage("prefill", 35, prefill),
    Stage("baselines", 40, baselines),
    Stage("launch cost", 5, launch_cost),
    Stage("cascade", 10, cascade),
    Stage("layouts", 15, layouts),
    Stage("rows", 15, rows),
    Stage("sampling", 15, sampling),
    Stage("swap", 10, swap),
    Stage("sanitizers", 35, sanitizers),
    Stage("counters", 25, counters),
)
