"""Submitting jobs: exactly one per key, whatever happened to earlier attempts."""
