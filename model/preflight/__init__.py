"""Preflight: a train step compiled for a TPU slice before one is asked for, and what the program tells. `python -m model.preflight`."""
