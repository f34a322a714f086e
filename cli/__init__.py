"""The terminal commands; no logic that an embedding app would want."""
