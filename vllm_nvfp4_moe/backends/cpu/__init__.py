"""NVFP4 experts on a CPU: ``method`` is what vLLM calls, ``forward`` what it computes, and
``kernels`` has the compiled loops."""
