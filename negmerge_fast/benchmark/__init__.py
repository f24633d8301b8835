"""How a speed is measured, for `negmerge bench` and for the suite in bench/. Imports torch; nothing else imports this.

rows      the machine, a self-contained line for each result, and the table a person reads
clock     what seconds are: of the CPU's clock, or between two events of a GPU
layouts   the shapes of models
work      a base and its fine-tuned versions on a device, and what the reference makes of them
ways      what is timed: our backends, and their peers in plain PyTorch
limits    what no merge can be faster than
trial     one way beside its limit, round by round
brief     what `negmerge bench` does
"""

from __future__ import annotations

from .records import append, machine, percentiles, table

__all__ = ["append", "machine", "percentiles", "table"]
