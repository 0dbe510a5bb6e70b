"""Packed forms of a matrix, and how they become plain numbers again.

Each form is one file of pure functions on tensors: packed bytes and scales in, values out. Any range
of whole rows can be decoded by itself, and gives the same bits as in the whole matrix. Where the
bytes live and when they are decoded is not known here.
"""
