"""Measurements. `python -m bench NAME` prints one JSON object as its last line; speed is measured here and never asserted in a test."""
