"""The trainer: prepare, train, package and evaluate, each one function with one typed config and one typed result."""
