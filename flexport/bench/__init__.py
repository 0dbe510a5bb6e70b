"""Measuring: generation throughput, the machine's ceilings, and flexport beside its peers."""
