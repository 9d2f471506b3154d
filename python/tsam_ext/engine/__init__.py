"""What every call of an op rests on: checks of arguments, the scalars of a step, lists over several devices, warnings.

checks.py: what came and what was wanted. state.py: the float64 scalars that the kernels keep. spread.py: one call of an
op per device. notices.py: warnings that point at the user's line. Invariant: nothing here knows what a step is.
"""
