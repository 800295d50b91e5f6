"""Whether an engine answers as float32 PyTorch does: pictures made from a seed, the answers expected, and the gate.

Imports numpy and `bundle` only.
"""

from parity.gate import GateReport, Infer, Row, run_gate
from parity.limits import LIMITS, Limits, limits_for
from parity.pictures import Pictures, proof_pictures
from parity.proof import Expected, Proof, ProofInvalid, read_proof

__all__ = [
    "LIMITS",
    "Expected",
    "GateReport",
    "Infer",
    "Limits",
    "Pictures",
    "Proof",
    "ProofInvalid",
    "Row",
    "limits_for",
    "proof_pictures",
    "read_proof",
    "run_gate",
]
