"""Benchmarks of tsam_ext, run from a checkout with the package installed: ``python -m bench --help``.

Every figure they print is a ratio or a difference measured in one run; the README and bench/README.md quote them.
"""
