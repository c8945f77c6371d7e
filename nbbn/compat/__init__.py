"""The faces of other versions."""
