"""What `stages.train` is put together from."""
