"""The processes that are measured, one for each environment.

Nothing here may import the rest of ``benchmarks``, and only :mod:`.ours` may import this
library: the older library has the same import name and runs in a process of its own.
"""
