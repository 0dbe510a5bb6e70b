"""`flexport profile`: what this machine can do, measured within a minute and some memory.

Each number is taken the way the engine uses what it is about: its own store on its own lanes, the
backend's verbs on tensors laid out as in a run, its own decoder.
"""
