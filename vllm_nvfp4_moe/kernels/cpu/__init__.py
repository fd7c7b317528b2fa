"""NVFP4 experts on x86 CPUs in C++: ``kernel`` is what Python calls, ``experts.cpp`` what runs, and
each header has what one instruction set does."""
