"""Packed forms of a matrix, and how they become plain numbers again.

A form is a record that says how a matrix lies (`forms`, `compressed`); its kernels are pure functions
on tensors: packed bytes and scales in, values out. Any range of whole cuts can be decoded by itself,
and gives the same bits as in the whole matrix. Where the bytes live and when they are decoded is not
known here.
"""
