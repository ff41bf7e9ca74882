"""Engines people would pick instead, each a process in an environment of its own.

Every module here is run as `python -m benchmarks.peers.NAME MODEL [options]` by the Python of its
environment under .bench/, so it imports that engine and the standard library only.
"""
