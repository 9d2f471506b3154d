"""What TSAM is worth: trainings on data that anyone has, compared over paired seeds.

data and tasks say what is trained, methods and peers how, run makes one result of one job, search finds settings,
report makes tables; train, compare, sweep, cost, landscape and half_precision are commands.
"""
