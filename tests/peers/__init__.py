"""Tests of what other packages do, run by name where those are installed."""
