"""Training: order, loaders, loop, schedules, log, and the embedded demo set."""
