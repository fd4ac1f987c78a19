"""Evidence that users' inputs changed."""
