"""Quality of sparse models: scores and budgets that choose thresholds, metrics that compare a sparse model with the
dense one, reports.
"""
