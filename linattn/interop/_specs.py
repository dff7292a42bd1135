"""Mechanisms as strings, which operators take, compilers keep and files hold.

A value of plain parameters is its JSON and comes back from it anywhere. One that holds arrays (a projection, a
calibration) is a fingerprint of them: it comes back in a process that has the value.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

from linattn.mechanisms.attention import Attention
from linattn.states import MECHANISMS, _from_plain, _plain_parameters

_VALUES: dict[str, Attention] = {}
_SPECS: dict[Attention, str] = {}


def spec_of(mechanism: Any) -> str | None:
    """The string of a value; None where there is none: a class of the user's, a FeatureMap of the user's."""
    found = _SPECS.get(mechanism)
    if found is None and MECHANISMS.get(type(mechanism).__name__) is type(mechanism):
        try:
            parameters, arrays = _plain_parameters(mechanism)
        except TypeError:
            return None
        prints = [hashlib.sha256(repr(x.shape).encode() + x.tobytes()).hexdigest() for x in arrays]
        found = json.dumps([type(mechanism).__name__, parameters, *prints])
        _VALUES[found], _SPECS[mechanism] = mechanism, found
    return found


def value_of(spec: str) -> Any:
    """The value of a string.

    Raises
    ------
    ValueError
        If it holds arrays that no value of this process has.
    """
    if spec not in _VALUES:
        name, parameters, *prints = json.loads(spec)
        if prints:
            raise ValueError(
                f"A program with `{name}` of given arrays runs where `linattn.interop.torch.attention` was called with "
                f"that value first, got arrays {prints} that are not known here."
            )
        value = MECHANISMS[name](**{key: _from_plain(x, []) for key, x in parameters.items()})
        _VALUES[spec] = value
    return _VALUES[spec]
