"""What goes wrong in a run, and how it is met: silent ranks, numbers that are not finite, signals."""
