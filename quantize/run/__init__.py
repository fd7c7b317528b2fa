"""Carrying out a run: planned from headers, done by jobs on threads or on a Ray cluster."""
