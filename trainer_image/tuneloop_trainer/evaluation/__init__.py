"""Scores of candidate and baseline on the same items, and the tests that decide."""
