"""Who meets whom in a Combiner, as data: integers on the host, in NumPy, whatever library the arrays are of.

plan.py       `Plan`: the lists of a plan, their coverage, their cost
patterns.py   the named patterns as blocks
mixing.py     blocks and lists as the backends run them
"""

from __future__ import annotations
