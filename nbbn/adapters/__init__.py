"""What nbbn needs of the array libraries that work on a GPU: one module for each, with the functions of Library."""
