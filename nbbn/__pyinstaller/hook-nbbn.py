"""What a program that imports nbbn takes along.

nbbn looks for these libraries when it meets one of their arrays, and then the program has imported them itself. An
import of nbbn's alone would put gigabytes into every bundle that is built where they are installed.
"""

excludedimports = ["torch", "cupy", "jax", "tensorflow", "sklearn", "matplotlib", "tqdm", "threadpoolctl"]
# Imported when a dtype is named "bfloat16".
hiddenimports = ["ml_dtypes"]
