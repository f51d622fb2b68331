"""Bridge: interdependent parallel generation. Imports no deep-learning framework."""
