"""The layer's steps on a GPU. Nothing here is imported before an array on a GPU comes in, or is asked for."""
