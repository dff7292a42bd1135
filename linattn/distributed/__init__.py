"""Sequences longer than one machine: each process holds its tokens, and what crosses between them is a state a head.

    U_r = the state of rank r's keys        S_r = U_0 + ... + U_(r-1)        forward: the local pass on S_r
    X_r = the cotangent that rank r's queries send to S_r                    backward: X_(r+1) + ... reach rank r's keys

U and X have R (E + 1) numbers a head, whatever the length. Without causality every rank's queries see the sum of
all U, and every rank's keys the sum of all X. Ranks are in the order of the tokens; a rank may hold none.

verbs.py has the two verbs, states.py what is done to states, exchange.py how they cross, communicators.py over what.
"""

from __future__ import annotations

from linattn.distributed.communicators import Communicator, LocalComm, MPIComm, run_local
from linattn.distributed.verbs import attention, vjp

__all__ = ["Communicator", "LocalComm", "MPIComm", "attention", "run_local", "vjp"]
