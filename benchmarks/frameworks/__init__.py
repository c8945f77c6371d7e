"""How fast the faces for frameworks are, against what they replace.

Each face is a module here with a function `cases(quick)`, which returns Cases; FACES names them.
"""
