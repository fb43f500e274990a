"""Evaluation: zero-shot retrieval and classification, and their reports."""
