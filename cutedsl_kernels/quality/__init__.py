"""Quality of sparse models: scores and budgets that choose thresholds, metrics that compare a sparse model with the
dense one, reports.
"""

LEARN_STEPS = 120  # of the learned scores: what the published figures were learned with
