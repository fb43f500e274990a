"""What the tests of more than one file share: tiny data, stand-in models, runs on several ranks, planted faults."""
