"""Texts for pictures: raw text + caption + tags -> a composer -> the third text, and records to train on."""
