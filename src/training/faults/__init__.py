"""Faults during a run and how they are handled: silent ranks, non-finite numbers, signals."""
