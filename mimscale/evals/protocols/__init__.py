"""Evaluation protocols: one file each, found by its name. base.py says what one is."""
