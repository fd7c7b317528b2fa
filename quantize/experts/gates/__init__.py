"""Gates: the activation that experts apply between their two GEMMs.

Start at ``Gate`` (one activation), ``Gates`` (those of a model), and ``to_contract`` and
``from_contract``, which write and read them in ``config.json``. To add a form of gate, write one
file here and add one line to ``FORMS``. ``quantize.experts.identify`` uses ``drive`` and ``probe``
to find a model's gate. This room may import ``errors``, ``registry`` and ``experts.drafting`` only.
"""

from quantize.experts.gates.contract import KEY, Gates, from_contract, to_contract
from quantize.experts.gates.forms import FORMS
from quantize.experts.gates.gate import Gate

__all__ = ["FORMS", "KEY", "Gate", "Gates", "from_contract", "to_contract"]
