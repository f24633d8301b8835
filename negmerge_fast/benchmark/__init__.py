"""Benchmarks: what `negmerge bench` and the suite in bench/ measure speed with. Imports torch.

records     result rows as JSON lines, the machine they were measured on, and their tables
timers      clocks: the CPU's, and events on a GPU's stream
shapes      tensor shapes of models
workload    a base and its fine-tuned versions in memory, and their comparison with the reference
candidates  the code that is timed: the package's backends, and baselines in plain PyTorch
bandwidth   rooflines: speeds of memory, devices and disks that no merge can exceed
timing      rounds of a candidate, each beside its roofline
quick       the command `negmerge bench`
"""

from __future__ import annotations

from .records import append, machine, percentiles, table

__all__ = ["append", "machine", "percentiles", "table"]
