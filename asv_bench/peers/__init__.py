"""Ours beside its peers: `python -m asv_bench.peers` from the root of the repository, or `nox -s peers`.

One process, one interleaved run: every round calls every contender once, in an order that rotates, and the figures
are ratios of medians. A contender is timed only if its output agrees with the definition; one that is not installed
is left out and named. Nothing is installed.
"""
