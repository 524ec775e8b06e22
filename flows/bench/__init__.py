"""Measures the engine against the hardware and beside its peers: `logitmill bench`.

Needs neither Prefect nor datasets, so that a machine lent for measuring need not have them, but to
measure from storage to storage, which is what a flow does.
"""

from .fidelity import FORMATS, Fidelity, measure_fidelity, show_fidelity
from .measure import Request, make_cases, measure
from .record import Record, show

__all__ = [
    "FORMATS",
    "Fidelity",
    "Record",
    "Request",
    "make_cases",
    "measure",
    "measure_fidelity",
    "show",
    "show_fidelity",
]
