"""The front door and the brain: admits, chooses, and follows each request to its last token."""
