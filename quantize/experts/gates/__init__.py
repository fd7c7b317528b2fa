"""Gates: what experts do between their two GEMMs, and the contract that says so."""

from quantize.experts.gates.contract import KEY, Gates, from_contract, to_contract
from quantize.experts.gates.forms import FORMS
from quantize.experts.gates.gate import Gate

__all__ = ["FORMS", "KEY", "Gate", "Gates", "from_contract", "to_contract"]
