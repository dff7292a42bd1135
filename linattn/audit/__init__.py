"""What judges the library: the papers' formulas, the error metrics and the reports made of them.

`quadratic` holds the definitions and imports nothing of linattn but formulas: no fault of the library can hide in them.
"""

from __future__ import annotations
