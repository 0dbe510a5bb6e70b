"""FlexGen's published numbers, from its schedule and a machine's: `python -m flexport.bench.flexgen`.

The machine is a T4 by default, as FlexGen's authors had it. For each run that they published the
table has what they measured, what their schedule comes to by the rates that flexport's own plans
are made with, and what flexport's schedule should reach by the same rates. So it says how far such
predictions can be trusted, and what the schedules differ in. Nothing is run; torch is not imported.
"""
