"""The order in which work is done: visits as data, and the one loop that consumes them.

This room knows sizes (layers, rows, tokens) and no tensors, models or devices.
"""
