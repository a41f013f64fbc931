"""Measurements on a GPU, by one command that needs no network: `benchmarks/gpu/run.sh`.

run.py starts every part in a process of its own; part.py is that process; the other modules are the parts, each with
a function `run(recorder, argument)`, and what they share. compile_report.py needs no GPU: it compiles for some that are
not there.
"""
