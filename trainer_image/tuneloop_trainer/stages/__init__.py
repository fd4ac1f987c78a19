"""One module per stage: each a function from the run's configuration to a `StageResult`."""
