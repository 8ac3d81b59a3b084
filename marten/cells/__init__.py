"""Single-cell profiling: from a plate's images to one profile per cell, per well and per treatment.

It works on DeepProfiler's own project tree, tables and configuration, so that an existing project runs unchanged.
The steps, each reading what the one before it wrote: prepare, sample or export, check, train, profile, aggregate,
normalize, evaluate.
"""
