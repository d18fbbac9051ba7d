"""Evaluations with a command line of their own, one file each: `SUMMARY`, `add_arguments(parser)` and `run(args)`.

What a protocol needs (one training set, one validation set, features) comes from the runner; a task puts several
protocols, data sets or networks together. It is found by the name of its file: `mimscale evaluate transfer`.
"""
