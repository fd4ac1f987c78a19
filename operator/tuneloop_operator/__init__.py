"""The operator: observes Tuneloop's objects, decides, applies, and tells the truth in their status."""
