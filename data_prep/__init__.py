"""Makes data sets for mimscale: `python -m data_prep --help`."""
