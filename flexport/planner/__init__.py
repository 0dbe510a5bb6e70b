"""The policy of a run, from numbers alone: model sizes, budgets and the job's lengths.

It knows no tensors, devices or files; what it says is what the engine will take.
"""
