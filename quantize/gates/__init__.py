"""Gates: what experts do between their two GEMMs, and the contract that says so."""

from quantize.gates.contract import KEY, Gates, from_contract, to_contract
from quantize.gates.forms import FORMS
from quantize.gates.gate import Gate

__all__ = ["FORMS", "KEY", "Gate", "Gates", "from_contract", "to_contract"]
