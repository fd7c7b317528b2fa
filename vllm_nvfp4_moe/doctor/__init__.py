"""``nvfp4-moe doctor``: tells the owner of a machine whether NVFP4 experts are right on it, by
every kernel that can run there, and how fast.

:mod:`.command` is what users call, :mod:`.run` the order of things, :mod:`.work` what is done to
one kernel in a process of its own. ``shape``, ``inputs``, ``layer`` and ``timing`` are also what
``benchmarks.moe_layer`` is made of.
"""
