"""From the user's files to tokenised rows."""
