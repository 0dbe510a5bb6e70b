"""The tiered store: bundles of bytes, their homes on device, host or disk, and the way between.

It knows bytes and tickets. What is in a bundle is its caller's business.
"""
