"""Carrying out a run: planned from headers, done by jobs on threads or on a Ray cluster.

Start at ``plan``, which says all jobs of a run, and ``workers.make_shards``, which does them. A
``Record`` keeps what ``--resume`` needs. This room may import ``layouts`` and what is below it.
"""
