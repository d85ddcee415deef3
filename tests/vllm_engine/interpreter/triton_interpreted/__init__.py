"""A backend of Triton's that does nothing, for with TRITON_INTERPRET=1 Python runs its kernels.

On `PYTHONPATH` the directory above lets vLLM take its model runner V2 on a CPU.
"""
