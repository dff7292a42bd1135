"""The definition of every verb, in the array API standard alone: runs on NumPy, array-api-strict, torch, JAX, ..."""
